from array import array
from collections.abc import Mapping, Sequence
from typing import Protocol

from typing_extensions import Buffer

from kvrouter_grpc.core.target_table import TargetTable

class Weights(Protocol):
    """The knobs of both costs; see `routing/cost.py`."""

    @property
    def new_work_weight(self) -> float: ...
    @property
    def overlap_score_credit(self) -> float: ...
    @property
    def overlap_score_credit_decay(self) -> float: ...
    @property
    def prefill_load_scale(self) -> float: ...
    @property
    def decode_active_request_weight(self) -> float: ...
    @property
    def host_cache_hit_weight(self) -> float: ...
    @property
    def disk_cache_hit_weight(self) -> float: ...
    @property
    def track_active_blocks(self) -> bool: ...
    @property
    def track_prefill_tokens(self) -> bool: ...
    @property
    def assume_kv_reuse(self) -> bool: ...

class Policy:
    """How to choose.

    Args:
        weights: Of the cost.
        cost: `default` or `dynamo`.
        mode: `kv` takes the lowest cost, `round-robin` the next row in turn, `random` any row.
        temperature: Of mode kv. 0 takes the lowest cost; above, costs are drawn from by a softmax.

    Raises:
        ValueError: No such cost or mode.
    """

    def __init__(
        self, weights: Weights, *, cost: str = "default", mode: str = "kv", temperature: float = 0.0
    ) -> None: ...

class Choice:
    """One row as the decision saw it."""

    row: int
    blocks: int
    """Full blocks of the prompt."""
    tiers: tuple[int, int, int, int]
    """Blocks that the target holds on device, in host memory, on disk and remotely, each where the one before ends."""
    in_flight: int
    """Leading blocks that requests in flight on the target pin."""
    cached_tokens: int
    """Tokens of the prompt that the engine should find cached: whole blocks, never the last token."""
    freshness: float
    cost: float
    """The sum of its terms; infinity for what is no number."""
    terms: tuple[float, float, float] | None
    """Of the cost, in the order of `routing.cost.COSTS`; None unless explained."""
    candidates: list[Choice] | None
    """Every row that was asked, in the order given; None unless explained."""

class Decider:
    """Answers where a prompt should go: hashes, matches, scores and picks in one compiled pass.

    Ties of the lowest cost go to the fewest requests in flight (cost `default` only), then to chance.

    Args:
        table: The targets.
        seed: Of the random choices, a u64, for a repeatable run; None is random.
    """

    table: TargetTable

    def __init__(self, table: TargetTable, seed: int | None = None) -> None: ...
    def decide(
        self,
        tokens: Buffer,
        seed: int,
        mm_hashes: Mapping[int, Sequence[int]] | None,
        policy: Policy,
        rows: array[int],
        preferences: array[float] | None,
        output_tokens: int,
        turn: int,
        explain: bool,
    ) -> Choice:
        """Choose the row that should have a prompt. Changes nothing but the state of the random generator.

        Args:
            tokens: The prompt's token ids, u32.
            seed: What `seed_for` returned.
            mm_hashes: As for `hash_sequence`.
            policy: How to choose.
            rows: The rows that may be chosen, `array("I")`, at least one.
            preferences: For each of them the sum of the request's preferences for its taints, `array("d")`; None: 0.
            output_tokens: Tokens that the answer is expected to have.
            turn: Of mode round-robin; `turn % len(rows)` is taken.
            explain: Fill `terms` and `candidates`.

        Raises:
            ValueError: A buffer of another type, no rows, or a prompt of more than 2**20 blocks.
            KeyError: A row is not in use.
        """

    def sequence(self) -> array[int]:
        """A copy of the sequence hashes, `array("Q")`, of the prompt that was decided last."""
