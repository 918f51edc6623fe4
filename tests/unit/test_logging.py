"""What log lines look like and what never stands in them."""

import asyncio
import json
import logging
import sys
import warnings
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from kvrouter_grpc.config import LogConfig
from kvrouter_grpc.observability.logging import CONTENT, MAX_TEXT, bound, configure_logging


class Lines:
    """What was logged so far; pytest's own capture of stderr, since it swaps `sys.stderr` behind a test's back."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture
        self._text = ""

    @property
    def text(self) -> str:
        self._text += self._capture.readouterr().err
        return self._text

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Lines]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield Lines(capsys)
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


def test_json_has_one_object_per_line(lines: Lines) -> None:
    configure_logging(LogConfig(format="json"))
    structlog.get_logger("mine").info("picked", worker="vllm-0", overlap=3)
    logging.getLogger("theirs").warning("odd %s", "thing")
    mine, theirs = lines.records
    assert mine.pop("timestamp").endswith("Z")
    assert mine == {"event": "picked", "worker": "vllm-0", "overlap": 3, "level": "info", "logger": "mine"}
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("odd thing", "warning", "theirs")


@pytest.mark.parametrize(("level", "seen"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_level_counts_for_our_logs_and_for_libraries(lines: Lines, level: str, seen: int) -> None:
    configure_logging(LogConfig(format="json", level=level))
    for log in (structlog.get_logger("mine"), logging.getLogger("theirs")):
        log.debug("1")
        log.info("2")
        log.warning("3")
        log.error("4")
    assert len(lines.records) == 2 * seen


def test_configuring_again_replaces(lines: Lines) -> None:
    log = structlog.get_logger("mine")
    configure_logging(LogConfig(format="console"))
    configure_logging(LogConfig(format="json", level="error"))
    log.info("no")
    log.error("yes")
    assert [record["event"] for record in lines.records] == ["yes"]


def test_auto_is_json_unless_on_a_terminal(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    configure_logging(LogConfig())
    structlog.get_logger("mine").info("hello")
    assert lines.records[0]["event"] == "hello"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    configure_logging(LogConfig())
    structlog.get_logger("mine").info("hello")
    assert "\x1b[" in lines.text


async def test_request_id_follows_its_task_only(lines: Lines) -> None:
    configure_logging(LogConfig(format="json"))
    log = structlog.get_logger("mine")
    both_inside = asyncio.Barrier(2)

    async def handle(request_id: str) -> None:
        with bound(request_id):
            await both_inside.wait()
            log.info("from a request", said=request_id)
            logging.getLogger("theirs").info("from a library")

    async with asyncio.TaskGroup() as group:
        group.create_task(handle("r-1"))
        group.create_task(handle("r-2"))
    log.info("outside")
    *inside, outside = lines.records
    assert {(r["said"], r["request_id"]) for r in inside if "said" in r} == {("r-1", "r-1"), ("r-2", "r-2")}
    assert {r["request_id"] for r in inside if r["logger"] == "theirs"} == {"r-1", "r-2"}
    assert "request_id" not in outside


def _break(prompt: str) -> None:
    """Fail while a local variable holds content: tracebacks with locals would show it."""
    if prompt:
        raise RuntimeError("broken")


@pytest.mark.parametrize("form", ["json", "console"])
def test_content_is_never_written(lines: Lines, form: str) -> None:
    configure_logging(LogConfig(format=form, level="debug"))
    canary = "canary-3141592653"  # longer than any number of a time stamp
    log = structlog.get_logger("mine")
    for key in sorted(CONTENT):
        log.info("said", **{key: canary})
        log.info("said", **{key: [canary]})
    log.info("said", body=canary.encode(), ids=array("I", [3141592653]))
    try:
        _break(canary)
    except RuntimeError:
        log.exception("failed")
        logging.getLogger("theirs").exception("failed")
    assert canary.partition("-")[2] not in lines.text
    assert f"<{len(canary)} hidden>" in lines.text
    assert lines.text.count("RuntimeError: broken") == 2


def test_long_texts_are_cut(lines: Lines) -> None:
    configure_logging(LogConfig(format="json"))
    structlog.get_logger("mine").info("said", error="x" * (MAX_TEXT + 1))
    assert lines.records[0]["error"] == "x" * MAX_TEXT + f"... ({MAX_TEXT + 1} characters)"


def test_a_line_break_from_outside_stays_one_line(lines: Lines) -> None:
    configure_logging(LogConfig(format="json"))
    structlog.get_logger("mine").info("said", error='x\n{"event": "forged"}')
    assert len(lines.records) == 1


def test_warnings_are_logged(lines: Lines) -> None:
    configure_logging(LogConfig(format="json"))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn("look here", stacklevel=1)
    assert "look here" in str(lines.records[0]["event"])
