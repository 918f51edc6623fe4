"""Micro-benchmark of the decision: CPU microseconds from token ids to a worker. Run: python bench/decision_micro.py.

Fixed seeds; each figure is the best of a few rounds of CPU time, so that a busy machine disturbs it least.
"""

import json
import random
import time
from array import array
from collections.abc import Callable

from kvrouter_grpc.config import RouterConfig
from kvrouter_grpc.core import RadixTree, TargetTable, hash_sequence
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.types import Prompt, RouterOverride, RoutingHints, StreamState, Target, WorkerSpec, WorkerState

BLOCK = 16
SEED = 1337
VOCABULARY = 128_000
PROMPTS = 50


def best(call: Callable[[int], object], calls: int, rounds: int = 7) -> float:
    """CPU microseconds per call of `call(number)`."""
    times = []
    for _ in range(rounds):
        start = time.thread_time_ns()
        for number in range(calls):
            call(number)
        times.append(time.thread_time_ns() - start)
    return min(times) / calls / 1000


class Fleet:
    """A router over workers whose caches share a system prompt and little else."""

    def __init__(self, workers: int, blocks: int, tiers: int = 1) -> None:
        self.rng = random.Random(workers)
        self.router = Router("a.b.c", RouterConfig(block_size=BLOCK, seed=1))
        self.system = self.tokens(4 * BLOCK)
        self.held: list[array[int]] = []
        for number in range(workers):
            spec = WorkerSpec(f"w{number:04}", f"http://w{number}", "a.b.c", total_kv_blocks=30_000)
            worker = self.router.workers.add(spec)
            self.router.add_targets(worker.targets)
            self.router.workers.set_health(worker, WorkerState.READY)
            for target in worker.targets:
                self.router.index.stream(target).state = StreamState.LIVE
                self.router.index.refresh(target)
                self.fill(target, blocks, tiers)

    def tokens(self, count: int) -> "array[int]":
        """Random token ids."""
        return array("I", self.rng.choices(range(VOCABULARY), k=count))

    def fill(self, target: Target, blocks: int, tiers: int) -> None:
        """Store prompts of mixed lengths on a target, and copies of their first half in lower tiers."""
        targets = self.router.index.targets
        tree, row = targets.index, targets.row(target)
        if tree is None or row is None:
            raise LookupError(target)
        slots = [tree.add_slot() for _ in range(tiers)]
        for tier, slot in enumerate(slots):
            targets.set_slot(row, tier, slot)
        while tree.blocks(slots[0]) < blocks:
            length = self.rng.choice([32, 128, 512])
            tokens = self.system + self.tokens((length - 4) * BLOCK)
            names = array("Q", (self.rng.getrandbits(64) for _ in range(length)))
            tree.store(slots[0], None, names, tokens, SEED)
            for slot in slots[1:]:
                tree.store_known(slot, slots[0], names[: length // 2])
            if len(self.held) < 10 * PROMPTS:
                self.held.append(tokens)

    def prompts(self, count: int) -> list[Prompt]:
        """Prompts of `count` tokens that some worker holds the beginning of."""
        made = []
        for _ in range(PROMPTS):
            known = self.rng.choice(self.held)
            known = known[: self.rng.randrange(len(self.system), len(known) + 1)][:count]
            made.append(Prompt(known + self.tokens(count - len(known))))
        return made


def decisions(name: str, fleet: Fleet, hints: RoutingHints, lengths: tuple[int, ...]) -> dict[str, float]:
    """Whole decisions, of prompts of several lengths."""
    result = {}
    for length in lengths:
        prompts = fleet.prompts(length)
        result[f"{name}, {length} tokens, us"] = best(
            lambda number, prompts=prompts: fleet.router.best_worker(prompts[number % PROMPTS], hints), 2000
        )
    return result


def leases(fleet: Fleet, length: int) -> dict[str, float]:
    """A decision that is booked and released."""
    prompts = fleet.prompts(length)
    return {
        f"lease and release, 64 workers, {length} tokens, us": best(
            lambda number: fleet.router.lease(str(number), prompts[number % PROMPTS], RoutingHints()).release(), 500
        )
    }


def matching() -> dict[str, float]:
    """`RadixTree.match` of a prompt that all workers hold to different lengths."""
    result = {}
    rng = random.Random(2)
    for blocks in (512, 8192):
        tokens = array("I", rng.choices(range(VOCABULARY), k=blocks * BLOCK))
        seqs = hash_sequence(tokens, BLOCK)
        for workers in (8, 64, 256):
            tree = RadixTree(BLOCK)
            for _ in range(workers):
                held = rng.randrange(1, blocks + 1)
                names = array("Q", (rng.getrandbits(64) for _ in range(held)))
                tree.store(tree.add_slot(), None, names, tokens[: held * BLOCK], SEED)
            out = array("I", bytes(4 * workers))
            result[f"match, {blocks} blocks, {workers} workers, us"] = best(
                lambda _, tree=tree, seqs=seqs, out=out: tree.match(seqs, out), 2000
            )
    return result


def booking(blocks: int) -> dict[str, float]:
    """Pinning the blocks of a prompt that nobody shares, and letting go of them."""
    rng = random.Random(3)
    table = TargetTable()
    rows = [table.add(number) for number in range(64)]
    paths = [array("Q", (rng.getrandbits(64) for _ in range(blocks))) for _ in rows]
    for row in rows:
        table.book(row, array("Q", (rng.getrandbits(64) for _ in range(4096))), 0, True)
    booked: list[float] = []
    released: list[float] = []
    for _ in range(15):
        start = time.thread_time_ns()
        tickets = [table.book(row, path, 0, True) for row, path in zip(rows, paths, strict=True)]
        middle = time.thread_time_ns()
        for ticket, path in zip(tickets, paths, strict=True):
            table.release(ticket, path, True)
        booked.append(middle - start)
        released.append(time.thread_time_ns() - middle)
    per = len(rows) * blocks
    return {f"book {blocks}, ns/block": min(booked) / per, f"release {blocks}, ns/block": min(released) / per}


def main() -> None:
    """Prints a table, and as the last line the same as JSON."""
    free = RoutingHints()
    dynamo = RoutingHints(override=RouterOverride(cost="dynamo"))
    result = matching() | booking(512) | booking(2048)
    fleet = Fleet(64, 20_000)
    stats = fleet.router.index.stats()
    result["bytes per (worker, block), 64 x 20,000"] = stats["bytes"] / stats["blocks"]
    result |= decisions("64 workers", fleet, free, (512, 8192, 32_768))
    result |= decisions("64 workers, cost dynamo", fleet, dynamo, (8192,))
    result |= leases(fleet, 512) | leases(fleet, 8192)
    result |= decisions("64 workers, two tiers", Fleet(64, 2000, tiers=2), free, (8192,))
    result |= decisions("1,024 workers", Fleet(1024, 1000), free, (512, 8192, 32_768))
    for name, value in result.items():
        print(f"{name:<48}{value:>10.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
