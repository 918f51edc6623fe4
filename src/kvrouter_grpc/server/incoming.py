"""Requests as they come in: deserializers that do not raise.

What a deserializer raises ends the call with INTERNAL before any handler could stop it, so bytes that are no message
become an object like any other, which the handlers refuse.
"""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

from kvrouter_grpc.core import TokenIds, entries, split
from kvrouter_grpc.errors import InvalidRequestError

M = TypeVar("M", bound=Message)
R = TypeVar("R")


class Unreadable:
    """Stands for a request that is no message of the rpc's type."""


_UNREADABLE = Unreadable()


class Asked(NamedTuple, Generic[M]):
    """A request with a prompt: the token ids as they lie in the bytes that came, and the message without them."""

    message: M
    token_ids: TokenIds


class Batch(NamedTuple):
    """Requests that came together, as bytes: where the first so many lie in `data`, and how many there were."""

    data: bytes
    spans: list[tuple[int, int]]
    total: int


def reader(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """The deserializer of messages that are read as a whole."""

    def read(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return _UNREADABLE

    return read


class AskedReader(Generic[M]):
    """The deserializer of a message whose field 1 is the prompt's token ids.

    Args:
        kind: The message.
    """

    def __init__(self, kind: type[M]) -> None:
        self._parse = kind.FromString
        self._nothing = kind()  # shared by all requests with nothing but token ids: requests are only read

    def __call__(self, data: bytes, start: int = 0, stop: int = -1) -> Asked[M] | Unreadable:
        """Read the message that lies in `data` from `start` to `stop` (-1: to its end)."""
        parts = split(data, start, stop)
        if parts is None:
            return _UNREADABLE
        token_ids, rest = parts
        try:
            return Asked(self._parse(rest) if rest else self._nothing, token_ids)
        except DecodeError:
            return _UNREADABLE


def batch_reader(most: int) -> Callable[[bytes], Batch | Unreadable]:
    """The deserializer of a message whose field 1 is repeated and holds requests; finds the first `most`."""

    def read(data: bytes) -> Batch | Unreadable:
        found = entries(data, most)
        return _UNREADABLE if found is None else Batch(data, *found)

    return read


def readable(request: R | Unreadable) -> R:
    """The request itself, unless it could not be read.

    Raises:
        InvalidRequestError: It is no message of the rpc's type.
    """
    if isinstance(request, Unreadable):
        raise InvalidRequestError([("", "the message is not of the rpc's request type; is the client's contract old?")])
    return request
