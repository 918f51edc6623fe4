"""The workers of one endpoint and whether they may be picked."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from kvrouter_grpc.advice import Advice, Effect
from kvrouter_grpc.core import hash_bytes
from kvrouter_grpc.types import Target, WorkerFacts, WorkerSpec, WorkerState


def worker_id_of(name: str) -> int:
    """The id of a worker: XXH3-64 (seed 0) of its name, so that every router replica gives the same one."""
    return hash_bytes(name.encode(), 0)


@dataclass(slots=True, eq=False)
class Worker:
    """One worker as the registry knows it. `spec` is what was given, completed by what the worker said of itself."""

    worker_id: int
    spec: WorkerSpec
    facts: WorkerFacts | None = None
    health: WorkerState = WorkerState.STARTING  # STARTING, READY or UNHEALTHY
    health_reason: str = "not reached yet"
    faults: dict[str, Advice] = field(default_factory=dict)  # by subject
    draining: bool = False

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks."""
        return self.spec.dp_size or 1

    @property
    def targets(self) -> list[Target]:
        """One per rank."""
        return [Target(self.worker_id, rank) for rank in range(self.dp_size)]

    @property
    def excluded(self) -> list[Advice]:
        """The faults for which it gets no requests."""
        return [fault for fault in self.faults.values() if fault.effect is Effect.EXCLUDES]

    @property
    def state(self) -> WorkerState:
        """Whether it may be picked: what needs a person comes first."""
        if self.excluded:
            return WorkerState.MISCONFIGURED
        if self.health is WorkerState.UNHEALTHY:
            return WorkerState.UNHEALTHY
        if self.draining:
            return WorkerState.DRAINING
        return self.health

    @property
    def reason(self) -> str:
        """Why it may not be picked; empty when it may."""
        if self.excluded:
            return "; ".join(map(str, self.excluded))
        if self.health is not WorkerState.READY:
            return self.health_reason
        return "draining" if self.draining else ""

    def serves(self, model: str) -> bool:
        """Whether it serves the model or LoRA adapter. A worker that told nothing is given the benefit of the doubt."""
        if self.facts is not None and (model in self.facts.models or model in self.facts.loras):
            return True
        if self.spec.models is not None:
            return model in self.spec.models
        return self.facts is None or not (self.facts.models or self.facts.loras)


def complete(spec: WorkerSpec, facts: WorkerFacts) -> WorkerSpec:
    """Fill what was left out of `spec` with what the worker says of itself; what was given stays."""
    return replace(
        spec,
        models=spec.models if spec.models is not None else (*facts.models, *facts.loras),
        events=spec.events or facts.events,
        replay=spec.replay or facts.replay,
        topic=spec.topic or facts.topic,
        dp_size=spec.dp_size or facts.dp_size,
        block_size=spec.block_size or facts.block_size,
        total_kv_blocks=spec.total_kv_blocks or facts.total_kv_blocks,
    )


class WorkerRegistry:
    """Name and id to worker. `version` changes with every change that can change a decision."""

    def __init__(self, on_change: Callable[[Worker], None] | None = None) -> None:
        self.version = 0
        self._by_name: dict[str, Worker] = {}
        self._by_id: dict[int, Worker] = {}
        self._on_change = on_change

    def __len__(self) -> int:
        return len(self._by_name)

    def workers(self) -> list[Worker]:
        """All workers, by name."""
        return [self._by_name[name] for name in sorted(self._by_name)]

    def get(self, worker_id: int) -> Worker | None:
        """The worker with that id."""
        return self._by_id.get(worker_id)

    def named(self, name: str) -> Worker | None:
        """The worker with that name."""
        return self._by_name.get(name)

    def add(self, spec: WorkerSpec) -> Worker:
        """Add a worker.

        Raises:
            ValueError: The name is taken.
        """
        if spec.name in self._by_name:
            raise ValueError(f"worker {spec.name!r} is there already")
        worker = Worker(worker_id_of(spec.name), spec)
        self._by_name[spec.name] = worker
        self._by_id[worker.worker_id] = worker
        self._changed(worker)
        return worker

    def remove(self, name: str) -> Worker | None:
        """Forget a worker and return it."""
        worker = self._by_name.pop(name, None)
        if worker is not None:
            del self._by_id[worker.worker_id]
            self._changed(worker)
        return worker

    def introduced(self, worker: Worker, spec: WorkerSpec, facts: WorkerFacts) -> None:
        """Record what a worker says of itself, and its spec completed by it."""
        worker.spec, worker.facts = spec, facts
        self._changed(worker)

    def set_health(self, worker: Worker, health: WorkerState, reason: str = "") -> None:
        """Record the outcome of a health check or of a request."""
        if (worker.health, worker.health_reason) != (health, reason):
            worker.health, worker.health_reason = health, reason
            self._changed(worker)

    def set_draining(self, worker: Worker, draining: bool) -> None:
        """Stop (or resume) giving it new requests."""
        if worker.draining != draining:
            worker.draining = draining
            self._changed(worker)

    def set_fault(self, worker: Worker, subject: str, fault: Advice | None) -> None:
        """Record what is wrong about a subject (None: nothing any more)."""
        if worker.faults.get(subject) != fault:
            if fault is None:
                del worker.faults[subject]
            else:
                worker.faults[subject] = fault
            self._changed(worker)

    def forgive(self, worker: Worker) -> None:
        """Forget its faults: it is looked at anew."""
        if worker.faults:
            worker.faults.clear()
            self._changed(worker)

    def _changed(self, worker: Worker) -> None:
        self.version += 1
        if self._on_change is not None:
            self._on_change(worker)
