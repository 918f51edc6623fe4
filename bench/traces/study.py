"""What `python -m bench.traces` compares: lists of scenarios, each with the policies that are worth the time there."""

from dataclasses import dataclass
from itertools import product

from bench.traces.policy import Policy, policies
from bench.traces.scenario import Scenario

RECORDED = ("conversation", "synthetic", "agents")
LEVELS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.15, 1.3, 1.4)
COPIES = (1, 2, 3, 4, 5, 6)  # of the agents' sessions on four engines


@dataclass(frozen=True, slots=True)
class Study:
    """Scenarios to compare policies in.

    Attributes:
        title: What is compared, for people.
        scenarios: The rows of its tables.
        policies: Names of the policies; empty: all.
    """

    title: str
    scenarios: tuple[Scenario, ...]
    policies: tuple[str, ...] = ()

    def chosen(self) -> list[Policy]:
        """The policies to run."""
        return [policy for policy in policies() if not self.policies or policy.name in self.policies]


FEW = ("default", "dynamo", "dynamo w=8", "least-loaded", "round-robin", "oracle")
OURS = ("default", "dynamo")

STUDIES: dict[str, Study] = {
    "main": Study(
        "Eight engines, every mode and cost",
        tuple(
            Scenario(load, cache=cache, level=level)
            for load, cache, level in [*product(RECORDED[:2], "SL", [1.0]), ("agents", "S", 0.67), ("agents", "L", 1.0)]
        ),
    ),
    "own": Study(
        "Other traffic and other fleets",
        (
            Scenario("hot"),
            Scenario("hot", level=1.3),
            Scenario("bursts"),
            Scenario("bursts", level=2.0),
            Scenario("single"),
            Scenario("single", level=3.0),
            Scenario("conversation", level=0.1),
            Scenario("agents", level=0.17),
            *(Scenario(load, mix=mix, level=0.8) for load, mix in product(RECORDED[::2], ("speed", "cache"))),
        ),
    ),
    "size": Study(
        "By the number of engines",
        tuple(Scenario(load, workers, requests=20_000) for load, workers in product(RECORDED, (4, 16, 64))),
        FEW,
    ),
    "load": Study(
        "By load",
        (
            *(Scenario(load, level=level) for load, level in product(RECORDED[:2], LEVELS)),
            *(Scenario("agents", 4, copies / 3) for copies in COPIES),
        ),
        FEW,
    ),
    "roof": Study("Engines whose attention costs time", tuple(Scenario(load, model="roof") for load in RECORDED), FEW),
    "replicas": Study(
        "By the number of routers",
        tuple(Scenario(load, replicas=count) for load, count in product(RECORDED, (1, 2, 4, 8))),
        OURS,
    ),
    "delay": Study(
        "By how late KV events are",
        tuple(
            Scenario(load, event_delay_s=delay) for load, delay in product((*RECORDED, "bursts"), (0.0, 0.05, 0.5, 2.0))
        ),
        OURS,
    ),
}

QUICK = Study(
    "Tiny",
    tuple(Scenario(load, 4, requests=120) for load in ("conversation", "agents", "hot")),
)
