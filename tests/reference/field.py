"""A table, an index and a decider made of rows, and what the reference says of the same rows."""

from array import array
from dataclasses import dataclass

from kvrouter_grpc.core import Decider, Policy, RadixTree, Shortlist, TargetTable, hash_sequence
from kvrouter_grpc.routing.cost import Weights
from kvrouter_grpc.routing.mode import Knobs
from kvrouter_grpc.types import Overlap
from reference import pick
from reference.cost import Row
from reference.mode import Seat

SIZE = 4
SEED = 1337
NO_BLOCKS = array("Q")


@dataclass
class Made:
    """What a row of the table is made to be."""

    tiers: tuple[int, int, int, int] = (0, 0, 0, 0)  # blocks of the prompt in each tier, one tier after the other
    in_flight: int = 0
    fresh: float = 1.0
    queued: int = 0
    private: int = 0
    requests: int = 0
    total: int = 0
    taint: float = 0.0
    on_cpu: bool = False
    foreign: tuple[int, int, int, int] = (0, 0, 0, 0)  # as `TargetTable.foreign` tells it


class Field:
    """A table, an index and a decider with the rows of `made`, all about one prompt."""

    def __init__(self, made, tokens, seed=1):
        self.tokens = array("I", tokens)
        self.made = made
        self.table = TargetTable()
        self.index = RadixTree(SIZE)
        self.table.attach(self.index)
        self.decider = Decider(self.table, seed)
        self.seqs = hash_sequence(self.tokens, SIZE, SEED)
        self.rows = array("I", [self._row(number, one) for number, one in enumerate(made)])
        self.preferences = array("d", [one.taint for one in made])
        self.turn = 0

    def _row(self, number, made):
        row = self.table.add(number)
        depth = 0
        for tier, blocks in enumerate(made.tiers):
            if blocks:
                slot = self.index.add_slot()
                self.table.set_slot(row, tier, slot)
                names = array("Q", [1000 * number + depth + i for i in range(blocks)])
                for other in range(self.index.stats()["slots"]):
                    if depth == 0 or self.index.holds(other, names[0] - 1):
                        parent = names[0] - 1 if depth else None
                        below = self.tokens[depth * SIZE : (depth + blocks) * SIZE]
                        assert self.index.store(slot, parent, names[: len(below) // SIZE], below, SEED, None, other)
                        break
                depth += blocks
        self.table.set_freshness(row, made.fresh)
        self.table.describe(row, total_blocks=made.total, identity=identity(number), on_cpu=made.on_cpu)
        self.table.book(row, self.seqs[: made.in_flight], made.queued, True)
        self.table.book(row, array("Q", range(made.private)), 0, False)
        for _ in range(made.requests):
            ticket = self.table.book(row, NO_BLOCKS, 0, True)
            self.table.first_token(ticket, 0)
        self.table.set_foreign(row, *made.foreign)
        return row

    def expected_rows(self):
        rows = []
        for made in self.made:
            tiers, left = [], len(self.seqs)
            for blocks in made.tiers:
                tiers.append(min(blocks, left))
                left -= tiers[-1]
            in_flight = min(made.in_flight, len(self.seqs))
            requests, waiting, tokens, blocks = made.foreign
            rows.append(
                Row(
                    overlap=Overlap(*tiers),
                    in_flight_blocks=in_flight,
                    freshness=made.fresh,
                    queued_prefill_tokens=made.queued + tokens,
                    active_blocks=in_flight + made.private + blocks,
                    active_requests=made.requests + 2 + requests,
                    total_blocks=min(made.total, 2**32 - 1),
                    waiting_requests=2 + waiting,
                    taint_preference=made.taint,
                )
            )
        return rows

    @property
    def seats(self):
        return [Seat(identity(number), made.on_cpu) for number, made in enumerate(self.made)]

    def decide(
        self,
        weights=Weights(),  # noqa: B008
        knobs=Knobs(),  # noqa: B008
        *,
        output=0,
        explain=False,
        preferences=True,
        session=None,
        booked=False,
        **policy,
    ):
        self.decider.turn = self.turn
        return self.decider.decide(
            self.tokens,
            SEED,
            Shortlist(self.rows, None, self.preferences if preferences else None),
            Policy(weights, knobs, **policy),
            output_tokens=output,
            explain=explain,
            session=session,
            booked=booked,
        )


def identity(number):
    return pick.scramble(number + 1)
