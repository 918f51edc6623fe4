"""Requests as they come in: deserializers that do not raise.

What a deserializer raises ends the call with INTERNAL before any handler could stop it, so bytes that are no message
become an object like any other, which the handlers refuse.
"""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

from kvrouter_grpc.core import TokenIds, split, split_batch
from kvrouter_grpc.errors import InvalidRequestError

M = TypeVar("M", bound=Message)
R = TypeVar("R")


PLAIN = ("endpoint", "model", "request_id")
"""Fields beside the token ids that nearly every request has, and few have others."""


class Unreadable:
    """Stands for a request that is no message of the rpc's type."""


_UNREADABLE = Unreadable()


class Asked(NamedTuple, Generic[M]):
    """A request with a prompt: the token ids as they lie in the bytes that came, and the message without them."""

    message: M
    token_ids: TokenIds
    plain: bool  # no field came but those of `PLAIN`


class Batch(NamedTuple, Generic[M]):
    """Requests that came together: the first so many, and how many there were."""

    requests: "list[Asked[M] | Unreadable]"
    total: int


def reader(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """The deserializer of messages that are read as a whole."""

    def read(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return _UNREADABLE

    return read


def asked_reader(kind: type[M]) -> Callable[[bytes], Asked[M] | Unreadable]:
    """The deserializer of a message whose field 1 is the prompt's token ids."""
    asked = _asker(kind)

    def read(data: bytes) -> Asked[M] | Unreadable:
        return asked(split(data))

    return read


def batch_reader(kind: type[M], most: int) -> Callable[[bytes], Batch[M] | Unreadable]:
    """The deserializer of a message whose field 1 is repeated and holds such messages; reads the first `most`."""
    asked = _asker(kind)

    def read(data: bytes) -> Batch[M] | Unreadable:
        parts = split_batch(data, most)
        if parts is None:
            return _UNREADABLE
        requests, total = parts
        return Batch([asked(request) for request in requests], total)

    return read


def _asker(kind: type[M]) -> Callable[[tuple[TokenIds, bytes, int] | None], Asked[M] | Unreadable]:
    """What makes requests of the parts that `split` gives."""
    numbers = kind.DESCRIPTOR.fields_by_name
    beyond_plain = ~sum(1 << numbers[name].number for name in PLAIN if name in numbers)
    nothing = kind()  # shared by all requests with nothing but token ids: requests are only read

    def asked(parts: tuple[TokenIds, bytes, int] | None) -> Asked[M] | Unreadable:
        if parts is None:
            return _UNREADABLE
        token_ids, rest, fields = parts
        try:
            message = kind.FromString(rest) if rest else nothing
        except DecodeError:
            return _UNREADABLE
        return Asked(message, token_ids, not fields & beyond_plain)

    return asked


def readable(request: R | Unreadable) -> R:
    """The request itself, unless it could not be read.

    Raises:
        InvalidRequestError: It is no message of the rpc's type.
    """
    if isinstance(request, Unreadable):
        raise InvalidRequestError([("", "the message is not of the rpc's request type; is the client's contract old?")])
    return request
