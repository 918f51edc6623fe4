"""The targets of an endpoint by row, and which of them may take a request."""

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from kvrouter_grpc.core import Shortlist, TargetTable, hash_bytes, seed_for
from kvrouter_grpc.errors import UnknownModelError
from kvrouter_grpc.routing import eligibility
from kvrouter_grpc.routing.mode import CPU_TAINT
from kvrouter_grpc.routing.workers import Worker, WorkerRegistry
from kvrouter_grpc.types import Prompt, Role, RouterOverride, RoutingRequest, Target

_K = TypeVar("_K")
_V = TypeVar("_V")

MOST_NAMES = 256
"""Models whose answers are kept at a time: names come from requests."""

NO_ROW = "starting: its ranks are not set up yet"


@dataclass(slots=True, eq=False)
class Seat:
    """Whose row it is, until something about the workers changes.

    Attributes:
        reply_head: Kept here for whoever writes replies that name it; "" until then.
    """

    worker: Worker
    target: Target
    reply_head: bytes = b""


class LeftOut(NamedTuple):
    """A target that could not take a request."""

    target: Target
    worker_name: str
    reason: str


class Occasion(NamedTuple):
    """What explains a decision beside the rows that it read; never changed, so that it can be remembered."""

    seats: Mapping[int, Seat]  # by row
    left_out: tuple[LeftOut, ...]
    override: RouterOverride | None = None  # change of the policy for this request
    prefilled: bool = False  # another worker computed the prompt


class Lane(NamedTuple):
    """What prompts for one model are decided by that ask for nothing else."""

    request: RoutingRequest  # one of them, without its prompt
    shortlist: Shortlist
    seed: int  # of the block hashes


@dataclass(slots=True)
class _Picture:
    """What was worked out of one state of the registry and the table."""

    versions: tuple[int, int]
    workers: list[Worker]  # by name
    seats: dict[int, Seat]  # by row
    role: Role
    loras: frozenset[str]  # adapters that somebody serves
    shortlists: dict[str, Shortlist] = field(default_factory=dict)  # by model, of requests that leave nobody out
    models: dict[tuple[str, str], str] = field(default_factory=dict)
    lanes: dict[str, Lane] = field(default_factory=dict)  # by model as it is asked for


class Roster:
    """Answers who may take a request from what it worked out once per change of the workers.

    Args:
        endpoint: Named in errors.
        workers: Its workers.
        table: The rows of their targets; a target without a row is not picked.
    """

    def __init__(self, endpoint: str, workers: WorkerRegistry, table: TargetTable) -> None:
        self._endpoint = endpoint
        self._workers = workers
        self._table = table
        self._last = self._draw()

    @property
    def workers(self) -> list[Worker]:
        """All workers, by name."""
        return self._picture().workers

    @property
    def role(self) -> Role:
        """What the workers are for; `BOTH` unless all of them agree on something else."""
        return self._picture().role

    def is_lora(self, model: str) -> bool:
        """Whether somebody serves `model` as an adapter."""
        return model in self._picture().loras

    def seat(self, row: int) -> Seat:
        """Whose row it is, as of the last `shortlist` or `lane`."""
        return self._last.seats[row]

    def lane(self, model: str) -> Lane:
        """What prompts for `model` are decided by that ask for nothing else. Raises as `shortlist` and `model_for`."""
        picture = self._picture()
        lane = picture.lanes.get(model)
        if lane is None:
            adapter = model if model in picture.loras else ""
            request = _plain(self.model_for(model, adapter))
            lane = Lane(request, self.shortlist(request), seed_for(adapter, ""))
            _keep(picture.lanes, model, lane)
        return lane

    def shortlist(self, request: RoutingRequest, *, explained: bool = True) -> Shortlist:
        """The targets that may take a request, by name and rank, as `eligibility.why_not` has it; at least one.

        Args:
            request: The request.
            explained: Whether its occasion is needed.

        Raises:
            RouterError: There is none; the class and message say why.
        """
        picture = self._picture()
        hints = request.hints
        pinned = eligibility.pinned(self._workers, hints) if hints.worker_id is not None else None
        shortlist = picture.shortlists.get(request.model)
        if shortlist is None:
            eligibility.check_model(picture.workers, request.model)
            plain = _plain(request.model)
            shortlist = Shortlist(self._eligible(picture.workers, plain), self._occasion(plain))
            _keep(picture.shortlists, request.model, shortlist)
        if pinned or hints.allowed_worker_ids is not None or hints.required_taints or request.exclude:
            rows = self._eligible([pinned] if pinned else picture.workers, request)
            shortlist = Shortlist(rows, self._occasion(request) if explained else None)
        if not shortlist.rows:
            raise eligibility.none_eligible(self._endpoint, list(self._drops(request)), hints)
        return shortlist

    def _drops(self, request: RoutingRequest) -> Iterator[tuple[Worker, Target, str]]:
        """The targets that may not take it, each with the reason."""
        for worker in self._picture().workers:
            for target in worker.targets:
                reason = eligibility.why_not(worker, target, request)
                if not reason and self._table.row(target) is None:
                    reason = NO_ROW
                if reason:
                    yield worker, target, reason

    def model_for(self, model: str, lora_name: str) -> str:
        """The name under which the engine knows what is asked for.

        Raises:
            UnknownModelError: Neither is given and the workers serve several base models, or none serves the name.
        """
        picture = self._picture()
        name = picture.models.get((model, lora_name))
        if name is None:
            name = _model_for(picture.workers, lora_name or model)
            _keep(picture.models, (model, lora_name), name)
        return name

    def _eligible(self, workers: list[Worker], request: RoutingRequest) -> "array[int]":
        rows = array("I")
        for worker in workers:
            for target in worker.targets:
                if not eligibility.why_not(worker, target, request):
                    row = self._table.row(target)
                    if row is not None:
                        rows.append(row)
        return rows

    def _occasion(self, request: RoutingRequest) -> Occasion:
        left_out = (LeftOut(target, worker.spec.name, reason) for worker, target, reason in self._drops(request))
        return Occasion(self._picture().seats, tuple(left_out))

    def _picture(self) -> _Picture:
        if self._last.versions != (self._workers.version, self._table.version):
            self._last = self._draw()
        return self._last

    def _draw(self) -> _Picture:
        versions = self._workers.version, self._table.version
        workers = self._workers.workers()
        seats = {}
        for worker in workers:
            for target in worker.targets:
                row = self._table.row(target)
                if row is not None:
                    seats[row] = Seat(worker, target)
                    self._table.describe(
                        row,
                        total_blocks=worker.spec.total_kv_blocks or 0,
                        identity=hash_bytes(b"%d/%d" % target, 0),
                        pool=hash_bytes(_base_model(worker).encode(), 0),
                        on_cpu=CPU_TAINT in worker.spec.taints,
                        batch_tokens=worker.spec.max_num_batched_tokens or 0,
                    )
        roles = {worker.spec.role for worker in workers}
        role = roles.pop() if len(roles) == 1 else Role.BOTH
        loras = frozenset(lora for worker in workers if worker.facts for lora in worker.facts.loras)
        return _Picture(versions, workers, seats, role, loras)


def _plain(model: str) -> RoutingRequest:
    """A request for a model that asks for nothing else."""
    return RoutingRequest(_NO_PROMPT, model=model)


_NO_PROMPT = Prompt(array("I"))


def _model_for(workers: list[Worker], wanted: str) -> str:
    if wanted:
        eligibility.check_model(workers, wanted)
        return wanted
    bases = {base for worker in workers if (base := _base_model(worker))}
    if len(bases) > 1:
        raise UnknownModelError(f"model: the endpoint serves {', '.join(sorted(bases))}; name one")
    return bases.pop() if bases else ""


def _base_model(worker: Worker) -> str:
    """The model that a worker loaded; "" while that is not known."""
    models = worker.spec.models if worker.facts is None else worker.facts.models
    return models[0] if models else ""


def _keep(kept: dict[_K, _V], key: _K, value: _V) -> None:
    if len(kept) >= MOST_NAMES:
        kept.clear()
    kept[key] = value
