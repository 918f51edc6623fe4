from typing import Any, final

import zmq

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

    @property
    def socket(self) -> zmq.Socket[Any]:
        """The socket."""

    @property
    def drained(self) -> bool:
        """Whether the last `receive` left nothing behind; only then the socket's descriptor signals arrivals."""
