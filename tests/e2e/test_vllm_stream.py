"""What comes through the router is what the engine says, and what the client ends, ends in the engine."""

import asyncio
import time

import grpc
import pytest

from e2e.conftest import Prompts
from e2e.engines import MAX_MODEL_LEN, VOCABULARY, Engine
from e2e.router import Reply, Router
from e2e.waiting import until
from kvrouter_client import FinishReason

pytestmark = pytest.mark.vllm


async def test_streamed_tokens_are_the_engines_own(fleet: list[Engine], router: Router, prompt: Prompts) -> None:
    for length, max_tokens in ((1, 1), (7, 25), (33, 64), (200, 5), (300, 600)):
        asked = prompt(length)
        own = await fleet[0].generate(asked, max_tokens)
        assert len(own.token_ids) == max_tokens
        for engine in fleet:
            reply = await router.generate(asked, max_tokens, routing=await router.pin(engine))
            assert reply.token_ids == own.token_ids
            assert reply.text == own.text
            assert reply.finish_reason == FinishReason.LENGTH
            assert reply.usage.prompt_tokens == length
            assert reply.usage.completion_tokens == max_tokens
            # What comes together is sent together, so on a busy machine not every token is a message.
            assert reply.chunks > 1 or max_tokens < 600, "it must be streamed, not sent at the end"
            await router.settle(engine)


async def test_concurrent_streams_do_not_mix(fleet: list[Engine], router: Router, prompt: Prompts) -> None:
    prompts = [prompt(20 + 11 * index) for index in range(12)]
    own = [await fleet[0].generate(asked, 48) for asked in prompts]
    pins = [await router.pin(engine) for engine in fleet]
    async with asyncio.TaskGroup() as group:
        calls = [
            group.create_task(router.generate(asked, 48, routing=pins[index % 2]))
            for index, asked in enumerate(prompts)
        ]
    replies = [call.result() for call in calls]
    assert [reply.token_ids for reply in replies] == [answer.token_ids for answer in own]
    assert [reply.routing.worker_name for reply in replies] == [engine.name for engine in fleet] * 6
    assert await router.booked() == (0, 0, 0)


async def test_a_cancelled_call_is_aborted_in_the_engine(fleet: list[Engine], router: Router, prompt: Prompts) -> None:
    engine = fleet[1]
    max_tokens = MAX_MODEL_LEN - 100
    generated = await engine.metric("vllm:generation_tokens_total")
    reply = Reply()
    stream = router.stream(prompt(50), max_tokens, routing=await router.pin(engine))
    async for message in stream:
        reply.add(message)
        if len(reply.token_ids) >= 3:
            break
    assert await engine.metric("vllm:num_requests_running") == 1
    await stream.aclose()

    async def idle() -> bool:
        return await engine.metric("vllm:num_requests_running") == 0

    async def released() -> bool:
        return await router.booked() == (0, 0, 0)

    await until(released, "the router releases what it had booked", 1.0)
    await until(idle, "the engine drops the request", 1.0)
    generated = await engine.metric("vllm:generation_tokens_total") - generated
    assert 3 <= generated < max_tokens / 2, "the engine must not have gone on to the end"


async def test_a_deadline_is_aborted_in_the_engine(fleet: list[Engine], router: Router, prompt: Prompts) -> None:
    engine = fleet[0]
    generated = await engine.metric("vllm:generation_tokens_total")
    pin = await router.pin(engine)
    started = time.monotonic()
    error = await router.refused(prompt(50), MAX_MODEL_LEN - 100, routing=pin, timeout_s=0.2)
    assert error.code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - started < 1.0

    async def idle() -> bool:
        return await engine.metric("vllm:num_requests_running") == 0

    await until(idle, "the engine drops the request", 1.0)
    assert await engine.metric("vllm:generation_tokens_total") - generated < (MAX_MODEL_LEN - 100) / 2


async def test_what_the_engine_refuses_is_an_invalid_argument(
    fleet: list[Engine], router: Router, prompt: Prompts
) -> None:
    engine = fleet[0]
    pin = await router.pin(engine)
    bad: dict[str, list[int]] = {
        "beyond the vocabulary": [*prompt(20), VOCABULARY + 7, *prompt(20)],
        "longer than the model's context": prompt(MAX_MODEL_LEN + 1),
    }
    for what, asked in bad.items():
        error = await router.refused(asked, routing=pin)
        assert error.code == grpc.StatusCode.INVALID_ARGUMENT, what
        assert error.reason in {"ENGINE_REJECTED", "INVALID_REQUEST"}, what
        assert error.message, what
    # The caller's fault is not the engine's: it stays in service, and nothing stays booked.
    assert await router.booked() == (0, 0, 0)
    good = prompt(30)
    assert (await router.generate(good, 4, routing=pin)).token_ids == (await engine.generate(good, 4)).token_ids
