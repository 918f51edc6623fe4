"""Side: our own code in process. The one place of the benchmark that knows the router's inner interfaces."""

import asyncio
import ctypes
import gc
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from kvrouter_grpc._gen import router_pb2, router_pb2_grpc
from kvrouter_grpc.config import RouterConfig, ServerConfig
from kvrouter_grpc.core import RadixTree, hash_sequence
from kvrouter_grpc.events.codec import decode_batch
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.server.router_service import RouterService
from kvrouter_grpc.types import Prompt, RoutingHints, StreamState, Target, WorkerSpec, WorkerState

from bench import meter, work
from bench.side import serve

ENDPOINT = "bench.backend.generate"
SEED = 1337
state: dict[str, Any] = {}  # what one call prepares for the next ones


def hash_prompt(tokens: int, batches: int, repeats: int) -> float:
    """Microseconds of CPU per prompt."""
    return meter.least_cpu_us(lambda prompt: hash_sequence(prompt, work.BLOCK), [work.prompt(tokens)] * repeats, batches)


# --- match -----------------------------------------------------------------------------------------------------------


def prepare_match(workers: int, blocks: int, shape: str, background: int, queries: int) -> int:
    """Build the tree of the `match` suite; returns the blocks it holds."""
    tree = RadixTree(work.BLOCK)
    slots = [tree.add_slot() for _ in range(workers)]
    for slot, runs in zip(slots, work.fleet(workers, background // workers), strict=True):
        for run in runs:
            tree.store(slot, run.parent, run.names, run.tokens, SEED)
    state["queries"] = []
    for number in range(queries):
        tokens = work.prompt(blocks * work.BLOCK, number)
        for slot, depth in zip(slots, work.match_depths(workers, blocks, shape, number), strict=True):
            if depth:
                names = array("Q", range(number << 32, (number << 32) + depth))
                tree.store(slot, None, names, tokens[: depth * work.BLOCK], SEED)
        state["queries"].append(hash_sequence(tokens, work.BLOCK))
    state["tree"], state["out"] = tree, array("I", bytes(4 * workers))
    return tree.stats()["blocks"]


def match(passes: int) -> dict[str, float]:
    """Microseconds of one match: `p50` and `p99` of the calls, `cpu` on average."""
    tree, out = state["tree"], state["out"]
    return timed(lambda query: tree.match(query, out), state["queries"], passes)


def timed(call: Callable[[Any], object], inputs: Sequence[Any], passes: int) -> dict[str, float]:
    """`cpu`, `p50` and `p99` of a call, in microseconds."""
    return {"cpu": meter.least_cpu_us(call, inputs, passes), **meter.latencies_us(call, inputs, passes)}


# --- decide ----------------------------------------------------------------------------------------------------------


class _Endpoint:
    """A router with workers that may be picked, as the server would hold it."""

    def __init__(self, workers: int) -> None:
        self.router = Router(ENDPOINT, RouterConfig(seed=1, block_size=work.BLOCK))
        self.targets: list[Target] = []
        for number in range(workers):
            spec = WorkerSpec(f"w{number}", f"http://127.0.0.1:{8000 + number}", ENDPOINT, (work.MODEL,), dp_size=1)
            worker = self.router.workers.add(spec)
            self.router.workers.set_health(worker, WorkerState.READY)
            self.router.add_targets(worker.targets)
            self.router.index.stream(worker.targets[0]).state = StreamState.LIVE
            self.targets += worker.targets

    def feed(self, messages: Sequence[tuple[int, bytes]]) -> float:
        """Apply (worker, message) pairs; microseconds of CPU."""
        index, targets = self.router.index, self.targets
        start = time.process_time_ns()
        for worker, message in messages:
            index.apply(targets[worker], decode_batch(message))
        return (time.process_time_ns() - start) / 1000

    def load(self, blocks_each: int, pools: Sequence[int] = ()) -> int:
        """Cache a fleet's work and the warm prompts of these lengths; returns the blocks held."""
        shape = work.Shape(256)
        for worker, runs in enumerate(work.fleet(len(self.targets), blocks_each)):
            held = [run for length in pools for run in work.pool(length).held_by(worker, len(self.targets))]
            self.feed([(worker, message) for message in work.stored_messages([*runs, *held], shape)])
        return sum(self.router.index.blocks(target) for target in self.targets)


class _Context:
    """What the service asks of a call that fails: nothing here may."""

    async def abort(self, code: Any, details: str, *_: Any) -> None:
        raise AssertionError(f"{code}: {details}")


class _Registry:
    """Takes the handlers that a service registers, as a gRPC server would."""

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}

    def add_registered_method_handlers(self, _service: str, handlers: dict[str, Any]) -> None:
        self.handlers |= handlers

    def add_generic_rpc_handlers(self, _handlers: Any) -> None:
        pass


def prepare_decide(workers: int, blocks_each: int, lengths: list[int]) -> int:
    """Build the endpoint of the `decide` suite; returns the blocks it holds."""
    endpoint = state["endpoint"] = _Endpoint(workers)
    held = endpoint.load(blocks_each, lengths)
    registry = _Registry()
    service = RouterService(ServerConfig(), {ENDPOINT: endpoint.router}, None)  # type: ignore[arg-type]
    router_pb2_grpc.add_KvRouterServicer_to_server(service, registry)  # type: ignore[arg-type]
    state["handler"] = registry.handlers["BestWorkerId"]
    state["requests"] = {
        length: [
            router_pb2.BestWorkerIdRequest(token_ids=prompt, model=work.MODEL).SerializeToString()
            for prompt in work.pool(length).queries
        ]
        for length in lengths
    }
    return held


def decide(length: int, passes: int) -> dict[str, float]:
    """Microseconds from the raw request to the worker."""
    router = state["endpoint"].router

    def call(raw: bytes) -> object:
        request = router_pb2.BestWorkerIdRequest.FromString(raw)
        prompt = Prompt(array("I", request.token_ids))
        return router.best_worker(prompt, RoutingHints(), model=request.model).target

    return timed(call, state["requests"][length], passes)


def serve_call(length: int, passes: int) -> dict[str, float]:
    """Microseconds from the raw request to the raw reply: everything but gRPC itself."""
    handler, context = state["handler"], _Context()
    read, write, method = handler.request_deserializer, handler.response_serializer, handler.unary_unary

    def call(raw: bytes) -> bytes:
        step = method(read(raw), context)
        try:
            step.send(None)
        except StopIteration as done:
            reply: bytes = write(done.value)
            return reply
        raise AssertionError("a decision does not wait")

    return timed(call, state["requests"][length], passes)


# --- events ----------------------------------------------------------------------------------------------------------


def prepare_events(workers: int, blocks_each: int, per_event: int, per_message: int = 1) -> dict[str, int]:
    """Build the messages of the `events` suite."""
    shape = work.Shape(per_event, per_message)
    fleet = list(work.fleet(workers, blocks_each))
    state["stored"] = list(work.rounds([work.stored_messages(runs, shape) for runs in fleet]))
    state["removed"] = list(work.rounds([work.removed_messages(runs, shape) for runs in fleet]))
    state["blocks"] = sum(len(run.names) for runs in fleet for run in runs)
    state["workers"] = workers
    gc.collect()
    gc.freeze()
    return {"blocks": state["blocks"], "messages": len(state["stored"])}


def events() -> dict[str, float]:
    """Microseconds of CPU per block stored and removed, from raw messages, into an empty index."""
    endpoint = _Endpoint(state["workers"])
    index, blocks = endpoint.router.index, state["blocks"]
    stored = endpoint.feed(state["stored"]) / blocks
    held = sum(index.blocks(target) for target in endpoint.targets)
    bytes_per_block = index.stats()["bytes"] / blocks
    removed = endpoint.feed(state["removed"]) / blocks
    left = sum(index.blocks(target) for target in endpoint.targets)
    if (held, left) != (blocks, 0):
        raise AssertionError(f"{held} of {blocks} blocks after storing, {left} after removing")
    return {"store": stored, "remove": removed, "bytes_per_block": bytes_per_block}


def memory(workers: int, blocks_each: int) -> dict[str, float]:
    """Bytes per (worker, block): what the tree counts, and by how much the process grew."""
    shape = work.Shape(32)
    warm_up = _Endpoint(1)
    for runs in work.fleet(1, blocks_each, seed=2):  # the generator's own memory, before the first reading
        warm_up.feed([(0, message) for message in work.stored_messages(runs, shape)])
    del warm_up
    endpoint = _Endpoint(workers)
    before = _trimmed_rss()
    endpoint_blocks = 0
    for worker, runs in enumerate(work.fleet(workers, blocks_each)):
        endpoint.feed([(worker, message) for message in work.stored_messages(runs, shape)])
        endpoint_blocks += sum(len(run.names) for run in runs)
    grown = _trimmed_rss() - before
    stats = endpoint.router.index.stats()
    if stats["blocks"] != endpoint_blocks:
        raise AssertionError(f"{stats['blocks']} of {endpoint_blocks} blocks are held")
    for target in endpoint.targets:
        endpoint.router.index.clear(target)
    left = endpoint.router.index.stats()["bytes"]
    return {
        "counted": stats["bytes"] / endpoint_blocks,
        "rss": grown / endpoint_blocks,
        "counted_after_clear": left / endpoint_blocks,
        "rss_after_clear": (_trimmed_rss() - before) / endpoint_blocks,
    }


def _trimmed_rss() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return meter.rss_bytes()


if __name__ == "__main__":
    serve(
        [hash_prompt, prepare_match, match, prepare_decide, decide, serve_call, prepare_events, events, memory],
        asyncio.run,
    )
