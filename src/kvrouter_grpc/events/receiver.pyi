from typing import Any, final

import zmq

from kvrouter_grpc.core import KvFeed
from kvrouter_grpc.events.batch_log import BatchLog

@final
class Delivery:
    """What one `Receiver.deliver` found and did."""

    @property
    def batches(self) -> int:
        """Batches taken in order; the last of them could not be read when there is a `fault`."""

    @property
    def skipped(self) -> int:
        """Their events that were left out one by one."""

    @property
    def cleared(self) -> bool:
        """Whether the engine dropped its whole cache in one of them."""

    @property
    def fault(self) -> str:
        """Why the last of them could not be read, "" when it could."""

    @property
    def left(self) -> list[tuple[int, bytes]]:
        """Number and payload of what came after them: still to be considered."""

    @property
    def misshapen(self) -> int:
        """Messages that were not the three frames [topic, sequence number, payload]."""

    @property
    def changes(self) -> list[list[bytes]]:
        """What the monitor reported; to be considered before what is left."""

@final
class Receiver:
    """Reads a socket without waiting.

    Args:
        socket: The socket. It may be closed at any time.
    """

    def __new__(cls, socket: zmq.Socket[Any]) -> Receiver: ...
    def receive(self, limit: int) -> list[list[bytes]]:
        """Take whole messages, each a list of its frames; of those with more than eight frames the first eight.

        Args:
            limit: Most messages. Fewer come when there are no more, or when they already have 1 MiB together.

        Raises:
            zmq.ZMQError: The socket is closed or its context is terminated.
        """

    def deliver(self, monitor: Receiver, log: BatchLog, feed: KvFeed, in_order: bool) -> Delivery:
        """Take up to 64 event messages, and apply those that are in order from where they lie.

        Args:
            monitor: Of this socket's monitor. Nothing is applied when it has something to tell.
            log: Where the stream stands; the batches applied are noted there.
            feed: What they are applied to.
            in_order: False: apply nothing.

        Raises:
            zmq.ZMQError: The socket is closed or its context is terminated.
        """

    @property
    def socket(self) -> zmq.Socket[Any]:
        """The socket."""

    @property
    def drained(self) -> bool:
        """Whether the last call left nothing behind; only then the socket's descriptor signals arrivals."""
