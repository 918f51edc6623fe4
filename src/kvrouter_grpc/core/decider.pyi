from array import array
from collections.abc import Mapping, Sequence

from typing_extensions import Buffer

from kvrouter_grpc.core.choice import Choice
from kvrouter_grpc.core.decision_log import DecisionLog
from kvrouter_grpc.core.policy import Policy
from kvrouter_grpc.core.target_table import TargetTable

class Decider:
    """Answers where a prompt should go: hashes, matches, scores and picks in one compiled pass.

    Ties go to the fewest requests in flight where the mode or the cost says so (`core/policy.pyx`), then to chance.

    Args:
        table: The targets.
        seed: Of the random choices, a u64, for a repeatable run; None is random.
    """

    table: TargetTable
    usual_new_tokens: float
    """Moving average of what the chosen targets had to compute."""

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
        session: int | None = None,
        learn: bool = False,
        log: DecisionLog | None = None,
        occasion: object = None,
        request_id: str = "",
    ) -> Choice:
        """Choose the row that should have a prompt.

        Changes nothing but the random generator, the average and, with `learn`, the regret.

        Args:
            tokens: The prompt's token ids, u32.
            seed: What `seed_for` returned.
            mm_hashes: As for `hash_sequence`.
            policy: How to choose.
            rows: The rows that may be chosen, `array("I")`, at least one.
            preferences: For each of them the sum of the request's preferences for its taints, `array("d")`; None: 0.
            output_tokens: Tokens that the answer is expected to have.
            turn: Of mode round-robin; `turn % len(rows)` is taken.
            explain: Fill `terms` and `recording`.
            session: Hash of the session that the request belongs to, a u64; None without one.
            learn: The request will be sent there: count what staying with its prefix costs it (cost `default`, see
                `regret.pxd`).
            log: Takes a recording of the decision; None: none.
            occasion: Whatever explains the rows; it is kept with the recording, as the next.
            request_id: The request's name.

        Raises:
            ValueError: A buffer of another type, no rows, or a prompt of more than 2**20 blocks.
            KeyError: A row is not in use.
        """

    def sequence(self) -> array[int]:
        """A copy of the sequence hashes, `array("Q")`, of the prompt that was decided last."""
