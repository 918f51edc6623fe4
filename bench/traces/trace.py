"""Requests with the structure of their prefixes, and how a trace becomes a load.

A trace names the blocks of a prompt by chained ids: equal ids mean equal text and equal text before it. Consecutive
blocks that every prompt has all of, or none, are one `Segment`: they are computed, used and evicted together, so an
engine's cache need not look at single blocks. A prompt is a path of segments from the root of the tree they form.
"""

import random
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.traces.rows import Row


@dataclass(slots=True, eq=False)
class Segment:
    """Consecutive blocks that always come together.

    Attributes:
        parent: The segment before it, None at the root.
        ids: Of its blocks.
        shared: Whether prompts of several sessions have it.
    """

    parent: "Segment | None"
    ids: "array[int]"
    shared: bool = False

    def __len__(self) -> int:
        """Blocks."""
        return len(self.ids)


Path = tuple[Segment, ...]


@dataclass(slots=True, eq=False)
class Request:
    """One request.

    Attributes:
        arrival: Seconds from the start; of a turn that waits for the one before it, when that one began at the latest.
        prompt_tokens: Tokens of the prompt.
        output_tokens: Tokens of the answer, at least 1.
        path: The prompt's full blocks.
        session: Conversation, None for single requests.
        delay: Seconds between the end of the turn before and this request; None: it is sent at `arrival`.
        answer: The full blocks that the answer adds, where the next turn's prompt goes on with it.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    path: Path
    session: int | None = None
    delay: float | None = None
    answer: Path = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests by arrival, and the size of their blocks in tokens."""

    name: str
    block_size: int
    requests: tuple[Request, ...]

    def __len__(self) -> int:
        return len(self.requests)

    def faster(self, factor: float) -> "Trace":
        """The same requests, `factor` times as many per second. Delays within sessions are people's and stay."""
        requests = tuple(replace(request, arrival=request.arrival / factor) for request in self.requests)
        return replace(self, requests=requests)

    def first(self, count: int) -> "Trace":
        """The requests that come first."""
        return replace(self, requests=self.requests[:count])

    def copies(self, count: int, seed: int = 1) -> "Trace":
        """As many times the users: each copy is shifted in time, and its private blocks are other ones.

        What several sessions share (tools, system prompts) is shared by the copies too. The shift wraps around, so
        that the load stays level.
        """
        if count <= 1:
            return self
        rng = random.Random(f"copies {self.name} {seed}")
        starts = [request.arrival for request in self.requests if request.delay is None]
        span = max(starts) * len(starts) / max(1, len(starts) - 1)
        stride = 1 + max((segment.ids[-1] for request in self.requests for segment in request.path[-1:]), default=0)
        sessions = 1 + max((request.session or 0) for request in self.requests)
        requests = list(self.requests)
        for number in range(1, count):
            clones: dict[Segment, Segment] = {}
            shift = rng.uniform(0, span)
            moved: dict[int | None, float] = {}
            for request in self.requests:
                session = None if request.session is None else request.session + number * sessions
                if session is None or session not in moved:
                    moved[session] = (request.arrival + shift) % span - request.arrival
                requests.append(
                    replace(
                        request,
                        arrival=request.arrival + moved[session],
                        path=tuple(_clone(segment, clones, number * stride) for segment in request.path),
                        answer=tuple(_clone(segment, clones, number * stride) for segment in request.answer),
                        session=session,
                    )
                )
        requests.sort(key=lambda request: request.arrival)
        return replace(self, requests=tuple(requests))


def _clone(segment: Segment, clones: dict[Segment, Segment], offset: int) -> Segment:
    """The copy of a segment, whose parent has its copy already; shared ones are their own."""
    if segment.shared:
        return segment
    clone = clones.get(segment)
    if clone is None:
        parent = clones.get(segment.parent, segment.parent) if segment.parent else None
        clone = clones[segment] = Segment(parent, array("I", [block + offset for block in segment.ids]))
    return clone


# --- building --------------------------------------------------------------------------------------------------------


def build(name: str, block_size: int, rows: Sequence[Row]) -> Trace:
    """A trace from rows in the order in which their blocks are numbered."""
    answers = list(_answers(rows, block_size))
    cuts = _cuts(rows, [end for _, _, end in answers])
    ended: dict[int, Path] = {-1: ()}  # by block: the path that ends with it
    users: dict[int, int] = {}  # by last block of a prompt: its session, or `SEVERAL`
    requests = []
    first = 0
    for number, row in enumerate(rows):
        path = ended[row.after]
        start = first
        first += row.new
        for end in cuts[bisect_left(cuts, start) : bisect_left(cuts, first)]:
            path = ended[end] = (*path, Segment(path[-1] if path else None, array("I", range(start, end + 1))))
            start = end + 1
        session = row.session if row.session is not None else -1 - number
        last = path[-1].ids[-1] if path else -1
        if users.setdefault(last, session) != session:
            users[last] = SEVERAL
        delay = None if row.delay_ms is None else row.delay_ms / 1000
        requests.append(Request(row.at_ms / 1000, max(1, row.prompt), max(1, row.output), path, row.session, delay))
    for turn, after, end in answers:
        requests[turn].answer = ended[end][len(ended[after]) :]
    _mark_shared(ended, users)
    requests.sort(key=lambda request: request.arrival)
    return Trace(name, block_size, tuple(requests))


SEVERAL = 1 << 62


def _answers(rows: Sequence[Row], block_size: int) -> Iterator[tuple[int, int, int]]:
    """Turns whose answer begins what the next turn adds: the row, the last block of its prompt and of its answer."""
    turns: dict[int, tuple[int, int]] = {}  # by session: its last row, and the last block of that
    first = 0
    for number, row in enumerate(rows):
        last = first + row.new - 1 if row.new else row.after
        if row.session is not None:
            before, end = turns.get(row.session, (-1, -2))
            if end == row.after >= 0:
                prompt, output = rows[before].prompt, rows[before].output
                grown = (prompt + output) // block_size - prompt // block_size
                if min(grown, row.new) > 0:
                    yield before, end, first + min(grown, row.new) - 1
            turns[row.session] = number, last
        first += row.new


def _cuts(rows: Sequence[Row], more: Sequence[int]) -> list[int]:
    """The blocks that end a segment: a prompt or an answer (`more`) ends with them, or several blocks may follow."""
    cuts, first = set(more), 0
    for row in rows:
        first += row.new
        cuts.add(first - 1 if row.new else row.after)
        cuts.add(row.after)
    cuts.discard(-1)
    return sorted(cuts)


def _mark_shared(ended: Mapping[int, Path], users: Mapping[int, int]) -> None:
    owner: dict[Segment, int] = {}
    for end, session in users.items():
        for segment in ended[end]:
            if session == SEVERAL or owner.setdefault(segment, session) != session:
                segment.shared = True
