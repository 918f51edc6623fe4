"""Server-sent events: bytes as they arrive in, complete event payloads out."""

from collections.abc import Iterator

_CR, _LF = b"\r"[0], b"\n"[0]


class EventTooLargeError(ValueError):
    """An event, or one line of the stream, is longer than allowed."""


class SseParser:
    """Incremental parser of a `text/event-stream` body; pure, the same for every way of cutting the bytes up.

    Follows the HTML standard, section 9.2.6 "Interpreting an event stream": lines end with LF, CRLF or CR,
    several `data` lines of one event are joined with LF, an event ends at an empty line, comments and other
    fields are passed over, and an event that the end of the stream cuts off is dropped. A byte order mark is
    not expected.

    At most two times `max_event_bytes` are held between two calls.

    Args:
        max_event_bytes: Largest payload, and largest single line, in bytes.
    """

    __slots__ = ("_after_cr", "_data", "_limit", "_size", "_tail")

    def __init__(self, max_event_bytes: int) -> None:
        self._limit = max_event_bytes
        self._tail = bytearray()  # an unfinished line
        self._after_cr = False  # an LF that comes next belongs to the CR before it
        self._data: list[bytes] = []  # data lines of the unfinished event
        self._size = 0  # bytes of `_data`, line ends counted

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the payload of every event that `data` completes.

        Run the iterator to its end before feeding again, or drop the parser.

        Raises:
            EventTooLargeError: The stream breaks the size limit; the events before were yielded.
        """
        if self._after_cr and data:
            self._after_cr = False
            if data[0] == _LF:
                data = data[1:]
        if not data:
            return
        self._after_cr = data[-1] == _CR
        lines = data.splitlines()
        rest = b"" if data[-1] in (_CR, _LF) else lines.pop()
        if self._tail and lines:
            lines[0] = bytes(self._tail) + lines[0]
            self._tail.clear()
        for line in lines:
            if len(line) > self._limit:
                raise EventTooLargeError
            if not line:
                if self._data:
                    payload = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
                    self._data.clear()
                    self._size = 0
                    yield payload
            elif line.startswith(b"data:"):
                self._add(line[6:] if line.startswith(b" ", 5) else line[5:])
            elif line == b"data":
                self._add(b"")
        self._tail += rest
        if len(self._tail) > self._limit:
            raise EventTooLargeError

    def _add(self, value: bytes) -> None:
        self._size += len(value) + 1
        if self._size > self._limit + 1:  # the last line end is not part of the payload
            raise EventTooLargeError
        self._data.append(value)
