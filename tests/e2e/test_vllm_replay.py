"""What the router learns from the engines themselves: what they did before it came, and how they are set up."""

import asyncio

import pytest

from e2e.conftest import Launch, Prompts
from e2e.engines import Engine
from e2e.waiting import until
from kvrouter_client import StreamState, WorkerState

pytestmark = pytest.mark.vllm


async def test_a_late_router_is_exact(fleet: list[Engine], launch: Launch, prompt: Prompts) -> None:
    """The engines have worked, evicted and been cleared long before the router starts."""
    busy, quiet = fleet
    size, blocks = busy.block_size, 9
    prompts = [prompt(blocks * size + 3) for _ in range(2 * busy.usable_blocks // blocks)]
    for asked in prompts:
        await busy.generate(asked)
    for asked in prompts[:3]:
        await quiet.generate(asked)

    async with launch(fleet) as router:
        await router.settle()
        for engine in fleet:
            stream = await router.event_stream(engine)
            assert (stream.partial, stream.missed, stream.freshness) == (False, 0, 1.0)
        assert [await router.overlap(quiet, asked) for asked in prompts[:4]] == [blocks] * 3 + [0]
        assert await router.overlap(busy, prompts[0]) == 0
        assert await router.overlap(busy, prompts[-1]) == blocks
        for asked in reversed(prompts):
            predicted = await router.overlap(busy, asked)
            assert (await busy.generate(asked)).cached_tokens == predicted * size
            await router.settle(busy)


async def test_routers_side_by_side_agree(fleet: list[Engine], launch: Launch, prompt: Prompts) -> None:
    """One has followed from the start, one joins in the middle; neither books for the other."""
    prompts = [prompt(300 + 17 * index) for index in range(16)]
    async with launch(fleet) as first:
        await first.settle()
        for asked in prompts[:12]:
            await first.generate(asked, 5)
        async with launch(fleet) as second:
            await second.settle()
            for index, asked in enumerate(prompts):
                await (first, second)[index % 2].generate(asked, 5)
            await asyncio.gather(first.settle(), second.settle())
            for asked in prompts:
                assert await first.overlaps(asked) == await second.overlaps(asked)
            for engine in fleet:
                assert (await first.worker(engine)).worker_id == (await second.worker(engine)).worker_id


async def test_an_engine_is_asked_where_its_events_are(fleet: list[Engine], launch: Launch, prompt: Prompts) -> None:
    """With nothing but a url: vLLM 0.32 tells, 0.28 cannot, and then the router says what is missing."""
    engine = fleet[0]
    asked = prompt(5 * engine.block_size)
    await engine.generate(asked)
    async with launch(fleet, discover=True) as router:

        async def ready() -> bool:
            return all([(await router.worker(each)).state is WorkerState.READY for each in fleet])

        await until(ready, "both engines are ready")
        status = await router.worker(engine)
        assert (status.spec.models, status.loras) == (("tiny", "tiny-lora"), ("tiny-lora",))
        assert status.max_model_len == 1024
        assert status.spec.block_size == engine.block_size
        if engine.options.tells_event_sockets:
            await router.settle()
            assert await router.overlap(engine, asked) == 5
        else:
            (stream,) = status.streams
            assert stream.state is StreamState.PREDICTED
            assert any("events=tcp://" in finding for finding in (await router.admin.list_workers()).findings)
            assert (
                len((await router.generate(asked, 3)).token_ids) == 3
            )  # it routes by what it can predict all the same


async def test_another_block_size_is_a_fault_that_says_what_to_set(
    fleet: list[Engine], launch: Launch, prompt: Prompts
) -> None:
    size = fleet[0].block_size
    async with launch(fleet, ["--router-block-size", str(2 * size)]) as router:

        async def faulty() -> bool:
            return (await router.worker(fleet[0])).state is WorkerState.MISCONFIGURED

        await until(faulty, "the mismatch is noticed")
        listed = await router.admin.list_workers()
        assert not listed.ready
        assert any(str(size) in finding and "block-size" in finding for finding in listed.findings), listed.findings
        error = await router.refused(prompt(10))
        assert error.reason in {"NO_WORKERS", "NOT_READY"}
