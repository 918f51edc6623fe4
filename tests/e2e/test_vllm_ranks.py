"""Data-parallel ranks have caches of their own, and a request goes to the rank that was chosen."""

import pytest

from e2e.conftest import Launch, Prompts
from e2e.engines import Engine

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("discover", [False, True], ids=["configured", "discovered"])
async def test_requests_go_to_the_rank_that_holds_their_prefix(
    ranks: Engine, launch: Launch, prompt: Prompts, discover: bool
) -> None:
    size = ranks.block_size
    async with launch([ranks], discover=discover) as router:
        await router.settle()
        assert [stream.dp_rank for stream in (await router.worker(ranks)).streams] == [0, 1]
        for dp_rank, blocks in ((1, 4), (0, 6)):
            asked = prompt(blocks * size + 2)
            first = await router.generate(asked, routing=await router.pin(ranks, dp_rank))
            assert first.routing.dp_rank == dp_rank
            await router.settle()
            assert await router.overlaps(asked) == {
                (ranks.name, dp_rank): blocks,
                (ranks.name, 1 - dp_rank): 0,
            }
            longer = asked + prompt(size)
            best = await router.client.best_worker_id(longer)
            assert (best.dp_rank, best.overlap_blocks) == (dp_rank, blocks)
            reply = await router.generate(longer)
            assert reply.routing.dp_rank == dp_rank
            assert reply.usage.cached_tokens == reply.routing.expected_cached_tokens == blocks * size
            # The engine's own word, past the router: the other rank has computed nothing.
            assert (await ranks.generate(longer, dp_rank=1 - dp_rank)).cached_tokens == 0
            await router.settle()


async def test_every_prediction_is_exact_on_both_ranks(ranks: Engine, launch: Launch, prompt: Prompts) -> None:
    size = ranks.block_size
    async with launch([ranks]) as router:
        await router.settle()
        shared = prompt(3 * size)
        served = {0: 0, 1: 0}
        for turn in range(16):
            asked = shared[: turn % 4 * size] + prompt(2 * size + turn)
            pin = await router.pin(ranks, turn % 2) if turn < 8 else None
            for again in (asked, asked + prompt(size)):
                reply = await router.generate(again, routing=pin)
                assert reply.usage.cached_tokens == reply.routing.expected_cached_tokens, f"{turn=}"
                served[reply.routing.dp_rank] += 1
                await router.settle()
        assert min(served.values()) >= 8, served


async def test_an_unknown_rank_is_refused(ranks: Engine, launch: Launch, prompt: Prompts) -> None:
    async with launch([ranks]) as router:
        await router.settle()
        error = await router.refused(prompt(10), routing=await router.pin(ranks, dp_rank=2))
        assert error.code.name in {"INVALID_ARGUMENT", "NOT_FOUND"}
