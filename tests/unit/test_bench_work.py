"""The benchmark's work: the same in every process, and what its description says."""

import hashlib
import subprocess
import sys
from collections import Counter

import pytest
from bench import work
from bench.endpoint import Endpoint
from bench.side import ROOT, environment

from kvrouter_grpc.core import hash_sequence
from kvrouter_grpc.types import Prompt

BLOCKS = 700
DIGEST = """
import hashlib
from bench import work
shape = work.Shape(32, 2)
messages = [message for runs in work.fleet(2, 700) for message in work.stored_messages(runs, shape)]
print(hashlib.sha256(b"".join([*messages, work.prompt(512).tobytes(), *map(bytes, work.pool(512).queries)])).hexdigest())
"""


def test_every_process_makes_the_same_bytes() -> None:
    digests = set()
    for seed in ("1", "2"):
        env = environment() | {"PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", DIGEST], env=env, cwd=ROOT, capture_output=True, check=True)
        digests.add(done.stdout)
    assert len(digests) == 1
    assert len(next(iter(digests)).strip()) == 2 * hashlib.sha256().digest_size


def test_workers_hold_as_much_as_they_shall_below_parents_that_they_hold() -> None:
    for runs in work.fleet(3, BLOCKS):
        held: set[int] = set()
        for run in runs:
            assert run.parent is None or run.parent in held
            assert len(run.tokens) == work.BLOCK * len(run.names)
            held.update(run.names)
        assert len(held) == sum(len(run.names) for run in runs) == BLOCKS


def test_workers_share_system_prompts_only() -> None:
    fleet = list(work.fleet(4, 5000))
    holders = Counter(name for runs in fleet for run in runs for name in run.names)
    roots = {name for runs in fleet for run in runs if run.parent is None for name in run.names}
    assert all((count > 1) <= (name in roots) for name, count in holders.items())
    assert max(holders.values()) == 4


@pytest.mark.parametrize("shape", [work.Shape(1, 1), work.Shape(1, 32), work.Shape(32, 1), work.Shape(256, 3)])
def test_messages_tell_the_router_exactly_what_is_held(shape: work.Shape) -> None:
    endpoint = Endpoint(2)
    fleet = list(work.fleet(2, BLOCKS))
    stored = list(work.rounds([work.stored_messages(runs, shape) for runs in fleet]))
    endpoint.feed(stored)
    index = endpoint.router.index
    assert [index.blocks(target) for target in endpoint.targets] == [BLOCKS, BLOCKS]
    assert [index.orphans(target) for target in endpoint.targets] == [0, 0]

    endpoint.feed(list(work.rounds([work.removed_messages(runs, shape) for runs in fleet])))
    assert [index.blocks(target) for target in endpoint.targets] == [0, 0]
    assert index.stats()["unknown_removes"] == 0


def test_prompts_of_a_pool_are_held_as_described() -> None:
    endpoint = Endpoint(8)
    endpoint.load(64, [512])
    index, shared = endpoint.router.index, 512 * 3 // 4 // work.BLOCK
    for position, prompt in enumerate(work.pool(512).queries):
        overlaps = index.overlaps(index.sequence(Prompt(prompt)), endpoint.targets)
        assert max(overlap.device for overlap in overlaps) == (shared if position % 2 == 0 else 0)


def test_messages_are_taken_in_turn_and_in_order() -> None:
    queues = [[b"a0", b"a1", b"a2"], [b"b0"], [b"c0", b"c1"]]
    taken = list(work.rounds(queues))
    assert [message for _, message in taken] == [b"a0", b"b0", b"c0", b"a1", b"c1", b"a2"]
    assert all(message in queues[worker] for worker, message in taken)


def test_depths_of_a_match() -> None:
    assert work.match_depths(4, 512, "part", 0) == [128] * 4
    assert work.match_depths(8, 512, "full", 1) == [256, 512, 128, 128, 256, 128, 128, 128]


def test_hashes_of_a_prompt_split_into_runs_are_those_of_the_prompt() -> None:
    tokens = work.prompt(100 * work.BLOCK)
    run = work.Run(None, work.prompt(200)[:100], tokens)
    parts = list(run.split(32))
    assert [len(part.names) for part in parts] == [32, 32, 32, 4]
    assert [part.parent for part in parts] == [None, *(part.names[-1] for part in parts[:-1])]
    whole = b"".join(part.tokens.tobytes() for part in parts)
    assert whole == tokens.tobytes()
    assert len(hash_sequence(tokens, work.BLOCK)) == 100
