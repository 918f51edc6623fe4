"""A router that comes back with what the one before it knew, in front of engines that have gone on."""

from pathlib import Path

import pytest

from e2e.conftest import Launch, Prompts
from e2e.engines import Engine
from e2e.router import ENDPOINT, Router

pytestmark = pytest.mark.vllm

BLOCKS = 3  # of a prompt


async def test_a_router_comes_back_warm_and_exact(
    fleet: list[Engine], launch: Launch, prompt: Prompts, tmp_path: Path
) -> None:
    """One engine evicts while no router listens, the other rests; then one is another process."""
    busy, quiet = fleet
    size = busy.block_size
    flags = ["--router-snapshot-dir", str(tmp_path)]
    prompts = {
        engine: [prompt(BLOCKS * size + 3) for _ in range(engine.usable_blocks // BLOCKS - 2)] for engine in fleet
    }

    async with launch(fleet, flags) as router:
        await router.settle()
        for engine, asked in prompts.items():
            pin = await router.pin(engine)
            for each in asked:
                await router.generate(each, routing=pin)
        await router.settle()
    assert (tmp_path / f"{ENDPOINT}.kvsnapshot").is_file()

    prompts[busy] += [prompt(BLOCKS * size + 3) for _ in range(8)]
    for each in prompts[busy][-8:]:
        await busy.generate(each)

    async with launch(fleet, flags) as router:
        await router.settle()
        assert [await router.overlap(quiet, each) for each in prompts[quiet]] == [BLOCKS] * len(prompts[quiet])
        assert (await router.event_stream(quiet)).restarts == 0
        await exact(router, prompts)

    quiet.kill()
    await quiet.restart()
    await quiet.generate(prompts[quiet][0])
    async with launch(fleet, flags) as router:
        await router.settle()
        held = [await router.overlap(quiet, each) for each in prompts[quiet]]
        assert held == [BLOCKS] + [0] * (len(held) - 1)
        await exact(router, prompts)


async def exact(router: Router, prompts: dict[Engine, list[list[int]]]) -> None:
    """What the router says of each prompt is what the engine finds."""
    for engine, asked in prompts.items():
        for each in reversed(asked):
            predicted = await router.overlap(engine, each)
            assert (await engine.generate(each)).cached_tokens == predicted * engine.block_size
            await router.settle(engine)
