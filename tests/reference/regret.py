"""The slow, clear twin of the compiled regret (`core/regret.pxd`)."""

from collections.abc import Sequence

from kvrouter_grpc.routing.cost import Weights
from reference.cost import COSTS, Ask, Row, new_work, preferred

PREFIXES = 4096
REPLICATION = COSTS["default"].terms.index("replication")


class Regrets:
    """What requests have waited for prefixes; one prefix per place, the newest wins."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[int, float]] = {}

    def of(self, prefix: int) -> float:
        """Tokens waited for it."""
        known, tokens = self._places.get(prefix % PREFIXES, (0, 0.0))
        return tokens if known == prefix else 0.0

    def set(self, prefix: int, tokens: float) -> None:
        """Remember; that there is nothing is only remembered of what was known."""
        if tokens or self._places.get(prefix % PREFIXES, (0, 0.0))[0] == prefix:
            self._places[prefix % PREFIXES] = prefix, tokens


def deepest(rows: Sequence[Row], ask: Ask) -> int:
    """Blocks that the row has which has most of the prompt."""
    usable = max(ask.prompt_tokens - 1, 0) // ask.block_size
    return max(min(max(row.overlap.total, row.in_flight_blocks), usable) for row in rows)


def after(rows: Sequence[Row], ask: Ask, weights: Weights, chosen: int) -> float:
    """The regret of the prefix when the request goes to the row `chosen`."""
    if new_work(rows[chosen], ask, weights) > min(new_work(row, ask, weights) for row in rows):
        return 0.0  # it is computed anew
    scored = [
        preferred(terms, row) for terms, row in zip(COSTS["default"].score(rows, ask, weights), rows, strict=True)
    ]
    own = [sum(terms) - terms[REPLICATION] for terms in scored]
    return ask.regret + own[chosen] - min(own)
