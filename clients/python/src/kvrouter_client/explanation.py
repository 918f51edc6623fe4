"""Why a request went where it did: one value per message of `Explain`."""

from dataclasses import dataclass
from datetime import UTC, datetime

from ._gen import admin_pb2
from .replies import Candidate


@dataclass(frozen=True, slots=True)
class Explanation:
    """One decision and everything that it read."""

    endpoint: str  # that decided
    request_id: str  # empty when it had none
    decided_at: datetime
    worker_id: int  # that was picked
    dp_rank: int
    worker_name: str
    reason: str  # what decided, in words
    mode: str
    cost: str  # the formula; in modes other than `kv` it did not decide
    temperature: float
    prompt_tokens: int
    prompt_blocks: int  # full ones
    block_size: int  # tokens per block; 0 while the router had not learned it
    expected_output_tokens: int  # 0 when that was not given
    candidates: tuple[Candidate, ...]  # cheapest first, workers that were not eligible last
    prefilled: bool  # another worker computed the prompt: it was for decoding only

    @classmethod
    def from_proto(cls, message: admin_pb2.Explanation) -> "Explanation":
        """Convert."""
        return cls(
            endpoint=message.endpoint,
            request_id=message.request_id,
            decided_at=message.decided_at.ToDatetime(UTC),
            worker_id=message.worker_id,
            dp_rank=message.dp_rank,
            worker_name=message.worker_name,
            reason=message.reason,
            mode=message.mode,
            cost=message.cost,
            temperature=message.temperature,
            prompt_tokens=message.prompt_tokens,
            prompt_blocks=message.prompt_blocks,
            block_size=message.block_size,
            expected_output_tokens=message.expected_output_tokens,
            candidates=tuple(Candidate.from_proto(each) for each in message.candidates),
            prefilled=message.prefilled,
        )
