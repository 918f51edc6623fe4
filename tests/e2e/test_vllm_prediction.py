"""What the router predicts of the engines' caches is what the engines then find there."""

import random

import pytest

from e2e.conftest import Prompts
from e2e.engines import Engine
from e2e.router import Router

pytestmark = pytest.mark.vllm


async def test_a_longer_prompt_goes_where_its_prefix_ran(fleet: list[Engine], router: Router, prompt: Prompts) -> None:
    for blocks, engine in zip((3, 7), fleet, strict=True):
        size = engine.block_size
        prefix = prompt(blocks * size + 5)  # the five tokens are no block yet
        reply = await router.generate(prefix, routing=await router.pin(engine))
        assert (reply.routing.worker_name, reply.usage.cached_tokens) == (engine.name, 0)
        await router.settle(engine)

        longer = prefix + prompt(3 * size)
        best = await router.client.best_worker_id(longer)
        assert best.worker_name == engine.name
        assert best.worker_id == reply.routing.worker_id
        assert best.url == engine.url
        assert best.overlap.device_blocks == best.overlap_blocks == blocks
        assert best.expected_cached_tokens == blocks * size
        assert best.prompt_tokens == len(longer)
        assert best.block_size == size
        assert best.freshness == 1.0
        held = {other.name: blocks if other is engine else 0 for other in fleet}
        assert await router.overlaps(longer) == {(name, 0): count for name, count in held.items()}

        unpinned = await router.generate(longer)
        assert unpinned.routing.worker_name == engine.name
        assert unpinned.usage.cached_tokens == unpinned.routing.expected_cached_tokens == blocks * size


async def test_every_prediction_is_what_the_engine_reports(
    fleet: list[Engine], router: Router, prompt: Prompts, request: pytest.FixtureRequest
) -> None:
    """A workload of growing conversations, several times the size of both caches, routed freely."""
    source = random.Random(request.node.nodeid)
    size = fleet[0].block_size
    histories = [prompt(4 * size)]
    hits = misses = full = evicted = 0
    for _ in range(60):
        base = source.choice(histories)
        kept = base[: source.randrange(len(base) + 1)]  # a conversation goes on, or branches off
        if source.random() < 0.3:
            kept = kept[: len(kept) // size * size]
        asked = kept + prompt(source.choice([0, 1, size // 2, size, 2 * size + 3]))
        asked = (asked or prompt(size))[-18 * size :]
        reply = await router.generate(asked, max_tokens=source.choice([1, 2, size]))
        assert reply.usage.prompt_tokens == reply.routing.prompt_tokens == len(asked)
        assert reply.usage.cached_tokens == reply.routing.expected_cached_tokens, f"{len(asked)} tokens"
        histories.append(asked + reply.token_ids)
        cached = reply.usage.cached_tokens or 0
        hits += cached > 0
        misses += cached == 0
        full += cached == len(asked) - size  # all held, and the last block computed anyway
        evicted += cached < len(kept) // size * size - size
        served = next(engine for engine in fleet if engine.name == reply.routing.worker_name)
        await router.settle(served)
    assert min(hits, misses, full, evicted) > 0, f"{hits=} {misses=} {full=} {evicted=}"

    streams = [await router.event_stream(engine) for engine in fleet]
    assert sum(stream.hits.exact for stream in streams) == 60
    assert {(stream.hits.over, stream.hits.under, stream.hits.told) for stream in streams} == {(0, 0, True)}
    assert [stream.freshness for stream in streams] == [1.0, 1.0]


async def test_eviction_lowers_the_overlap_to_what_the_engine_still_hits(
    fleet: list[Engine], router: Router, prompt: Prompts
) -> None:
    engine = fleet[0]
    size = engine.block_size
    lengths = [4 + index % 7 for index in range(2 * engine.usable_blocks // 7)]  # in blocks
    prompts = [prompt(blocks * size) for blocks in lengths]
    pin = await router.pin(engine)
    for asked in prompts:
        await router.generate(asked, routing=pin)
    await router.settle(engine)

    held = [await router.overlap(engine, asked) for asked in prompts]
    assert held[0] == 0, "the first prompt must have been evicted"
    assert held[-1] == lengths[-1], "the last prompt must be held completely"
    assert any(0 < kept < blocks for kept, blocks in zip(held, lengths, strict=True)), "a tail must have been evicted"
    assert sum(held) <= engine.usable_blocks
    assert sum(held) <= (await router.event_stream(engine)).blocks <= engine.usable_blocks

    for asked in reversed(prompts):  # the newest first: each probe takes space from the oldest
        choice = await router.client.best_worker_id(asked, routing=pin)
        assert (await engine.generate(asked)).cached_tokens == choice.expected_cached_tokens  # past the router
        await router.settle(engine)


async def test_a_cleared_cache_is_cleared_in_the_index(fleet: list[Engine], router: Router, prompt: Prompts) -> None:
    cleared, kept = fleet
    size = cleared.block_size
    asked = prompt(5 * size + 1)
    for engine in fleet:
        await router.generate(asked, routing=await router.pin(engine))
    await router.settle()
    assert await router.overlaps(asked) == {(cleared.name, 0): 5, (kept.name, 0): 5}

    await cleared.clear()
    await router.settle(cleared)
    assert await router.overlaps(asked) == {(cleared.name, 0): 0, (kept.name, 0): 5}
    assert (await router.event_stream(cleared)).blocks == 0
    assert (await router.generate(asked)).routing.worker_name == kept.name
    reply = await router.generate(asked, routing=await router.pin(cleared))
    assert reply.usage.cached_tokens == reply.routing.expected_cached_tokens == 0
