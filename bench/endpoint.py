"""The router of one endpoint in this process: the one place of the benchmark that knows its inner interfaces."""

import random
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from bench import work
from kvrouter_grpc._gen import router_pb2, router_pb2_grpc
from kvrouter_grpc.config import RouterConfig, ServerConfig
from kvrouter_grpc.core import TokenIds, read_plain
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.server.router_service import RouterService
from kvrouter_grpc.types import Prompt, RoutingRequest, StreamState, Target, WorkerSpec, WorkerState

ENDPOINT = "bench.backend.generate"


class Endpoint:
    """A router with workers that may be picked, as the server would hold it.

    Args:
        workers: How many.
        config: The policy; None for the defaults.
        clock: Monotonic seconds.
        rooms: Blocks that each worker's cache has room for; None: not known.

    Attributes:
        router: The router.
        targets: One per worker, in their order.
    """

    def __init__(
        self,
        workers: int,
        config: RouterConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        rooms: Sequence[int] | None = None,
    ) -> None:
        self.router = Router(ENDPOINT, config or RouterConfig(seed=1, block_size=work.BLOCK), clock=clock)
        self.targets: list[Target] = []
        for number in range(workers):
            spec = WorkerSpec(
                f"w{number}",
                f"http://127.0.0.1:{8000 + number}",
                ENDPOINT,
                (work.MODEL,),
                dp_size=1,
                total_kv_blocks=rooms[number] if rooms else None,
            )
            worker = self.router.workers.add(spec)
            self.router.workers.set_health(worker, WorkerState.READY)
            self.router.add_targets(worker.targets)
            for target in worker.targets:
                self.router.index.stream(target).state = StreamState.LIVE
                self.router.index.refresh(target)
            self.targets += worker.targets
        self._apply = self.router.index.apply_payload

    def blocks(self) -> int:
        """Blocks held, over all workers."""
        return sum(self.router.index.blocks(target) for target in self.targets)

    # --- events ------------------------------------------------------------------------------------------------------

    def apply(self, message: tuple[int, bytes]) -> None:
        """Apply one message of a worker, given by its number."""
        worker, payload = message
        self._apply(self.targets[worker], payload)

    def feed(self, messages: Sequence[tuple[int, bytes]]) -> float:
        """Apply (worker, message) pairs; microseconds of CPU."""
        targets, apply = self.targets, self._apply
        start = time.process_time_ns()
        for worker, payload in messages:
            apply(targets[worker], payload)
        return (time.process_time_ns() - start) / 1000

    def load(self, blocks_each: int, pools: Sequence[int] = ()) -> dict[str, float]:
        """Cache a fleet's work and the warm prompts of these lengths.

        Returns:
            The `blocks` held, and per block the microseconds of CPU it took (`store_us`) and the `bytes` of the index.
        """
        shape, taken = work.Shape(256), 0.0
        for worker, runs in enumerate(work.fleet(len(self.targets), blocks_each)):
            held = [run for length in pools for run in work.pool(length).held_by(worker, len(self.targets))]
            taken += self.feed([(worker, message) for message in work.stored_messages([*runs, *held], shape)])
        stats = self.router.index.stats()
        blocks = stats["blocks"]
        return {"blocks": blocks, "store_us": taken / blocks, "bytes": stats["bytes"] / blocks}

    # --- decisions ---------------------------------------------------------------------------------------------------

    def request(self, prompt: "array[int]") -> bytes:
        """A BestWorkerId request as it comes over the wire."""
        return router_pb2.BestWorkerIdRequest(token_ids=prompt, model=work.MODEL).SerializeToString()

    def decide(self, raw: bytes) -> Target:
        """The worker for a request."""
        tokens, model = _read(raw)
        return self.router.choose(tokens, model)[0].target

    def lease(self, raw: bytes) -> None:
        """Decide a request, book it, and take it back as if it had been answered."""
        tokens, model = _read(raw)
        self.router.lease(RoutingRequest(Prompt(tokens), model=model, request_id="bench")).release()

    def booking(self, blocks: int, rounds: int) -> dict[str, float]:
        """Microseconds of CPU per block to `book` a request whose blocks nobody shares, and to `release` it."""
        table, rng = self.router.index.targets, random.Random(3)
        rows = [row for target in self.targets if (row := table.row(target)) is not None]
        paths = [array("Q", (rng.getrandbits(64) for _ in range(blocks))) for _ in rows]
        for row in rows:  # what is booked on it already
            table.book(row, array("Q", (rng.getrandbits(64) for _ in range(4096))), 0, True)
        best = {"book": float("inf"), "release": float("inf")}
        for _ in range(rounds):
            started = time.process_time_ns()
            tickets = [table.book(row, path, 0, True) for row, path in zip(rows, paths, strict=True)]
            booked = time.process_time_ns()
            for ticket, path in zip(tickets, paths, strict=True):
                table.release(ticket, path, True)
            released = time.process_time_ns()
            best["book"] = min(best["book"], booked - started)
            best["release"] = min(best["release"], released - booked)
        return {verb: taken / len(rows) / blocks / 1000 for verb, taken in best.items()}

    def replier(self) -> Callable[[bytes], bytes]:
        """What turns a request into the reply as it goes over the wire: all but gRPC itself."""
        service: Any = RouterService(ServerConfig(), {ENDPOINT: self.router}, None)  # type: ignore[arg-type]
        handler, context = _handlers(service)["BestWorkerId"], _Context()
        read, write, method = handler.request_deserializer, handler.response_serializer, handler.unary_unary

        def reply(raw: bytes) -> bytes:
            step = method(read(raw) if read else raw, context)
            try:
                step.send(None)
            except StopIteration as done:
                written: bytes = write(done.value) if write else done.value
                return written
            raise AssertionError("a decision does not wait")

        return reply


def _read(raw: bytes) -> tuple[TokenIds, str]:
    plain = read_plain(raw, sys.maxsize, 2**31)
    if plain is None:
        raise ValueError("no plain request")
    tokens, _, model, _ = plain
    return tokens, model


class _Context:
    """What the service asks of a call that fails: nothing here may."""

    async def abort(self, code: Any, details: str, *_: Any) -> None:
        raise AssertionError(f"{code}: {details}")


class _Registry(dict[str, Any]):
    """Takes the handlers that a service registers, as a gRPC server would."""

    def add_registered_method_handlers(self, _service: str, handlers: dict[str, Any]) -> None:
        self.update(handlers)

    def add_generic_rpc_handlers(self, _handlers: Any) -> None:
        pass


def _handlers(service: Any) -> dict[str, Any]:
    if hasattr(service, "handlers"):
        return dict(service.handlers())
    registry = _Registry()
    router_pb2_grpc.add_KvRouterServicer_to_server(service, registry)  # type: ignore[arg-type]
    return registry
