"""Just enough HTTP/2 (RFC 9113) to misbehave on purpose: frames are written by hand, nothing is obeyed."""

import asyncio
import struct
from typing import NamedTuple, Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK = END_STREAM = 0x1
END_HEADERS = 0x4
INITIAL_WINDOW_SIZE = 4
CANCEL = 8


class Frame(NamedTuple):
    """What the server sent."""

    kind: int
    flags: int
    stream: int
    payload: bytes


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Encode one frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def headers(path: str) -> bytes:
    """The header block of a gRPC call: literals without indexing, which need no state."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    block = b""
    for name, value in fields.items():
        block += b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
    return block


def message(payload: bytes) -> bytes:
    """One uncompressed gRPC message."""
    return b"\x00" + struct.pack(">I", len(payload)) + payload


class RawConnection:
    """A connection whose every frame the test chooses."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._next_stream = 1

    @classmethod
    async def open(cls, address: str, settings: dict[int, int] | None = None) -> Self:
        """Connect and send the preface."""
        host, _, port = address.rpartition(":")
        connection = cls(*await asyncio.open_connection(host, int(port)))
        payload = b"".join(struct.pack(">HI", *item) for item in (settings or {}).items())
        connection.writer.write(PREFACE + frame(SETTINGS, 0, 0, payload) + frame(SETTINGS, ACK, 0))
        await connection.writer.drain()
        return connection

    def call(self, path: str, payload: bytes) -> int:
        """Start a call with one message; returns its stream."""
        stream = self.headers(path)
        self.writer.write(frame(DATA, END_STREAM, stream, message(payload)))
        return stream

    def headers(self, path: str) -> int:
        """Start a call and send no message."""
        stream = self._next_stream
        self._next_stream += 2
        self.writer.write(frame(HEADERS, END_HEADERS, stream, headers(path)))
        return stream

    def reset(self, stream: int) -> None:
        """Cancel a call."""
        self.writer.write(frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL)))

    async def read(self) -> Frame:
        """Read one frame.

        Raises:
            asyncio.IncompleteReadError: The connection was closed.
        """
        head = await self.reader.readexactly(9)
        kind, flags, stream = struct.unpack(">BBI", head[3:])
        payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
        if kind == PING and not flags & ACK:
            self.writer.write(frame(PING, ACK, 0, payload))
        return Frame(kind, flags, stream & 0x7FFFFFFF, payload)

    async def read_until(self, kind: int, stream: int) -> Frame:
        """Read until such a frame comes."""
        while True:
            got = await self.read()
            if (got.kind, got.stream) == (kind, stream):
                return got

    def abort(self) -> None:
        """Drop the connection."""
        self.writer.transport.abort()
