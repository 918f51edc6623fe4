"""Snapshots in a directory, one file per endpoint. A file is always whole: it is written beside and then renamed."""

import asyncio
import os
import re
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".kvsnapshot"

MOST_BYTES = 16 << 30
"""Largest file that is read: about 10^9 cached blocks."""


class SnapshotDirectory:
    """Writes and reads files without blocking the event loop.

    Args:
        path: The directory; it is made when it is missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def file(self, endpoint: str) -> Path:
        """Where the snapshot of an endpoint lies."""
        return self._path / (re.sub(r"[^A-Za-z0-9_.-]", "_", endpoint) + SUFFIX)

    async def read(self, endpoint: str) -> bytes | None:
        """The bytes of a snapshot; None when there is none.

        Raises:
            OSError: It cannot be read, or is larger than any snapshot would be.
        """
        return await asyncio.to_thread(_read, self.file(endpoint))

    async def write(self, endpoint: str, pieces: AsyncIterator[bytes]) -> int:
        """Replace the snapshot of an endpoint; returns its size.

        Raises:
            OSError: It cannot be written. The one before stays.
        """
        draft = _Draft(self.file(endpoint))
        size = 0
        try:
            await _in_thread(draft.open)
            async for piece in pieces:
                await _in_thread(draft.write, piece)
                size += len(piece)
            await _in_thread(draft.publish)
        finally:
            await _in_thread(draft.close)
        return size


async def _in_thread(function: Callable[..., None], *arguments: object) -> None:
    """Call what may block. A cancellation waits for its end, so that nothing goes on behind the caller's back."""
    future = asyncio.get_running_loop().run_in_executor(None, function, *arguments)
    try:
        await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        raise


class _Draft:
    """A file that takes the place of another one when it is complete, or leaves no trace."""

    def __init__(self, final: Path) -> None:
        self._final = final
        # Replicas may share the directory, and in containers all of them are process 1.
        self._path = final.with_name(f".{final.name}.{socket.gethostname()}.{os.getpid()}")
        self._file: BinaryIO | None = None

    def open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # What is cached is nobody else's business.
        self._file = os.fdopen(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")

    def write(self, piece: bytes) -> None:
        assert self._file is not None  # noqa: S101  # opened before
        self._file.write(piece)

    def publish(self) -> None:
        assert self._file is not None  # noqa: S101  # opened before
        self._file.flush()
        os.fsync(self._file.fileno())
        self._path.replace(self._final)
        directory = os.open(self._final.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # else a power cut may bring the old one back
        finally:
            os.close(directory)

    def close(self) -> None:
        if self._file is not None:
            self._path.unlink(missing_ok=True)  # when it was not published
            self._file.close()


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(data) > MOST_BYTES:
        raise OSError(f"{path} is larger than any snapshot")
    return data
