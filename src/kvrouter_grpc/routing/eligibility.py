"""The rules of which targets may take a request, and the errors that say why none may."""

from collections.abc import Sequence

from kvrouter_grpc.errors import (
    AllWorkersOverloadedError,
    InvalidRequestError,
    NoWorkersError,
    PinnedWorkerNotAllowedError,
    PinnedWorkerOverloadedError,
    PinnedWorkerUnavailableError,
    UnknownModelError,
    UnknownWorkerError,
)
from kvrouter_grpc.routing.workers import Worker, WorkerRegistry
from kvrouter_grpc.types import RoutingHints, RoutingRequest, Target, WorkerState


def why_not(worker: Worker, target: Target, request: RoutingRequest) -> str:
    """Why `target` may not take the request; "" when it may. The first reason found is given."""
    hints, model = request.hints, request.model
    if target in request.exclude:
        return "failed this request before its first token"
    if hints.worker_id is not None and (
        worker.worker_id != hints.worker_id or hints.dp_rank not in (None, target.dp_rank)
    ):
        return "not the pinned worker"
    if hints.allowed_worker_ids is not None and worker.worker_id not in hints.allowed_worker_ids:
        return "not in allowed_worker_ids"
    if worker.state is not WorkerState.READY:
        return f"{worker.state.value}: {worker.reason}"
    if model and not worker.serves(model):
        return f"does not serve {model!r}"
    missing = hints.required_taints - worker.spec.taints
    if missing:
        return "lacks required taint " + ", ".join(sorted(missing))
    return ""


def pinned(registry: WorkerRegistry, hints: RoutingHints) -> Worker | None:
    """The worker that a request is pinned to, None without a pin: one that it allows, of which it names one rank.

    Raises:
        UnknownWorkerError: No worker has the pinned id.
        PinnedWorkerNotAllowedError: The request's own `allowed_worker_ids` leave it out.
        InvalidRequestError: The rank is missing although the worker has several, or it has no such rank.
    """
    if hints.worker_id is None:
        return None
    worker = registry.get(hints.worker_id)
    if worker is None:
        raise UnknownWorkerError(
            f"routing.worker_id: no worker has the id {hints.worker_id}; ListWorkers names those there are",
            metadata={"worker_id": str(hints.worker_id)},
        )
    if hints.allowed_worker_ids is not None and worker.worker_id not in hints.allowed_worker_ids:
        raise PinnedWorkerNotAllowedError(
            f"routing.worker_id: {worker.spec.name} is pinned but not in allowed_worker_ids",
            metadata={"worker": worker.spec.name},
        )
    if hints.dp_rank is None:
        if worker.dp_size > 1:
            raise InvalidRequestError(
                [("routing.dp_rank", f"{worker.spec.name} has {worker.dp_size} ranks; say which is pinned")]
            )
    elif hints.dp_rank >= worker.dp_size:
        raise InvalidRequestError(
            [("routing.dp_rank", f"{worker.spec.name} has ranks 0 to {worker.dp_size - 1}, not {hints.dp_rank}")]
        )
    return worker


def not_pinned() -> InvalidRequestError:
    """The error of a request without a pin where every request needs one."""
    return InvalidRequestError(
        [("routing.worker_id", "is not given; with --router-mode direct every request names its worker")]
    )


def check_model(workers: Sequence[Worker], model: str) -> None:
    """Make sure that some worker, ready or not, serves the model.

    Raises:
        UnknownModelError: None does.
    """
    if model and workers and not any(worker.serves(model) for worker in workers):
        served = sorted({name for worker in workers for name in worker.spec.models or ()})
        raise UnknownModelError(
            f"model: no worker serves {model!r}; served are {', '.join(served) or 'none yet'}",
            metadata={"model": model},
        )


def overloaded(
    endpoint: str, worker: Worker, hints: RoutingHints
) -> AllWorkersOverloadedError | PinnedWorkerOverloadedError:
    """The error of a request whose workers are all above a threshold; `worker` is one of them."""
    if hints.worker_id is not None:
        return PinnedWorkerOverloadedError(
            f"routing.worker_id: {worker.spec.name} is above a threshold of its endpoint; a pin is never rerouted",
            metadata={"worker": worker.spec.name},
        )
    return AllWorkersOverloadedError(
        f"every worker of endpoint {endpoint} that could take the request is above one of its thresholds "
        "(--active-decode-blocks-threshold, --active-prefill-tokens-threshold[-frac])",
        metadata={"endpoint": endpoint},
    )


def none_eligible(
    endpoint: str, drops: Sequence[tuple[Worker, Target, str]], hints: RoutingHints
) -> NoWorkersError | PinnedWorkerUnavailableError:
    """The error that says why nobody can take the request."""
    if not drops:
        return NoWorkersError(
            f"endpoint {endpoint} has no workers; add one with --worker, --workers-file or RegisterWorker",
            metadata={"endpoint": endpoint},
        )
    if hints.worker_id is not None:
        for worker, _, reason in drops:
            if worker.worker_id == hints.worker_id and reason != "not the pinned worker":
                return PinnedWorkerUnavailableError(
                    f"routing.worker_id: {worker.spec.name} cannot take the request ({reason}); "
                    "a pin is never rerouted",
                    metadata={"worker": worker.spec.name},
                )
    reasons = "; ".join(dict.fromkeys(f"{worker.spec.name}: {reason}" for worker, _, reason in drops[:8]))
    return NoWorkersError(
        f"no worker of endpoint {endpoint} can take the request ({reasons})", metadata={"endpoint": endpoint}
    )
