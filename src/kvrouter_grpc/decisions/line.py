"""The lines of a decision log: JSON, one object each.

    settings  how an endpoint decides; before its first decision in every file
    decision  one decision with everything that it read, but for the prompt
    lost      so many decisions are missing here: they came faster than they were written

Numbers of 64 bits (seeds, sessions, hashes) are written as such: beware of readers that make floating point of them.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, cast

import msgspec

from kvrouter_grpc.config import RouterConfig
from kvrouter_grpc.core import Policy, Recording
from kvrouter_grpc.routing.roster import Occasion
from kvrouter_grpc.types import RouterOverride

SETTINGS = frozenset(
    {
        "mode",
        "cost",
        "temperature",
        "new_work_weight",
        "request_weight",
        "kv_overlap_score_credit",
        "kv_overlap_score_credit_decay",
        "prefill_load_scale",
        "decode_active_request_weight",
        "host_cache_hit_weight",
        "disk_cache_hit_weight",
        "shared_cache_type",
        "shared_cache_multiplier",
        "track_active_blocks",
        "track_prefill_tokens",
        "assume_kv_reuse",
        "session_load_bound",
        "prefix_threshold",
        "kv_aware_threshold",
        "accelerator_to_cpu_ratio",
    }
)
"""Of the section `router`: those that a decision goes by once it is known who may be chosen."""

U32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
U64 = Annotated[int, msgspec.Meta(ge=0)]  # `Recording.restore` checks the rest
Name = Annotated[str, msgspec.Meta(max_length=512)]


class Seen(msgspec.Struct, array_like=True, frozen=True):
    """One worker's rank as a decision saw it; the facts are those of `Recording.facts`, in their order."""

    name: Name
    rank: U32
    freshness: float
    queued_prefill_tokens: int
    own_parts: int
    shared_blocks: U32
    active_requests: U32
    waiting_requests: U32
    total_blocks: U32
    on_cpu: bool
    tiers: tuple[U32, U32, U32, U32]
    in_flight: U32
    identity: U64
    preference: float


class LeftOut(msgspec.Struct, array_like=True, frozen=True):
    """One that could not take the request."""

    name: Name
    rank: U32
    reason: str


class SettingsLine(msgspec.Struct, tag="settings", frozen=True):
    """How an endpoint decides."""

    endpoint: Name
    router: dict[str, Any]  # the settings of `SETTINGS`

    @classmethod
    def of(cls, endpoint: str, config: RouterConfig) -> "SettingsLine":
        """The line of an endpoint."""
        return cls(endpoint, config.model_dump(mode="json", include=set(SETTINGS)))


class DecisionLine(msgspec.Struct, tag="decision", frozen=True, omit_defaults=True):
    """One decision."""

    endpoint: Name
    at: float
    request_id: Name
    tokens: int
    block_size: int
    picked: U32
    dice: U64
    workers: Annotated[list[Seen], msgspec.Meta(min_length=1)]
    turn: U64 = 0
    output_tokens: int = 0
    session: U64 | None = None
    regret: float = 0.0
    prefilled: bool = False
    override: dict[str, Any] | None = None
    left_out: list[LeftOut] = []
    hashes: list[U64] | None = None

    @classmethod
    def of(cls, endpoint: str, recording: Recording) -> "DecisionLine":
        """The line of a decision."""
        occasion = cast("Occasion", recording.occasion)
        seats = [occasion.seats[recording.row(i)] for i in range(recording.count)]
        workers = [
            Seen(seat.worker.spec.name, seat.target.dp_rank, *facts)
            for seat, facts in zip(seats, recording.facts(), strict=True)
        ]
        return cls(
            endpoint,
            recording.at,
            recording.request_id,
            recording.prompt_tokens,
            recording.block_size,
            recording.picked,
            recording.seed,
            workers,
            recording.turn,
            recording.output_tokens,
            recording.session,
            recording.regret,
            occasion.prefilled,
            _given(occasion.override),
            [LeftOut(out.worker_name, out.target.dp_rank, out.reason) for out in occasion.left_out],
            recording.sequence.tolist() if recording.sequence is not None else None,
        )

    def restore(self, policy: Policy) -> Recording:
        """The recording that it is the line of.

        Raises:
            ValueError: It is of none.
        """
        try:
            return Recording.restore(
                policy,
                None,
                self.request_id,
                at=self.at,
                tokens=self.tokens,
                output_tokens=self.output_tokens,
                block_size=self.block_size,
                turn=self.turn,
                session=self.session,
                dice=self.dice,
                picked=self.picked,
                regret=self.regret,
                rows=[msgspec.structs.astuple(seen)[2:] for seen in self.workers],
            )
        except (OverflowError, TypeError) as error:
            raise ValueError(str(error)) from None


class LostLine(msgspec.Struct, tag="lost", frozen=True):
    """Decisions that are not in the file."""

    endpoint: Name
    count: Annotated[int, msgspec.Meta(ge=1)]


Line = SettingsLine | DecisionLine | LostLine


def read_override(given: Mapping[str, Any]) -> RouterOverride:
    """The change of the policy that a line names.

    Raises:
        msgspec.ValidationError: It is none.
    """
    return msgspec.convert(given, RouterOverride, strict=True)


def _given(override: RouterOverride | None) -> dict[str, Any] | None:
    if override is None:
        return None
    return {name: value for name, value in asdict(override).items() if value is not None}
