"""What `python -m bench.traces` compares: lists of scenarios, each with the policies that are worth the time there."""

from dataclasses import dataclass
from itertools import product

from bench.traces.policy import Policy, policies
from bench.traces.scenario import Scenario

RECORDED = ("conversation", "synthetic", "agents")
LEVELS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.15, 1.3, 1.4)
COPIES = (1, 2, 3, 4, 5)  # of the agents' sessions on four engines
SOME = 12_000  # of the agents' requests: as many as tell enough


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
DELAYS = (0.0, 0.05, 0.5, 2.0)

STUDIES: dict[str, Study] = {
    "main": Study(
        "Eight engines, every mode and cost",
        (
            *(Scenario(load, cache=cache) for cache, load in product("LS", RECORDED[:2])),
            Scenario("agents", requests=SOME),
            Scenario("agents", cache="S", level=0.67, requests=SOME),
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
            *(Scenario("conversation", mix=mix, level=0.8) for mix in ("speed", "cache")),
            *(Scenario("agents", 4, mix=mix, level=0.67) for mix in ("speed", "cache")),
        ),
    ),
    "load": Study(
        "By load",
        (
            *(Scenario(load, level=level) for load, level in product(RECORDED[:2], LEVELS)),
            *(Scenario("agents", 4, copies / 3) for copies in COPIES),
        ),
        FEW,
    ),
    "size": Study(
        "By the number of engines",
        tuple(
            Scenario(load, workers, requests=SOME if load == "agents" else 0)
            for load, workers in product(RECORDED, (4, 16, 64))
        ),
        FEW,
    ),
    "roof": Study(
        "Engines whose attention costs time",
        tuple(Scenario(load, model="roof", requests=SOME if load == "agents" else 0) for load in RECORDED),
        FEW,
    ),
    "passing": Study(
        "Engines that let short prompts pass long ones",
        tuple(
            Scenario(*case, model=model, requests=SOME if case == ("agents",) else 0)
            for case, model in product(
                (("conversation",), ("synthetic",), ("agents",), ("agents", 4, COPIES[-1] / 3)), ("lin", "passing")
            )
        ),
        FEW,
    ),
    "replicas": Study(
        "By the number of routers",
        tuple(
            Scenario(load, replicas=count, requests=SOME if load == "agents" else 0)
            for load, count in product(RECORDED, (1, 2, 4, 8))
        ),
        OURS,
    ),
    "delay": Study(
        "By how late KV events are",
        tuple(Scenario(load, event_delay_s=delay) for load, delay in product(("conversation", "bursts"), DELAYS)),
        OURS,
    ),
}

QUICK = Study(
    "Tiny",
    tuple(Scenario(load, 4, requests=120) for load in ("conversation", "agents", "hot")),
)
