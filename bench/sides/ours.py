"""Side: our own code in process."""

import ctypes
import gc
import itertools
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bench import meter, work
from bench.endpoint import Endpoint
from bench.side import serve
from bench.sides.native import library
from kvrouter_grpc.core import RadixTree, hash_sequence

SEED = 1337
state: dict[str, Any] = {}  # what one call prepares for the next ones


class Operation(NamedTuple):
    """What is measured, and what it is given in turn."""

    call: Callable[[Any], object]
    inputs: list[Any]


operations: dict[str, Operation] = {}


def _register(name: str, call: Callable[[Any], object], inputs: Sequence[Any]) -> Operation:
    operation = operations[name] = Operation(call, list(inputs))
    return operation


def timed(name: str, passes: int) -> dict[str, float]:
    """Microseconds of an operation: `cpu` on average, `p50` and `p99` by the wall clock."""
    call, inputs = operations[name]
    return {"cpu": meter.least_cpu_us(call, inputs, passes), **meter.latencies_us(call, inputs, passes)}


def count(name: str, times: int) -> int:
    """Let callgrind count at most `times` calls of an operation; how many they were."""
    call, inputs = operations[name]
    chosen = list(itertools.islice(itertools.cycle(inputs), times))
    for each in chosen if name not in _ONCE else ():
        call(each)
    counter = library("counter")
    counter.counting_starts()
    for each in chosen:
        call(each)
    counter.counting_ends()
    return len(chosen)


_ONCE = ("store", "remove")  # a second time would be another thing


def hash_prompt(tokens: int, batches: int, repeats: int) -> float:
    """Microseconds of CPU per prompt."""
    operation = _register(f"hash {tokens}", lambda prompt: hash_sequence(prompt, work.BLOCK), [work.prompt(tokens)])
    return meter.least_cpu_us(operation.call, operation.inputs * repeats, batches)


# --- match -----------------------------------------------------------------------------------------------------------


def prepare_match(workers: int, blocks: int, shape: str, background: int, queries: int) -> int:
    """Build the tree of the `match` suite; returns the blocks it holds."""
    tree = RadixTree(work.BLOCK)
    slots = [tree.add_slot() for _ in range(workers)]
    for slot, runs in zip(slots, work.fleet(workers, background // workers), strict=True):
        for run in runs:
            tree.store(slot, run.parent, run.names, run.tokens, SEED)
    asked = []
    for number in range(queries):
        tokens = work.prompt(blocks * work.BLOCK, number)
        for slot, depth in zip(slots, work.match_depths(workers, blocks, shape, number), strict=True):
            if depth:
                names = array("Q", range(number << 32, (number << 32) + depth))
                tree.store(slot, None, names, tokens[: depth * work.BLOCK], SEED)
        asked.append(hash_sequence(tokens, work.BLOCK))
    out = array("I", bytes(4 * workers))
    _register("match", lambda query: tree.match(query, out), asked)
    return tree.stats()["blocks"]


def match(passes: int) -> dict[str, float]:
    """Microseconds of one match."""
    return timed("match", passes)


# --- decide ----------------------------------------------------------------------------------------------------------


def prepare_decide(workers: int, blocks_each: int, lengths: list[int]) -> dict[str, float]:
    """Build the endpoint of the `decide` suite; what `Endpoint.load` says of it."""
    endpoint = Endpoint(workers)
    held = endpoint.load(blocks_each, lengths)
    reply = endpoint.replier()
    for length in lengths:
        requests = [endpoint.request(prompt) for prompt in work.pool(length).queries]
        _register(f"decide {length}", endpoint.decide, requests)
        _register(f"reply {length}", reply, requests)
        _register(f"lease {length}", endpoint.lease, requests)
    state["endpoint"] = endpoint
    return held


def booking(blocks: int, rounds: int) -> dict[str, float]:
    """Microseconds of CPU per block that is booked on a worker of `prepare_decide` and released."""
    endpoint: Endpoint = state["endpoint"]
    return endpoint.booking(blocks, rounds)


# --- events ----------------------------------------------------------------------------------------------------------


def prepare_events(workers: int, blocks_each: int, per_event: int, per_message: int = 1) -> dict[str, int]:
    """Build the messages of the `events` suite."""
    shape = work.Shape(per_event, per_message)
    fleet = list(work.fleet(workers, blocks_each))
    state["stored"] = list(work.rounds([work.stored_messages(runs, shape) for runs in fleet]))
    state["removed"] = list(work.rounds([work.removed_messages(runs, shape) for runs in fleet]))
    state["blocks"] = sum(len(run.names) for runs in fleet for run in runs)
    state["workers"] = workers
    counted = Endpoint(workers)
    for verb, name in (("store", "stored"), ("remove", "removed")):
        _register(verb, counted.apply, state[name])
    gc.collect()
    gc.freeze()
    return {"blocks": state["blocks"], "messages": len(state["stored"])}


def events() -> dict[str, float]:
    """Microseconds of CPU per block stored and removed, from raw messages, into an empty index."""
    endpoint = Endpoint(state["workers"])
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
    warm_up = Endpoint(1)
    for runs in work.fleet(1, blocks_each, seed=2):  # the generator's own memory, before the first reading
        warm_up.feed([(0, message) for message in work.stored_messages(runs, shape)])
    del warm_up
    endpoint = Endpoint(workers)
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
    serve([timed, count, hash_prompt, prepare_match, match, prepare_decide, booking, prepare_events, events, memory])
