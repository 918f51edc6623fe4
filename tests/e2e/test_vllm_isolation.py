"""Equal tokens under another adapter or another salt share no cache, neither in the engine nor in the index."""

from typing import Any

import pytest

from e2e.conftest import Prompts
from e2e.engines import LORA_NAME, Engine
from e2e.router import Router

pytestmark = pytest.mark.vllm

WORLDS: dict[str, dict[str, Any]] = {
    "base": {},
    "lora": {"lora_name": LORA_NAME},
    "salt-a": {"cache_salt": "tenant-a"},
    "salt-b": {"cache_salt": "tenant-b"},
    "lora-salt-a": {"lora_name": LORA_NAME, "cache_salt": "tenant-a"},
}


async def test_no_world_matches_another(fleet: list[Engine], router: Router, prompt: Prompts) -> None:
    """One world after the other runs the same tokens, one block more each time, and sees its own blocks alone."""
    engine = fleet[0]
    size = engine.block_size
    asked = prompt((len(WORLDS) + 2) * size)
    pin = await router.pin(engine)
    held = dict.fromkeys(WORLDS, 0)
    for blocks, (world, fields) in enumerate(WORLDS.items(), start=2):
        reply = await router.generate(asked[: blocks * size + 1], routing=pin, **fields)
        assert reply.usage.cached_tokens == reply.routing.expected_cached_tokens == 0, world
        held[world] = blocks
        await router.settle(engine)
        for other, other_fields in WORLDS.items():
            assert await router.overlap(engine, asked, **other_fields) == held[other], (world, other)
            assert await router.overlap(fleet[1], asked, **other_fields) == 0

    for world, fields in WORLDS.items():
        best = await router.client.best_worker_id(asked, **fields)
        assert (best.worker_name, best.overlap_blocks) == (engine.name, held[world])
        reply = await router.generate(asked[: held[world] * size + 1], **fields)
        assert reply.routing.worker_name == engine.name
        assert reply.usage.cached_tokens == reply.routing.expected_cached_tokens == held[world] * size, world


async def test_an_adapter_answers_for_itself(fleet: list[Engine], router: Router, prompt: Prompts) -> None:
    asked = prompt(40)
    base = await router.generate(asked, max_tokens=12)
    adapted = await router.generate(asked, max_tokens=12, lora_name=LORA_NAME)
    assert adapted.token_ids == (await fleet[0].generate(asked, 12, model=LORA_NAME)).token_ids
    assert adapted.token_ids != base.token_ids
    assert (await router.generate(asked, max_tokens=12, model=LORA_NAME)).token_ids == adapted.token_ids
