"""How true the router's picture of one rank's cache is."""

from dataclasses import dataclass

from kvrouter_grpc.types import StreamState

PREDICTED_FRESHNESS = 0.9
"""Trust in what is only predicted: the chance that a block which is counted is there. Below 1, so that of two workers
with the same overlap the one whose engine vouches for it is taken; not far below, since a router that sees all traffic
of its workers errs about evictions only, and a lower number would send sessions away from their caches."""


@dataclass(slots=True)
class StreamStatus:
    """The state of one (worker, dp rank) event stream, kept true by its subscriber and read by everyone else."""

    state: StreamState = StreamState.COLD
    last_seq: int = -1  # last sequence number applied; -1 before the first
    batches: int = 0  # messages applied since the router started
    gaps: int = 0  # times a sequence number was missing
    missed: int = 0  # messages that were lost and not recovered
    replays: int = 0  # replays asked for
    restarts: int = 0  # times the engine was seen to have restarted
    decode_failures: int = 0  # messages that could not be read
    skipped: int = 0  # events of unknown kind or broken shape
    partial: bool = False  # the start of the stream is unknown: blocks cached before it are not seen
    last_event_at: float = 0.0  # monotonic seconds; 0 before the first
    detail: str = ""  # one sentence for the operator when not LIVE

    @property
    def freshness(self) -> float:
        """Trust in this rank's overlap, 0 (none) to 1 (every event since the start was applied)."""
        if self.state is StreamState.LIVE:
            return 1.0
        if self.state is StreamState.PREDICTED:
            return PREDICTED_FRESHNESS
        if self.state in (StreamState.STALE, StreamState.SYNCING) and self.batches:
            return 0.5
        return 0.0
