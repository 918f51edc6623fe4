"""The command line: what `kvrouter` understands, and what its exit codes say.

Exit codes: 0 done, 64 the configuration or the command line is wrong (nothing was started), 70 the router
failed, 128 + n ended at once by a second signal n; of `check` also 1 warnings, 2 failures.
"""

import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import structlog

from kvrouter_grpc import __version__
from kvrouter_grpc.config import Config, effective, load
from kvrouter_grpc.config.settings import SETTINGS, WORKER_SETTINGS, Setting
from kvrouter_grpc.config.source import CONFIG_ENV, FlagValue
from kvrouter_grpc.errors import ConfigError

EXIT_USAGE = 64  # EX_USAGE of sysexits.h
EXIT_SOFTWARE = 70  # EX_SOFTWARE

_HEADINGS = {
    "": "Fleet",
    "server": "Server",
    "router": "Decision",
    "events": "KV events",
    "upstream": "Engines",
    "log": "Log",
    "decisions": "Log of decisions",
}
# Lines must not break inside names: while the help is laid out, their hyphens are of the hard kind.
_HYPHEN = re.compile(r"(?<=\w)-(?=\w)|(?<=\s)--(?=\w)")
_HARD_HYPHEN = "\u2011"
_PENDING = "Accepted for compatibility, without effect in this version"
_EXAMPLES = """\
\b
Examples:
  One endpoint, two engines; what is left out, the router asks the engines for:
    kvrouter serve --endpoint dynamo.backend.generate \\
      --worker name=a,url=http://10.0.0.1:8000 --worker name=b,url=http://10.0.0.2:8000
\b
  Prefill workers from a file; their decode load does not count:
    kvrouter serve --endpoint dynamo.prefill.generate --workers-file workers.yaml \\
      --router-block-size 64 --no-router-track-active-blocks
\b
  Everything from a file; print what takes effect, and start nothing:
    kvrouter serve --config router.yaml --check-config
\b
Flags come before environment variables, these before --config, and this before defaults."""

_CHECK_EXAMPLES = """\
\b
Examples:
  The workers of a router that is about to start, one prompt sent to each:
    kvrouter check --config router.yaml --probe
\b
  In a pipeline, where warnings may pass:
    kvrouter check --config router.yaml --json > findings.json || [ $? -eq 1 ]"""


class _SettingOption(click.Option):
    """The option of one setting, under its flag or under a deprecated name of it."""

    def __init__(self, setting: Setting, flag: str) -> None:
        self.setting = setting
        self.flag = flag
        super().__init__(
            [f"{flag}/--no-{flag.removeprefix('--')}" if setting.switch else flag],
            default=None,
            multiple=setting.repeated,
            metavar=None if setting.switch else setting.flag.removeprefix("--").rpartition("-")[2].upper(),
            hidden=flag != setting.flag or setting.retired,
            help=_help(setting),
        )


def _help(setting: Setting, *, env: bool = True) -> str:
    facts = [] if setting.switch else [setting.syntax]
    facts.append("required" if setting.required else f"default: {_shown(setting.default)}")
    if env:
        facts.append(f"env: {setting.env[0]}")
    return _HYPHEN.sub(_HARD_HYPHEN, f"{setting.info.description}  [{'; '.join(facts)}]")


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


class _ServeCommand(click.Command):
    """A command whose help lists its options by section of the configuration."""

    headings: tuple[str, ...] = (*_HEADINGS.values(), _PENDING)

    def get_help(self, ctx: click.Context) -> str:
        """Lay out the help."""
        return super().get_help(ctx).replace(_HARD_HYPHEN, "-")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one group of options per section."""
        groups: dict[str, list[tuple[str, str]]] = {"Command": []}
        groups |= {heading: [] for heading in self.headings}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            if isinstance(param, _SettingOption):
                heading = _PENDING if param.setting.pending else _HEADINGS[param.setting.section]
                groups.get(heading, []).append(record)
            else:
                groups["Command"].append(record)
        keys = [(f"{key.key}=", _help(key, env=False)) for key in WORKER_SETTINGS.values()]
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)
            if heading == _HEADINGS[""]:
                with formatter.section("Keys of --worker, separated by commas; items of a list by |"):
                    formatter.write_dl(keys)


class _CheckCommand(_ServeCommand):
    """Its help lists what says where the workers are; the help of `serve` has the rest."""

    headings = (_HEADINGS[""],)


class _Group(click.Group):
    """A group that imports a part of the program only when its command is asked for."""

    parts: Mapping[str, tuple[str, str, str]] = {
        "mock-worker": (
            "kvrouter_grpc.mock_worker.command",
            "mock_worker_command",
            "Run an engine double that speaks vLLM's HTTP and KV events.",
        ),
        "demo": (
            "kvrouter_grpc.demo",
            "demo_command",
            "Run a router and four mock workers and watch the decisions.",
        ),
        "explain": (
            "kvrouter_grpc.explain.command",
            "explain_command",
            "Ask a running router why requests go where they go.",
        ),
        "replay": (
            "kvrouter_grpc.explain.replay_command",
            "replay_command",
            "Take recorded decisions once more under other settings.",
        ),
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name all commands."""
        return sorted([*super().list_commands(ctx), *self.parts])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in self.parts:
            return super().get_command(ctx, cmd_name)
        module, attribute, _ = self.parts[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing any."""
        rows = []
        for name in self.list_commands(ctx):
            command = super().get_command(ctx, name)
            rows.append((name, command.get_short_help_str() if command else self.parts[name][2]))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """KV-cache-aware gRPC router for plain vLLM fleets."""


@cli.command()
def version() -> None:
    """Print the version."""
    click.echo(f"kvrouter-grpc {__version__}")


_CHECK_CONFIG = click.Option(
    ["--check-config"],
    is_flag=True,
    help="Check the configuration, print what takes effect and where it came from, and exit.",
)
_CHECK_OPTIONS = (
    click.Option(
        ["--timeout", "timeout_s"],
        type=click.FloatRange(1, 600),
        default=20.0,
        show_default=True,
        metavar="SECONDS",
        help="Limit for everything; all workers are looked at at once.",
    ),
    click.Option(
        ["--listen-for", "listen_s"],
        type=click.FloatRange(0, 600),
        default=1.0,
        show_default=True,
        metavar="SECONDS",
        help="How long to listen to the KV events once they were replayed.",
    ),
    click.Option(
        ["--probe"],
        is_flag=True,
        help="Send a prompt of two blocks to every rank, twice: its event and its cached tokens must be seen.",
    ),
    click.Option(["--problems"], is_flag=True, help="Leave out what is as it should be."),
    click.Option(["--json", "as_json"], is_flag=True, help="Print the findings as JSON."),
)


def _options(*own: click.Parameter) -> list[click.Parameter]:
    return [
        click.Option(
            ["--config", "config_file"],
            type=click.Path(path_type=Path, dir_okay=False),
            envvar=CONFIG_ENV,
            metavar="FILE",
            help=f"YAML file of settings, section by section.  [env: {CONFIG_ENV}]",
        ),
        *own,
        *(
            _SettingOption(setting, flag)
            for setting in SETTINGS.values()
            for flag in (setting.flag, *setting.legacy_flags)
        ),
    ]


@cli.command(
    cls=_ServeCommand,
    params=_options(_CHECK_CONFIG),
    epilog=_EXAMPLES,
    # Unknown flags reach `load`, which names them together with everything else that is wrong.
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.pass_context
def serve(ctx: click.Context, /, config_file: Path | None, check_config: bool, **_: Any) -> int:
    """Run the router until SIGTERM or SIGINT."""
    config = load(_flags(ctx), os.environ, config_file)
    if not check_config:
        return _run(config)
    for warning in config.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(effective(config), nl=False)
    return 0


@cli.command(
    cls=_CheckCommand,
    params=_options(*_CHECK_OPTIONS),
    epilog=_CHECK_EXAMPLES,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.pass_context
def check(
    ctx: click.Context,
    /,
    config_file: Path | None,
    timeout_s: float,
    listen_s: float,
    probe: bool,
    problems: bool,
    as_json: bool,
    **_: Any,
) -> int:
    """Look at every worker as a router would, and say what to change.

    Takes the configuration of `serve`, every flag of it included: the same line with another command checks what that
    router would meet. Binds no port.

    Exit codes: 0 nothing to do, 1 warnings, 2 failures, 64 the configuration is wrong.
    """
    config = load(_flags(ctx), os.environ, config_file)
    room = importlib.import_module("kvrouter_grpc.check")
    scope = room.Scope(timeout_s=timeout_s, listen_s=listen_s, probe=probe)
    code: int = room.run(config, scope, problems=problems, as_json=as_json)
    return code


def _flags(ctx: click.Context) -> dict[str, FlagValue]:
    """The flags as written, unknown ones included.

    Raises:
        UsageError: There is a word that belongs to no flag.
    """
    flags: dict[str, FlagValue] = {}
    after_unknown = False
    for word in ctx.args:
        if word.startswith("-"):
            flags[word.partition("=")[0]] = ""
        elif not after_unknown:
            raise click.UsageError(f"unexpected argument {word!r}", ctx)
        after_unknown = word.startswith("-")
    for param in ctx.command.params:
        value = ctx.params.get(param.name or "")
        if isinstance(param, _SettingOption) and value not in {None, ()}:
            flags[param.flag] = value
    return flags


def _run(config: Config) -> int:
    # Late, so that everything else works without loading gRPC, ZeroMQ and the compiled core.
    app = importlib.import_module("kvrouter_grpc.app")
    try:
        code: int = app.serve(config)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 (the last one: log it, and say so with the exit code)
        faults = _faults(error)
        if faults:
            raise ConfigError(faults) from None
        structlog.get_logger(__name__).critical("the router failed", exc_info=True)
        return EXIT_SOFTWARE
    return code


def _faults(error: Exception) -> list[str]:
    """The configuration faults that `error` consists of, or none: task groups wrap what ends them."""
    if isinstance(error, ConfigError):
        return error.faults
    if not isinstance(error, ExceptionGroup):
        return []
    found = [_faults(each) for each in error.exceptions]
    return [fault for faults in found for fault in faults] if all(found) else []


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit the process."""
    try:
        code = cli.main(args=args, prog_name="kvrouter", standalone_mode=False)
    except ConfigError as error:
        count = "1 fault" if len(error.faults) == 1 else f"{len(error.faults)} faults"
        click.echo(f"kvrouter: {count} in the configuration:", err=True)
        for fault in error.faults:
            click.echo(f"  - {fault}", err=True)
        code = EXIT_USAGE
    except click.UsageError as error:
        error.show()
        code = EXIT_USAGE
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.Abort:
        code = 130
    sys.exit(code if isinstance(code, int) else 0)
