from array import array
from collections.abc import Mapping, Sequence

from typing_extensions import Buffer

from kvrouter_grpc.core.choice import Choice
from kvrouter_grpc.core.decision_log import DecisionLog
from kvrouter_grpc.core.policy import Policy
from kvrouter_grpc.core.shortlist import Shortlist
from kvrouter_grpc.core.target_table import TargetTable

class Decider:
    """Answers where a prompt should go: hashes, matches, scores and picks in one compiled pass.

    Ties go to the fewest requests in flight where the mode or the cost says so (`core/policy.pyx`), then to chance.

    Args:
        table: The targets.
        seed: Of the random choices, a u64, for a repeatable run; None is random.
        log: Takes a recording of every decision that is to be remembered; None: none.
    """

    table: TargetTable
    log: DecisionLog | None
    usual_new_tokens: float
    """Moving average of what the chosen targets had to compute."""
    turn: int
    """Of mode round-robin: `turn % len(rows)` is taken; counts the prompts that were booked."""

    def __init__(self, table: TargetTable, seed: int | None = None, log: DecisionLog | None = None) -> None: ...
    def decide(
        self,
        tokens: Buffer,
        seed: int,
        shortlist: Shortlist,
        policy: Policy,
        request_id: str = "",
        *,
        mm_hashes: Mapping[int, Sequence[int]] | None = None,
        output_tokens: int = 0,
        session: int | None = None,
        explain: bool = False,
        remember: bool = True,
        booked: bool = False,
    ) -> Choice:
        """Choose the row that should have a prompt.

        Changes nothing but the log, the random generator, the average and, when `booked`, the turn and the regret.

        Args:
            tokens: The prompt's token ids, u32.
            seed: What `seed_for` returned.
            shortlist: The rows that may be chosen, at least one.
            policy: How to choose.
            request_id: The request's name, for the log.
            mm_hashes: As for `hash_sequence`.
            output_tokens: Tokens that the answer is expected to have.
            session: Hash of the session that the request belongs to, a u64; None without one.
            explain: Fill `terms` and `recording`.
            remember: Let the log have the decision.
            booked: The request will be sent there: it takes its turn, and what staying with its prefix costs it counts
                (cost `default`, see `regret.pxd`).

        Raises:
            ValueError: A buffer of another type, no rows, or a prompt of more than 2**20 blocks.
            KeyError: A row is not in use.
        """

    def sequence(self) -> array[int]:
        """A copy of the sequence hashes, `array("Q")`, of the prompt that was decided last."""
