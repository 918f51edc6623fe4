"""The command line as a user runs it."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

import kvrouter_grpc
from kvrouter_grpc import cli
from kvrouter_grpc.config import Config, load
from kvrouter_grpc.config.settings import SETTINGS, WORKER_SETTINGS
from kvrouter_grpc.errors import ConfigError

OK = ["serve", "--endpoint", "a.b.c"]


def environment(**extra: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("KVROUTER_", "DYN_"))}
    return clean | extra


def run(*args: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvrouter_grpc", *args],
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def exit_code(*args: str) -> Any:
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    return caught.value.code


def test_faults_are_all_told_on_stderr_with_exit_64() -> None:
    result = run(*OK, "--router-temprature", "1", "--listen", "nowhere", DYN_ROUTER_MODE="fastest")
    assert result.returncode == 64
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "kvrouter: 3 faults in the configuration:",
        "  - flag --router-temprature is unknown; did you mean --router-temperature?",
        "  - flag --listen: 'nowhere' is not usable; write host:port (it needs a host and a port from 0 to 65535)",
        (
            "  - environment DYN_ROUTER_MODE: 'fastest' is not usable; write kv, round-robin, random, power-of-two, "
            "least-loaded, device-aware-weighted, session, prefix, kv-aware or direct"
        ),
    ]


def test_faults_come_before_anything_that_could_bind_is_loaded() -> None:
    program = (
        "import sys; from kvrouter_grpc import cli\n"
        "try: cli.main(['serve', '--endpoint', 'a.b'])\n"
        "except SystemExit as end: code = end.code\n"
        "print(code, sorted({'grpc', 'zmq', 'aiohttp', 'uvloop'} & set(sys.modules)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout == "64 []\n", result.stderr


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["serve", "stray"], "unexpected argument 'stray'"),
        (["serve", "--router-mode"], "requires an argument"),
        (["serve", "--router-kv-events=yes"], "does not take a value"),
        (["no-such-command"], "No such command 'no-such-command'"),
        (["--no-such-flag"], "No such option"),
    ],
)
def test_misuse_of_the_command_line_ends_with_64(
    args: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*args) == 64
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--nope", "--nope=1", "-x"])
def test_unknown_flag(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*OK, word) == 64
    assert f"flag {word.partition('=')[0]} is unknown" in capsys.readouterr().err


def test_check_config_prints_what_takes_effect(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text("endpoints: [a.b.c]\nworkers: [{url: 'http://h:8000'}]\nserver: {listen: '127.0.0.1:0'}\n")
    result = run("serve", "--config", str(file), "--check-config", "--block-size", "16", DYN_ROUTER_TEMPERATURE="0.5")
    assert result.returncode == 0
    assert result.stderr == "warning: flag --block-size is deprecated: write --router-block-size.\n"
    lines = result.stdout.splitlines()
    assert "  block-size: 16  # flag --block-size" in lines
    assert "  temperature: 0.5  # environment DYN_ROUTER_TEMPERATURE" in lines
    assert f"  listen: 127.0.0.1:0  # {file}: server.listen" in lines
    assert "  mode: kv  # default" in lines
    shown = tmp_path / "shown.yaml"
    shown.write_text(result.stdout)
    assert (
        load({}, {}, shown).model_dump()
        == load({"--block-size": "16"}, {"DYN_ROUTER_TEMPERATURE": "0.5"}, file).model_dump()
    )


def test_config_file_by_variable(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text("endpoints: [from.the.file]\n")
    result = run("serve", "--check-config", KVROUTER_CONFIG=str(file))
    assert result.stdout.startswith(f"endpoints: [from.the.file]  # {file}: endpoints\n")


def test_help_shows_every_option() -> None:
    result = CliRunner().invoke(cli.cli, ["serve", "--help"], terminal_width=110)
    assert result.exit_code == 0
    words = set(result.output.replace(",", " ").split())
    for setting in SETTINGS.values():
        assert (setting.flag in words) is not setting.retired
        assert not words & set(setting.legacy_flags)
        if setting.switch:
            assert f"--no-{setting.flag.removeprefix('--')}" in words
    assert {f"{key.key}=" for key in WORKER_SETTINGS.values()} <= words
    assert "\u2011" not in result.output
    assert {"--config", "--check-config", "Examples:"} <= words


def test_help_of_the_program_lists_all_commands_without_loading_them() -> None:
    program = (
        "import sys; from kvrouter_grpc import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in sys.modules if 'mock_worker' in name or 'demo' in name or name == 'grpc'])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    *usage, loaded = result.stdout.splitlines()
    assert loaded == "[]"
    assert [line.split()[0] for line in usage[usage.index("Commands:") + 1 :]] == [
        "check",
        "demo",
        "explain",
        "mock-worker",
        "replay",
        "serve",
        "version",
    ]


def test_version() -> None:
    result = run("version")
    assert (result.returncode, result.stdout) == (0, f"kvrouter-grpc {kvrouter_grpc.__version__}\n")


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A place for the app's `serve`, so that every way in which it can end is seen."""
    fake = SimpleNamespace(serve=lambda _: 0)
    monkeypatch.setitem(sys.modules, "kvrouter_grpc.app", fake)
    for name in [name for name in os.environ if name.startswith(("KVROUTER_", "DYN_"))]:
        monkeypatch.delenv(name)
    return fake


def test_serve_hands_over_the_configuration_and_returns_its_code(app: SimpleNamespace) -> None:
    seen: list[Config] = []
    app.serve = lambda config: seen.append(config) or 128 + signal.SIGTERM
    code = exit_code(
        *OK,
        "--no-router-kv-events",
        "--worker",
        "url=http://h:1",
        "--worker",
        "url=http://h:2",
        "--admin-listen",
        "none",
    )
    assert code == 143
    (config,) = seen
    assert not config.router.kv_events
    assert [worker.name for worker in config.workers] == ["h:1", "h:2"]


def test_faults_that_only_show_on_binding_end_with_64(app: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: Config) -> int:
        raise ExceptionGroup("", [ExceptionGroup("", [ConfigError(["first"])]), ConfigError(["second"])])

    app.serve = fail
    assert exit_code(*OK) == 64
    assert capsys.readouterr().err.splitlines()[1:] == ["  - first", "  - second"]


def test_any_other_failure_ends_with_70(app: SimpleNamespace) -> None:
    def fail(_: Config) -> int:
        raise ExceptionGroup("", [ConfigError(["first"]), RuntimeError("bug")])

    app.serve = fail
    assert exit_code(*OK) == 70
