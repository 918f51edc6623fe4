"""Writes the decisions of all endpoints to a file, beside the decisions that are taken meanwhile."""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import structlog

from kvrouter_grpc.config import DecisionsConfig
from kvrouter_grpc.decisions.line import DecisionLine, LostLine, SettingsLine
from kvrouter_grpc.routing.router import Router

LOOK_S = 0.05
"""Between two looks for new decisions."""

SLICE_S = 0.001
"""How long decisions become lines before others get their turn."""

AT_ONCE = 16
"""Decisions between two looks at the clock."""

REST_S = 10.0
"""After a failure to write, before the next attempt."""

log = structlog.get_logger(__name__)


class DecisionWriter:
    """Follows the logs of the routers. What is overwritten there before it was written is counted, not waited for.

    Args:
        routers: Endpoint to router.
        config: Whether to write, where to, and how much.
    """

    def __init__(self, routers: Mapping[str, Router], config: DecisionsConfig) -> None:
        self._routers = routers
        self._file = DecisionFile(config.log_file, config.log_file_bytes) if config.log_file is not None else None
        self._encode = msgspec.json.Encoder().encode
        self._next = dict.fromkeys(routers, 0)  # number of the first decision that is not written
        self._begun = False  # whether the present file has the settings
        self._lost = 0
        self._writing = asyncio.Lock()

    async def run(self) -> None:
        """Write what there is, again and again, until cancelled. Returns at once when there is no file."""
        while self._file is not None:  # noqa: ASYNC110 - decisions must not cost the setting of an event
            await asyncio.sleep(LOOK_S if await self.flush() else REST_S)

    async def flush(self) -> bool:
        """Write all that is not written yet. False: it failed, which was logged, and what was tried is lost."""
        if self._file is None:
            return True
        async with self._writing:
            pieces = await self._lines()
            if not pieces:
                return True
            data = b"".join(pieces)
            if not self._begun:
                data = self._settings() + data
            try:
                full = await asyncio.to_thread(self._file.append, data)
            except OSError as error:
                log.warning("decisions not written", file=str(self._file.path), detail=str(error))
                self._begun = False
                return False
            self._begun = not full
            return True

    async def _lines(self) -> list[bytes]:
        """The lines of all decisions up to now."""
        pieces: list[bytes] = []
        turn_ends = time.monotonic() + SLICE_S
        for endpoint, router in self._routers.items():
            if router.log is None:
                continue
            last = router.log.count
            while (wanted := self._next[endpoint]) < last:
                first, recordings = router.log.since(wanted, min(AT_ONCE, last - wanted))
                if first > wanted:
                    self._lost += first - wanted
                    pieces.append(self._line(LostLine(endpoint, first - wanted)))
                    log.warning("decisions not written", endpoint=endpoint, lost=first - wanted, lost_in_all=self._lost)
                pieces += [self._line(DecisionLine.of(endpoint, recording)) for recording in recordings]
                self._next[endpoint] = first + len(recordings)
                if time.monotonic() > turn_ends:
                    await asyncio.sleep(0)
                    turn_ends = time.monotonic() + SLICE_S
        return pieces

    def _settings(self) -> bytes:
        lines = (SettingsLine.of(endpoint, router.config) for endpoint, router in self._routers.items())
        return b"".join(map(self._line, lines))

    def _line(self, line: SettingsLine | DecisionLine | LostLine) -> bytes:
        return self._encode(line) + b"\n"


class DecisionFile:
    """A file that is appended to and, when it is full, put aside for another one. Blocking.

    Args:
        path: The file. `path.1` is the one before.
        most_bytes: Size at which it is put aside.
    """

    def __init__(self, path: Path, most_bytes: int) -> None:
        self.path = path
        self._most_bytes = most_bytes

    def append(self, lines: bytes) -> bool:
        """Add whole lines; returns whether the next ones go to a new file.

        Raises:
            OSError: It cannot be written.
        """
        with self.path.open("a+b") as file:
            size = file.seek(0, 2)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # whoever wrote last was ended in the middle of a line
                    lines = b"\n" + lines
            file.write(lines)
        if size + len(lines) < self._most_bytes:
            return False
        self.path.replace(self.path.with_name(self.path.name + ".1"))
        return True
