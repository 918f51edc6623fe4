"""The whole configuration."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from kvrouter_grpc.config.policy import EndpointPolicy, applied
from kvrouter_grpc.config.router import RouterConfig
from kvrouter_grpc.config.section import Contradiction, Endpoint, Names, Section, Syntax, setting
from kvrouter_grpc.config.sections import DecisionsConfig, EventsConfig, LogConfig, ServerConfig, UpstreamConfig
from kvrouter_grpc.types import WorkerSpec


class Config(Section):
    """Everything the router is told, checked. Each component takes its own section.

    Attributes:
        warnings: Sentences for the operator: deprecated names, settings without effect.
        origins: Where each value that is not a default came from, by path (`router.temperature`).
    """

    endpoints: tuple[Endpoint, ...] = setting(
        ...,
        "Endpoint served, namespace.component.endpoint; repeat for several.",
        min_length=1,
        max_length=256,
        names=Names(flag="--endpoint", env=("DYN_ROUTER_ENDPOINT",)),
    )
    workers: Annotated[tuple[WorkerSpec, ...], Syntax("name=...,url=http://host:port,...")] = setting(
        (),
        "A worker, given by its keys; repeat for several.",
        max_length=10_000,
        names=Names(flag="--worker"),
    )
    workers_file: Path | None = setting(None, "YAML file with more workers: a list of mappings.")
    endpoint_policies: Annotated[tuple[EndpointPolicy, ...], Syntax("endpoint=...,track-prefill-tokens=false,...")] = (
        setting(
            (),
            "What one endpoint has different from the section router: its keys, beside endpoint; repeat for several.",
            max_length=256,
            names=Names(flag="--endpoint-policy"),
        )
    )
    server: ServerConfig = ServerConfig()
    router: RouterConfig = RouterConfig()
    events: EventsConfig = EventsConfig()
    upstream: UpstreamConfig = UpstreamConfig()
    log: LogConfig = LogConfig()
    decisions: DecisionsConfig = DecisionsConfig()
    warnings: tuple[str, ...] = Field((), exclude=True, repr=False)
    origins: Mapping[str, str] = Field({}, exclude=True, repr=False)

    def router_of(self, endpoint: str) -> RouterConfig:
        """The policy of one endpoint."""
        return applied(self.router, self.endpoint_policies, endpoint)

    def prefill_pools(self) -> Mapping[str, str]:
        """Endpoint to the endpoint whose workers compute its prompts, where it has one."""
        chosen = {endpoint: self.router_of(endpoint).prefill_endpoint for endpoint in self.endpoints}
        return {endpoint: pool for endpoint, pool in chosen.items() if pool not in (None, endpoint)}

    def contradictions(self) -> Iterator[Contradiction]:
        """Check that names are unique and that workers belong to an endpoint served here."""
        for endpoint, count in Counter(self.endpoints).items():
            if count > 1:
                yield Contradiction(("endpoints",), f"endpoint {endpoint} is given {count} times: give it once.")
        for name, count in Counter(worker.name for worker in self.workers).items():
            if count > 1:
                yield Contradiction(
                    ("workers", "workers_file"),
                    f"{count} workers are called {name}: give each its own name=.",
                )
        for worker in self.workers:
            if worker.endpoint not in self.endpoints:
                yield Contradiction(
                    ("workers", "workers_file", "endpoints"),
                    f"worker {worker.name} is for endpoint {worker.endpoint}, which this router does not "
                    f"serve: add --endpoint {worker.endpoint} or change the worker.",
                )
        for endpoint, count in Counter(policy.endpoint for policy in self.endpoint_policies).items():
            if endpoint not in self.endpoints:
                yield Contradiction(
                    ("endpoint_policies", "endpoints"),
                    f"a policy is for endpoint {endpoint}, which this router does not serve: add --endpoint {endpoint} "
                    "or change the policy.",
                )
            elif count > 1:
                yield Contradiction(("endpoint_policies",), f"endpoint {endpoint} has {count} policies: make them one.")
        yield from self._prefill_contradictions()

    def _prefill_contradictions(self) -> Iterator[Contradiction]:
        where = ("router.prefill_endpoint", "endpoint_policies", "endpoints")
        pools = self.prefill_pools()
        if self.router.prefill_endpoint is not None and not pools:
            text = "prefill-endpoint is the only endpoint: add the one whose workers generate with --endpoint."
            yield Contradiction(where, text)
        for pool in sorted(set(pools.values())):
            if pool not in self.endpoints:
                text = f"prefill-endpoint {pool} is not served here: add --endpoint {pool} and its workers."
                yield Contradiction(where, text)
            elif pool in pools:
                text = f"prefill-endpoint {pool} has one itself ({pools[pool]}): a prompt is handed over once."
                yield Contradiction(where, text)
