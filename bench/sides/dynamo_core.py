"""Side: the `RadixTree` and the block hash of the Dynamo bindings. Runs in their environment."""

import ctypes
import gc
import json
import time
from array import array
from typing import Any

import xxhash
from dynamo._core import RadixTree, compute_block_hash_for_seq

from bench import meter, work
from bench.side import serve

SEED = 1337
state: dict[str, Any] = {}


def hash_prompt(tokens: int, batches: int, repeats: int) -> float:
    """Microseconds of CPU per prompt; block hashes only."""
    return _hash(tokens, work.BLOCK, batches, repeats)


def convert_prompt(tokens: int, batches: int, repeats: int) -> float:
    """The same with a block larger than the prompt: nothing is hashed, the list is only converted."""
    return _hash(tokens, tokens + 1, batches, repeats)


def _hash(tokens: int, block: int, batches: int, repeats: int) -> float:
    prompts = [work.prompt(tokens).tolist()] * repeats
    return meter.least_cpu_us(lambda prompt: compute_block_hash_for_seq(prompt, block), prompts, batches)


def _locals(tokens: "array[int]") -> list[int]:
    data, size = tokens.tobytes(), 4 * work.BLOCK
    return [xxhash.xxh3_64_intdigest(data[at : at + size], SEED) for at in range(0, len(data), size)]


def _stored(number: int, run: work.Run) -> bytes:
    blocks = [
        {"block_hash": name, "tokens_hash": local} for name, local in zip(run.names, _locals(run.tokens), strict=True)
    ]
    data = {"stored": {"parent_hash": run.parent, "blocks": blocks}}
    return json.dumps({"event_id": number, "data": data, "dp_rank": 0}).encode()


def _removed(number: int, part: "array[int]") -> bytes:
    return json.dumps({"event_id": number, "data": {"removed": {"block_hashes": list(part)}}, "dp_rank": 0}).encode()


def _stored_messages(runs: list[work.Run], per_event: int) -> list[bytes]:
    return [_stored(number, part) for number, part in enumerate(part for run in runs for part in run.split(per_event))]


def prepare_match(workers: int, blocks: int, shape: str, background: int, queries: int) -> int:
    """Build the tree of the `match` suite."""
    tree = RadixTree()
    for worker, runs in enumerate(work.fleet(workers, background // workers)):
        for message in _stored_messages(runs, 256):
            tree.apply_event(worker, message)
    state["queries"] = []
    for number in range(queries):
        tokens = work.prompt(blocks * work.BLOCK, number)
        for worker, depth in enumerate(work.match_depths(workers, blocks, shape, number)):
            names = array("Q", range((number + 1) << 32, ((number + 1) << 32) + depth))
            run = work.Run(None, names, tokens[: depth * work.BLOCK])
            for message in _stored_messages([run], 256):
                tree.apply_event(worker, message)
        state["queries"].append(_locals(tokens))
    state["tree"] = tree
    depths = tree.find_matches(state["queries"][0], False).scores
    if max(depths.values()) != max(work.match_depths(workers, blocks, shape, 0)):
        raise AssertionError(f"the tree holds {depths}")
    return 0


def match(passes: int) -> dict[str, float]:
    """Microseconds of one match: `p50` and `p99` of the calls, `cpu` on average."""
    tree, queries = state["tree"], state["queries"]

    def call(query: list[int]) -> object:
        return tree.find_matches(query, False).scores

    return {"cpu": meter.least_cpu_us(call, queries, passes), **meter.latencies_us(call, queries, passes)}


def prepare_events(workers: int, blocks_each: int, per_event: int) -> dict[str, int]:
    """Build the messages of the `events` suite."""
    fleet = list(work.fleet(workers, blocks_each))
    state["stored"] = list(work.rounds([_stored_messages(runs, per_event) for runs in fleet]))
    removed = [[_removed(number, part) for number, part in enumerate(work.removals(runs, per_event))] for runs in fleet]
    state["removed"] = list(work.rounds(removed))
    state["blocks"] = sum(len(run.names) for runs in fleet for run in runs)
    state["probe"] = _locals(fleet[0][0].tokens)
    gc.collect()
    gc.freeze()
    return {"blocks": state["blocks"], "messages": len(state["stored"])}


def events() -> dict[str, float]:
    """Microseconds of CPU per block stored and removed, with ready hashes, into an empty tree."""
    tree = RadixTree()
    stored = _feed(tree, state["stored"]) / state["blocks"]
    held = tree.find_matches(state["probe"], False).scores
    removed = _feed(tree, state["removed"]) / state["blocks"]
    left = tree.find_matches(state["probe"], False).scores
    if max(held.values(), default=0) != len(state["probe"]) or left:
        raise AssertionError(f"{held} after storing, {left} after removing")
    return {"store": stored, "remove": removed}


def _feed(tree: Any, messages: list[tuple[int, bytes]]) -> float:
    start = time.process_time_ns()
    for worker, message in messages:
        tree.apply_event(worker, message)
    tree.find_matches([0], False)  # the tree lives in a thread of its own: wait until it is through
    return (time.process_time_ns() - start) / 1000


def memory(workers: int, blocks_each: int) -> dict[str, float]:
    """Bytes per (worker, block) by which the process grew."""
    warm_up = RadixTree()
    for runs in work.fleet(1, blocks_each, seed=2):
        _feed(warm_up, [(0, message) for message in _stored_messages(runs, 32)])
    del warm_up
    tree = RadixTree()
    before, blocks = _trimmed_rss(), 0
    for worker, runs in enumerate(work.fleet(workers, blocks_each)):
        _feed(tree, [(worker, message) for message in _stored_messages(runs, 32)])
        blocks += sum(len(run.names) for run in runs)
    grown = _trimmed_rss() - before
    for worker in range(workers):
        tree.clear_all_blocks(worker)
    tree.find_matches([0], False)
    return {"rss": grown / blocks, "rss_after_clear": (_trimmed_rss() - before) / blocks}


def _trimmed_rss() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return meter.rss_bytes()


if __name__ == "__main__":
    serve([hash_prompt, convert_prompt, prepare_match, match, prepare_events, events, memory])
