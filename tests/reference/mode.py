"""The slow, clear twin of the compiled modes (`core/mode.pxd`): which rows may be picked, and what they are ranked by."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvrouter_grpc.routing.cost import Weights
from kvrouter_grpc.routing.mode import Knobs
from reference.cost import COSTS, Ask, Row, held_blocks, preferred
from reference.pick import Dice, scramble

NEVER = math.inf


@dataclass(frozen=True, slots=True)
class Seat:
    """What a mode knows of a row beside its `Row`."""

    identity: int = 0
    on_cpu: bool = False


@dataclass(frozen=True, slots=True)
class Scene:
    """One decision as a mode sees it."""

    rows: Sequence[Row]
    seats: Sequence[Seat]
    ask: Ask
    cost: str
    weights: Weights
    knobs: Knobs
    turn: int
    session: int | None
    dice: Dice

    @property
    def requests(self) -> list[int]:
        """In flight, by row."""
        return [row.active_requests for row in self.rows]


def only(scene: Scene, chosen: dict[int, float]) -> list[float]:
    """The scores when only some rows may be picked."""
    return [chosen.get(number, NEVER) for number in range(len(scene.rows))]


def lowest_cost(scene: Scene) -> list[float]:
    """The sums of the terms."""
    scored = COSTS[scene.cost].score(scene.rows, scene.ask, scene.weights)
    return [sum(preferred(terms, row)) for terms, row in zip(scored, scene.rows, strict=True)]


def in_turn(scene: Scene) -> list[float]:
    """The next one."""
    return only(scene, {scene.turn % len(scene.rows): 0.0})


def by_chance(scene: Scene) -> list[float]:
    """Any."""
    return [0.0] * len(scene.rows)


def power_of_two(scene: Scene) -> list[float]:
    """Two different ones, by requests."""
    one = other = scene.dice.below(len(scene.rows))
    if len(scene.rows) > 1:
        other = scene.dice.below(len(scene.rows) - 1)
        other += other >= one
    return only(scene, {number: scene.requests[number] for number in (one, other)})


def least_loaded(scene: Scene) -> list[float]:
    """All, by requests."""
    return list(map(float, scene.requests))


def device_aware(scene: Scene) -> list[float]:
    """One kind of target, by requests: CPUs while they have fewer than their share of what accelerators have."""
    cpus = [number for number, seat in enumerate(scene.seats) if seat.on_cpu]
    others = [number for number, seat in enumerate(scene.seats) if not seat.on_cpu]
    kind = cpus or others
    if cpus and others:
        on_cpus, on_others = (sum(scene.requests[number] for number in some) for some in (cpus, others))
        share = math.floor(on_others * len(cpus) / (scene.knobs.accelerator_to_cpu_ratio * len(others)))
        kind = cpus if on_cpus < share else others
    return only(scene, {number: scene.requests[number] for number in kind})


def session(scene: Scene) -> list[float]:
    """The first of the session's own order that is not over the bound; by requests without a session."""
    if scene.session is None:
        return least_loaded(scene)
    bound = math.ceil(scene.knobs.session_load_bound * (sum(scene.requests) + 1) / len(scene.rows))
    free = [number for number, requests in enumerate(scene.requests) if requests < bound]
    key = scene.session
    return only(scene, {max(free, key=lambda number: scramble(key ^ scene.seats[number].identity)): 0.0})


def longest_prefix(
    scene: Scene, least: float | None = None, otherwise: Callable[[Scene], list[float]] = least_loaded
) -> list[float]:
    """By blocks held, when the longest match has `least` tokens."""
    least = scene.knobs.prefix_threshold if least is None else least
    held = [held_blocks(row, scene.ask, scene.weights) for row in scene.rows]
    if max(held) == 0 or max(held) * scene.ask.block_size < least:
        return otherwise(scene)
    return [-blocks for blocks in held]


def kv_aware(scene: Scene) -> list[float]:
    """By blocks held when little is missing, else by session."""
    return longest_prefix(scene, scene.ask.prompt_tokens - scene.knobs.kv_aware_threshold, session)


MODES: dict[str, Callable[[Scene], list[float]]] = {
    "kv": lowest_cost,
    "round-robin": in_turn,
    "random": by_chance,
    "power-of-two": power_of_two,
    "least-loaded": least_loaded,
    "device-aware-weighted": device_aware,
    "session": session,
    "prefix": longest_prefix,
    "kv-aware": kv_aware,
    "direct": lowest_cost,
}


def fewest_requests_break_ties(mode: str, cost: str) -> bool:
    """Whether ties go to the fewest requests before they go to chance."""
    return mode in {"prefix", "kv-aware"} or (mode in {"kv", "direct"} and COSTS[cost].own)
