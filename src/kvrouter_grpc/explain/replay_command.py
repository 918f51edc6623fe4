"""The `kvrouter replay` command."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from kvrouter_grpc.config.settings import SETTINGS, Setting
from kvrouter_grpc.decisions.line import SETTINGS as OF_DECISIONS
from kvrouter_grpc.decisions.reader import Faults
from kvrouter_grpc.decisions.replay import Outcome, Replay
from kvrouter_grpc.explain import screen

WIDE = 500  # columns


class _Changed(click.Option):
    """The option of one setting that a replay may change."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        flag = setting.flag
        super().__init__(
            [f"{flag}/--no-{flag.removeprefix('--')}" if setting.switch else flag],
            default=None,
            metavar=None if setting.switch else flag.rpartition("-")[2].upper(),
            help=f"{setting.info.description}" + ("" if setting.switch else f"  [{setting.syntax}]"),
        )


def _options() -> list[click.Parameter]:
    return [
        click.Argument(["files"], nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False)),
        click.Option(
            ["--differing"],
            default=10,
            show_default=True,
            type=click.IntRange(0, 1_000_000),
            help="Differing decisions to show.",
        ),
        click.Option(["--json", "as_json"], is_flag=True, help="Print the outcome as JSON."),
        *(_Changed(SETTINGS[f"router.{name}"]) for name in sorted(OF_DECISIONS)),
    ]


@click.command("replay", params=_options())
@click.pass_context
def replay_command(ctx: click.Context, /, files: tuple[Path, ...], differing: int, as_json: bool, **_: Any) -> None:
    """Take recorded decisions once more under other settings.

    FILES are what `--decision-log-file` wrote, older ones first. Settings that are not given stay as they were; with
    none given the replay shows whether this version decides as the one did that wrote the log.

    Each decision is replayed with the loads and caches that it read then. Requests that were bound to one worker, by
    a pin or by their session, stay there.
    """
    replay = Replay(dict(_changes(ctx)), differing)
    try:
        outcome = replay.files(files)
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from None
    if not outcome.decisions:
        told = "".join(f"\n  {fault}" for fault in replay.faults.told)
        raise click.ClickException(f"no decisions to replay, {replay.faults.count} lines that cannot be read{told}")
    if as_json:
        click.echo(json.dumps(_plain(outcome, replay.faults)))
        return
    Console(width=None if sys.stdout.isatty() else WIDE).print(screen.outcome(outcome, replay.faults), highlight=False)


def _changes(ctx: click.Context) -> Iterator[tuple[str, Any]]:
    """The settings that are given, read as `serve` reads them."""
    for param in ctx.command.params:
        value = ctx.params.get(param.name or "")
        if not isinstance(param, _Changed) or value is None:
            continue
        try:
            yield param.setting.name, value if param.setting.switch else param.setting.parse_text(value)
        except ValueError as error:
            raise click.UsageError(f"flag {param.setting.flag}: {error}", ctx) from None


def _plain(outcome: Outcome, faults: Faults) -> dict[str, Any]:
    """The outcome as JSON has it."""
    plain = asdict(outcome) | {"unreadable": faults.count}
    workers = sorted(outcome.before | outcome.after)
    del plain["before"], plain["after"]
    plain["workers"] = [
        {
            "endpoint": endpoint,
            "worker": worker,
            "before": outcome.before[endpoint, worker],
            "after": outcome.after[endpoint, worker],
        }
        for endpoint, worker in workers
    ]
    return plain
