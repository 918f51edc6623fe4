"""How true the router's picture of one rank's cache is: the state of its event stream, and one number made of it."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from kvrouter_grpc.types import StreamState

PREDICTED_FRESHNESS = 0.9
"""Trust in what is only predicted: the chance that a block which is counted is there. Below 1, so that of two workers
with the same overlap the one whose engine vouches for it is taken; not far below, since a router that sees all traffic
of its workers errs about evictions only, and a lower number would send sessions away from their caches."""

LOST_WEIGHT = 16
"""How many batches that were taken make up for one that was lost: it may have removed more than they stored."""

PARTIAL = 0.9
"""Coverage while what was cached before the first batch is unknown: what is known holds, but is only the least."""

DOUBTED = 0.5
"""Lag while nothing has proved yet that it is still the same process: a connection drops when an engine restarts."""

HALF_LIFE_S = 10.0
"""Time in which trust halves while batches are missing or the connection is down."""

ECHO_S = 2.0
"""Time after its first token within which a prompt's blocks should have been announced: they are stored before it."""

SILENT_PROMPTS = 2
"""Prompts without an echo that halve the trust."""

ORPHANS_SHARE = 0.25
"""Trust lost when all blocks wait for their parents: they are there, only not to be found."""

UNREAD_SHARE = 0.5
"""Trust lost when there are no events but such that cannot be read; few engines write none that are new to a router."""

LEAST = 1 / 64
"""Below this nothing is left to trust: the decision goes by load alone."""

MOST_PROMPTS = 64
"""Prompts remembered while no event comes; after this many nothing is trusted anyway."""


class Evidence(NamedTuple):
    """What speaks for and against a picture. The defaults are those of a stream in order."""

    heard: bool = True  # the publisher said anything at all
    predicted: bool = False  # there is no publisher: the picture is made of what this router sent there
    known: int = 0  # batches that the picture is made of
    lost: int = 0  # batches given up since it was begun
    partial: bool = False  # batches before its first one are unknown
    behind: int = 0  # batches that were published and are not applied yet: missing, or held back behind one that is
    doubted: bool = False  # the connection is down, or was, and nothing has proved that it is the same process
    unsettled_s: float = 0.0  # for how long batches have been missing or the connection down
    silent_prompts: int = 0  # computed there, and no event has come since
    blocks: int = 0  # in the picture
    orphans: int = 0  # stored by the engine, but where is unknown
    unread: int = 0  # events of unknown kind or broken shape among `known`
    accuracy: float = 1.0  # share of the overlap foretold that the engine found, 0..1


class Freshness(NamedTuple):
    """Trust in a picture, 0 (none) to 1 (nothing speaks against it), and the parts that it is the product of."""

    value: float
    coverage: float = 1.0  # of the history
    lag: float = 1.0  # behind the engine
    silence: float = 1.0  # where events were due
    orphans: float = 1.0  # blocks that cannot be placed
    reading: float = 1.0  # events that could not be read
    accuracy: float = 1.0  # of what was foretold


def freshness(seen: Evidence) -> Freshness:
    """Trust in the overlap of one rank, for the cost to discount it by.

    What makes the picture claim blocks that are gone counts by how much of it that may be: lost batches and batches
    still to come against those taken, the time that passes meanwhile, prompts that were computed there without any
    event, and what engines found less than foretold. What only hides blocks costs little, for the overlap seen is then
    still true: an unknown start, orphans. Each part is in [0, 1], 1 in a stream in order, and falls as its evidence
    grows; all else being equal, so does the product. It is 0 when nothing was heard, and below `LEAST`.
    """
    if not seen.heard:
        return Freshness(0.0)
    coverage = _share(seen.known, LOST_WEIGHT * seen.lost)
    coverage *= (PARTIAL if seen.partial else 1.0) * (PREDICTED_FRESHNESS if seen.predicted else 1.0)
    lag = (
        _share(seen.known, seen.behind) * 2.0 ** -(seen.unsettled_s / HALF_LIFE_S) * (DOUBTED if seen.doubted else 1.0)
    )
    silence = 2.0 ** -(seen.silent_prompts / SILENT_PROMPTS)
    orphans = 1.0 - ORPHANS_SHARE * (1.0 - _share(seen.blocks, seen.orphans))
    reading = 1.0 - UNREAD_SHARE * (1.0 - _share(seen.known, seen.unread))
    value = coverage * lag * silence * orphans * reading * seen.accuracy
    return Freshness(value if value >= LEAST else 0.0, coverage, lag, silence, orphans, reading, seen.accuracy)


def _share(good: int, bad: int) -> float:
    """Share of `good`; 1 when there is nothing bad."""
    return good / (good + bad) if bad else 1.0


class PromptWatch:
    """Prompts that should have been heard of: each stores blocks, and the engine says so before its first token.

    Silence without traffic is normal and counts nothing; silence while prompts are computed does not.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[float, float]] = deque(maxlen=MOST_PROMPTS)  # when booked, and when it is overdue

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def computed(self, booked_at: float, now: float) -> None:
        """A prompt with blocks that were not cached has its first token."""
        self._waiting.append((booked_at, now + ECHO_S))

    def excuse(self, booked_at: float) -> None:
        """The prompt booked then was cached after all: there was nothing to announce."""
        self._waiting = deque((prompt for prompt in self._waiting if prompt[0] != booked_at), MOST_PROMPTS)

    def silent(self, heard_at: float, now: float) -> int:
        """How many have waited in vain.

        Args:
            heard_at: When the last event came. It need not have been theirs: it shows that events do come.
            now: The present, of the same clock.
        """
        if not self._waiting:
            return 0
        waiting = [prompt for prompt in self._waiting if prompt[0] > heard_at]
        if len(waiting) < len(self._waiting):
            self._waiting = deque(waiting, MOST_PROMPTS)
        return sum(due <= now for _, due in waiting)

    def clear(self) -> None:
        """Another picture is begun."""
        self._waiting.clear()


class StreamPosition(NamedTuple):
    """Where a stream stands, as far as it can be taken up again by another process of the router."""

    next_seq: int  # number of the batch to be applied next, at least 1
    content: int  # hash of the one before it: its copy proves that the publisher is still the same
    known: int = 1  # batches that the picture is made of
    partial: bool = False  # see `StreamStatus`
    lost: int = 0  # batches given up: blocks may be indexed that the engine has removed since


def _nowhere() -> None:
    return None


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
    resyncs: int = 0  # times the picture was doubted and its history asked for because it had foretold wrongly
    decode_failures: int = 0  # messages that could not be read
    skipped: int = 0  # events of unknown kind or broken shape
    partial: bool = False  # the start of the stream is unknown: blocks cached before it are not seen
    known: int = 0  # batches taken since the picture was begun: at first, after a restart, after a resync
    lost: int = 0  # batches given up since then
    behind: int = 0  # batches that are known to be published and are not applied
    unread: int = 0  # events skipped since then
    doubted: bool = False  # nothing has proved yet that it is still the same process
    settled: bool = False  # what was cached before is here, or is not to be had: more only comes with further events
    unsettled_at: float | None = None  # monotonic seconds since when it is SYNCING; None while it is not
    last_event_at: float = 0.0  # monotonic seconds; 0 before the first
    resume_at: StreamPosition | None = None  # where the picture stood that the rank was given; None: it begins cold
    position: Callable[[], StreamPosition | None] = _nowhere  # where it stands now; None: it cannot be taken up again
    detail: str = ""  # one sentence for the operator when not LIVE
    unjudged: str = ""  # one about KV cache groups whose part in prefix hits is not known
    prompts: PromptWatch = field(default_factory=PromptWatch)

    @property
    def in_order(self) -> bool:
        """Whether nothing in the stream itself speaks against its picture, nor will while nothing happens."""
        return self.state is StreamState.LIVE and not (
            self.lost or self.partial or self.behind or self.unread or self.doubted or self.prompts
        )

    def evidence(self, now: float, *, blocks: int, orphans: int, accuracy: float) -> Evidence:
        """What `freshness` judges by.

        Args:
            now: Monotonic seconds.
            blocks: That the rank is known to hold.
            orphans: Blocks that wait for their parent.
            accuracy: See `Evidence`.
        """
        predicted = self.state is StreamState.PREDICTED
        return Evidence(
            heard=self.state not in (StreamState.COLD, StreamState.OFF),
            predicted=predicted,
            known=self.known,
            lost=self.lost,
            partial=self.partial,
            behind=self.behind,
            doubted=self.doubted,
            unsettled_s=max(0.0, now - self.unsettled_at) if self.unsettled_at is not None else 0.0,
            silent_prompts=0 if predicted else self.prompts.silent(self.last_event_at, now),
            blocks=blocks,
            orphans=orphans,
            unread=self.unread,
            accuracy=accuracy,
        )

    def told(self, seen: Evidence) -> str:
        """One sentence for the operator, "" when there is nothing to say."""
        if seen.silent_prompts and self.state in (StreamState.COLD, StreamState.LIVE):
            return (
                f"no event has told of the blocks of prompts that were computed there ({seen.silent_prompts}): are KV "
                "events enabled, and is this their address and topic?"
            )
        if self.detail:
            return self.detail
        if seen.unread:
            return f"events that could not be read ({seen.unread}): they are newer than this router, or broken"
        return self.unjudged
