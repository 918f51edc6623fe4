"""Where conversations do not fit into one engine's cache, the router's own choice beats taking turns."""

import random
import statistics
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from e2e.conftest import Launch, run_engines
from e2e.conversations import Crowd, cached_share, computed_tokens, mean_first_token_s, talk
from e2e.engines import SLOW_MODEL, Engine, EngineOptions, Zygote

pytestmark = pytest.mark.vllm

ROUNDS = 3
# Two caches of 5,120 tokens. With two system prompts and up to 1,700 tokens each, ten conversations need 11,000 or so:
# two caches nearly hold them, and one does not.
SMALL = EngineOptions(block_size=32, blocks=161, lora=False, max_model_len=2048, shape=SLOW_MODEL)
CROWD = Crowd(users=10, conversations=1, turns=4, systems=2, question_tokens=(150, 350), answer_tokens=4, think_s=0.3)


@pytest.fixture(scope="module")
def small_engines(zygote: Callable[[str], Zygote], logs: Path) -> Generator[list[Engine], None, None]:
    """Two engines with small caches and a model whose prompts take long."""
    yield from run_engines(zygote("0.32.0"), ["left", "right"], SMALL, logs)


async def test_conversations_find_more_cached_and_wait_less_than_in_turns(
    small_engines: list[Engine], launch: Launch
) -> None:
    ratios = []
    for seed in range(ROUNDS):
        modes = ["kv", "round-robin"]
        random.Random(seed).shuffle(modes)
        turns = {}
        for mode in modes:
            for engine in small_engines:
                await engine.clear()
            async with launch(small_engines, ["--router-mode", mode]) as router:
                await router.settle()
                turns[mode] = await talk(router, CROWD, seed)
            assert len(turns[mode]) == CROWD.requests
        ours, theirs = turns["kv"], turns["round-robin"]
        # What was computed does not depend on how busy the machine is.
        assert computed_tokens(ours).total() < 0.8 * computed_tokens(theirs).total(), f"round {seed}"
        assert cached_share(ours) > cached_share(theirs) + 0.05, f"round {seed}"
        ratios.append(mean_first_token_s(ours) / mean_first_token_s(theirs))
    assert statistics.median(ratios) < 1, ratios
