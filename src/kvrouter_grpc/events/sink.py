"""What the event plane tells of a stream, and to whom."""

from typing import Protocol

from kvrouter_grpc.core import KvFeed
from kvrouter_grpc.routing.stream import StreamStatus
from kvrouter_grpc.types import Target


class KvSink(Protocol):
    """Where batches go: the index of an endpoint."""

    def feed(self, target: Target) -> KvFeed:
        """What applies the batches of the target's stream; they come in order."""

    def cleared(self, target: Target) -> None:
        """The feed has read that the engine dropped its whole cache."""

    def clear(self, target: Target) -> None:
        """Forget what the target holds."""

    def stream(self, target: Target) -> StreamStatus:
        """The target's status, which the subscriber keeps true."""

    def doubt(self, target: Target) -> None:
        """Events of the target are lost for good."""

    def renewed(self, target: Target) -> bool:
        """Whether what they did has no effect any more."""

    def refresh(self, target: Target) -> None:
        """The status has been brought up to date."""
