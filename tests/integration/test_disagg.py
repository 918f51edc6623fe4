"""Prefill and decode pools of one router: who computes a prompt, what is told of it, and what failure leaves behind."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from integration.stack import DEADLINE_S, ENDPOINT, FAST, Stack, admin_pb2, router_pb2, running, until
from kvrouter_grpc.mock_worker import MockWorker, MockWorkerConfig
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.routing.workers import worker_id_of
from kvrouter_grpc.upstream.metrics_text import samples

POOL = "test.prefill.generate"
ENGINE = replace(FAST, kv_transfer=True)
PROMPT = list(range(1000, 1100))
LENGTH = 6


@asynccontextmanager
async def pools(
    decode: int = 1, prefill: int = 1, engines: dict[str, MockWorkerConfig] | None = None, **router: Any
) -> AsyncIterator[Stack]:
    """d0, d1, ... generate and have their prompts computed by p0, p1, ..."""
    names = [f"d{i}" for i in range(decode)] + [f"p{i}" for i in range(prefill)]
    workers = {name: (engines or {}).get(name, ENGINE) for name in names}
    more = router.pop("specs", {})
    specs = {name: {"endpoint": POOL} | more.get(name, {}) for name in names if name.startswith("p")}
    async with running(
        workers=workers,
        specs=specs,
        wait=False,
        endpoints=(ENDPOINT, POOL),
        router={"prefill_endpoint": POOL, **router.pop("router", {})},
        upstream=router.pop("upstream", {}),
        **router,
    ) as stack:
        for name in names:
            await until(lambda name=name: state(stack, name) == "ready", f"{name} is ready")
        async with asyncio.timeout(DEADLINE_S):  # it also waits until the workers' events have told what is cached
            while not (await stack.admin.ListWorkers(admin_pb2.ListWorkersRequest())).ready:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        yield stack


def pool(stack: Stack) -> Router:
    return stack.app.routers[POOL]


def state(stack: Stack, name: str) -> str:
    worker = (pool(stack) if name.startswith("p") else stack.router).workers.named(name)
    assert worker is not None
    return worker.state.value


def in_flight(stack: Stack) -> int:
    return sum(len(router.loads) for router in stack.app.routers.values())


async def ask(stack: Stack, prompt: list[int] = PROMPT, max_tokens: int = LENGTH, **fields: Any) -> Any:
    """(tokens, routing) of a request to the decode endpoint, after which nothing is booked."""
    messages = await stack.generate(prompt, max_tokens, endpoint=ENDPOINT, **fields)
    assert in_flight(stack) == 0
    return [token for message in messages for token in message.token_ids], messages[0].routing


async def own_answer(worker: MockWorker, prompt: list[int] = PROMPT, max_tokens: int = LENGTH) -> list[int]:
    body = {"model": "mock", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "return_token_ids": True}
    async with aiohttp.ClientSession() as session, session.post(f"{worker.url}/v1/completions", json=body) as reply:
        tokens: list[int] = (await reply.json())["choices"][0]["token_ids"]
        return tokens


async def metric(worker: MockWorker, name: str, **labels: str) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"{worker.url}/metrics") as page:
        found = samples(await page.read(), {name})
    return sum(sample.value for sample in found if labels.items() <= dict(sample.labels).items())


async def computed(stack: Stack, name: str) -> float:
    """Prompt tokens that an engine computed itself."""
    worker = stack.workers[name]
    return await metric(worker, "vllm:prompt_tokens_by_source_total", source="local_compute")


async def test_the_pool_computes_the_prompt_and_the_answer_is_the_engines_own() -> None:
    async with pools() as stack:
        tokens, routing = await ask(stack, request_id="both-legs")
        assert tokens == await own_answer(stack.workers["p0"])
        assert routing.worker_name == "d0"
        assert routing.attempts == 1
        assert (routing.prefill.remote, routing.prefill.reason, routing.prefill.worker_name) == (True, "", "p0")
        assert routing.prefill.worker_id == worker_id_of("p0")
        assert (
            await metric(stack.workers["d0"], "vllm:prompt_tokens_by_source_total", source="external_kv_transfer")
            == len(PROMPT) - 1
        )  # an engine always computes the last one
        # What was computed is cached in the pool, and the next decision there knows it.
        stream = pool(stack).index.stream(stack.target("p0"))
        await until(lambda: stream.last_seq == stack.workers["p0"].next_seq(0) - 1)
        _, again = await ask(stack)
        assert again.prefill.expected_cached_tokens == 96


async def test_an_endpoint_without_a_pool_says_nothing_of_prefill() -> None:
    async with running("w0") as stack:
        messages = await stack.generate(PROMPT)
        assert not messages[0].routing.HasField("prefill")


async def test_a_burst_spreads_over_both_pools_by_what_is_booked() -> None:
    slow = replace(ENGINE, speedup=1.0, itl_ms=20, prefill_tokens_per_s=2000)
    engines = dict.fromkeys(("d0", "d1", "p0", "p1"), slow)
    async with pools(2, 2, engines) as stack, asyncio.TaskGroup() as group:
        prompts = [list(range(start, start + 100)) for start in range(1000, 5000, 500)]
        asked = [group.create_task(stack.generate(prompt, 4, endpoint=ENDPOINT)) for prompt in prompts]
        answers = [await task for task in asked]
        routings = [messages[0].routing for messages in answers]
        for pick in (lambda r: r.worker_name, lambda r: r.prefill.worker_name):
            chosen = [pick(routing) for routing in routings]
            assert sorted(map(chosen.count, set(chosen))) == [4, 4], chosen


async def test_while_the_prompt_is_computed_elsewhere_nothing_waits_where_it_is_decoded() -> None:
    slow = replace(ENGINE, speedup=1.0, prefill_tokens_per_s=200)  # half a second
    async with pools(engines={"p0": slow}) as stack, asyncio.TaskGroup() as group:
        task = group.create_task(ask(stack))
        await until(lambda: pool(stack).load(stack.target("p0")).queued_prefill_tokens == len(PROMPT))
        assert stack.load("d0") == (1, 0, 6)
        await task


async def test_a_request_to_the_pool_itself_stays_there() -> None:
    async with pools() as stack:
        messages = await stack.generate(PROMPT, endpoint=POOL)
        assert messages[0].routing.worker_name == "p0"
        assert not messages[0].routing.HasField("prefill")


async def test_pins_of_both_phases() -> None:
    async with pools(2, 2) as stack:
        for decode, prefill in (("d1", "p0"), ("d0", "p1")):
            hints = router_pb2.RoutingHints(
                decode_worker_id=worker_id_of(decode), prefill_worker_id=worker_id_of(prefill), prefill_dp_rank=0
            )
            _, routing = await ask(stack, routing=hints)
            assert (routing.worker_name, routing.prefill.worker_name) == (decode, prefill)


async def test_a_query_names_both_workers_and_asks_neither() -> None:
    async with pools(2, 2) as stack:
        pin = router_pb2.RoutingHints(prefill_worker_id=worker_id_of("p1"))
        _, routing = await ask(stack, routing=pin, annotations=["query_instance_id"])
        assert routing.worker_name in ("d0", "d1")
        assert (routing.prefill.remote, routing.prefill.worker_name, routing.attempts) == (True, "p1", 0)
        await stack.workers["p1"].kill()
        await until(lambda: state(stack, "p1") == "unhealthy")
        _, alone = await ask(stack, routing=pin, annotations=["query_instance_id"])
        assert (alone.prefill.remote, alone.prefill.reason) == (False, "PINNED_WORKER_UNAVAILABLE")
        assert [await computed(stack, name) for name in ("d0", "d1", "p0")] == [0, 0, 0]
        assert not (await stack.admin.GetLoads(admin_pb2.GetLoadsRequest())).prefills


async def test_filters_hold_for_both_phases() -> None:
    async with pools(2, 2) as stack:
        ids = [worker_id_of("d1"), worker_id_of("p1")]
        _, routing = await ask(stack, routing=router_pb2.RoutingHints(allowed_worker_ids=ids))
        assert (routing.worker_name, routing.prefill.worker_name) == ("d1", "p1")
        _, alone = await ask(stack, routing=router_pb2.RoutingHints(allowed_worker_ids=ids[:1]))
        assert (alone.worker_name, alone.prefill.remote, alone.prefill.reason) == ("d1", False, "NO_WORKERS")


async def test_a_caller_that_had_the_prompt_computed_is_routed_for_decoding_alone() -> None:
    async with pools() as stack:
        asked = router_pb2.GenerateRequest(
            token_ids=PROMPT,
            endpoint=POOL,
            kv_transfer_params_json='{"do_remote_decode": true, "do_remote_prefill": false}',
            stop_conditions=router_pb2.StopConditions(max_tokens=1),
        )
        computed_there = [message async for message in stack.stub.Generate(asked)]
        params = computed_there[-1].kv_transfer_params_json
        tokens, routing = await ask(stack, kv_transfer_params_json=params, request_id="mine")
        assert tokens == await own_answer(stack.workers["p0"])
        assert not routing.HasField("prefill")
        assert await computed(stack, "d0") == 1  # its last token
        why = await stack.admin.Explain(admin_pb2.ExplainRequest(request_id="mine"))
        assert [(each.prefilled, each.cost, each.worker_name) for each in why.decisions] == [(True, "dynamo", "d0")]


async def test_a_caller_with_its_own_transfer_is_left_alone() -> None:
    async with pools() as stack:
        _, routing = await ask(stack, kv_transfer_params_json='{"do_remote_prefill": false}')
        assert not routing.HasField("prefill")
        assert await computed(stack, "d0") == len(PROMPT)


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling_options": router_pb2.SamplingOptions(n=2, temperature=1, seed=1)},
        {"output_options": router_pb2.OutputOptions(prompt_logprobs=1)},
    ],
    ids=["several answers", "log-probabilities of the prompt"],
)
async def test_what_cannot_be_handed_over_is_computed_where_it_is_decoded(fields: dict[str, Any]) -> None:
    async with pools() as stack:
        _, routing = await ask(stack, **fields)
        assert (routing.prefill.remote, routing.prefill.reason) == (False, "NOT_TRANSFERABLE")
        assert (routing.prefill.worker_name, routing.worker_name) == ("", "d0")


# --- conditional disaggregation ---------------------------------------------------------------------------------------


async def test_conditional_disaggregation_goes_by_what_the_decode_worker_lacks() -> None:
    limits = '{"policy": "isl_bounding", "eff_isl_threshold": 90}'
    async with pools(router={"conditional_disagg": True, "conditional_disagg_config": limits}) as stack:
        fresh = await ask(stack, PROMPT[:80])  # few tokens, all of them new
        assert fresh[1].prefill.remote
        await stack.synced("d0")
        _, cached = await ask(stack, PROMPT)  # 80 of 100 are on d0 now
        assert (cached.prefill.remote, cached.prefill.reason) == (False, "NOT_WORTHWHILE")
        assert cached.expected_cached_tokens == 80
        assert (
            await computed(stack, "d0") == 1 + 20
        )  # of the fetched prompt the last token, of this one what was missing
        _, long = await ask(stack, PROMPT[:80] + list(range(2000, 2090)))  # 90 are missing
        assert long.prefill.remote
        pin = router_pb2.RoutingHints(prefill_worker_id=worker_id_of("p0"))
        _, pinned = await ask(stack, PROMPT, routing=pin)
        assert pinned.prefill.remote


async def test_one_limit_is_enough_unless_the_policy_says_otherwise() -> None:
    limits = '{"eff_isl_threshold": 90}'
    async with pools(router={"conditional_disagg": True, "conditional_disagg_config": limits}) as stack:
        _, short = await ask(stack, PROMPT[:80])
        assert short.prefill.reason == "NOT_WORTHWHILE"
        _, long = await ask(stack, list(range(3000, 3100)))
        assert long.prefill.remote


# --- failure ----------------------------------------------------------------------------------------------------------


async def test_a_killed_prefill_worker_leaves_the_prompt_to_the_decode_worker() -> None:
    async with pools() as stack:
        expected = await own_answer(stack.workers["p0"])
        await stack.workers["p0"].kill()
        tokens, routing = await ask(stack)
        assert tokens == expected
        assert not routing.prefill.remote
        assert routing.prefill.reason in ("UPSTREAM_UNAVAILABLE", "NO_WORKERS")
        assert await computed(stack, "d0") == len(PROMPT)
        await until(lambda: state(stack, "p0") == "unhealthy")
        _, later = await ask(stack)
        assert (later.prefill.reason, later.prefill.worker_name) == ("NO_WORKERS", "")
        await in_service(stack)  # the router does without the pool, and stays in service
        await stack.workers["p0"].restart()
        await until(lambda: state(stack, "p0") == "ready")
        _, back = await ask(stack)
        assert back.prefill.remote
        reply = await stack.admin.GetLoads(admin_pb2.GetLoadsRequest(endpoint=ENDPOINT))
        counts = {entry.reason: entry.count for entry in reply.prefills}
        assert counts[""] == 1
        assert counts["NO_WORKERS"] >= 1
        assert sum(counts.values()) == 3


async def test_a_prefill_worker_without_a_connector() -> None:
    async with pools(engines={"p0": FAST}) as stack:
        _, routing = await ask(stack)
        assert (routing.prefill.remote, routing.prefill.reason) == (False, "NO_TRANSFER_PARAMS")
        assert routing.prefill.worker_name == "p0"


async def test_a_prefill_that_takes_too_long_is_aborted() -> None:
    slow = replace(ENGINE, speedup=1.0, prefill_tokens_per_s=1, max_num_batched_tokens=16)
    async with pools(engines={"p0": slow}, upstream={"prefill_timeout_s": 0.2}) as stack:
        _, routing = await ask(stack)
        assert (routing.prefill.remote, routing.prefill.reason) == (False, "UPSTREAM_TIMEOUT")
        await until(lambda: busy(stack.workers["p0"]) == 0, "the prefill is aborted")


async def test_blocks_that_are_gone_are_computed_again_on_the_same_worker() -> None:
    async with pools(engines={"p0": replace(ENGINE, kv_transfer_timeout_s=0.0)}) as stack:
        expected = await own_answer(stack.workers["p0"])
        tokens, routing = await ask(stack)
        assert tokens == expected
        assert (routing.prefill.remote, routing.prefill.reason) == (False, "TRANSFER_FAILED")
        assert (routing.worker_name, routing.attempts) == ("d0", 2)


async def test_a_decode_worker_that_died_hands_the_prompt_to_another_one() -> None:
    slow = replace(ENGINE, speedup=1.0, prefill_tokens_per_s=500)
    async with pools(2, engines={"p0": slow}) as stack, asyncio.TaskGroup() as group:
        expected = await own_answer(stack.workers["d0"], max_tokens=4)
        task = group.create_task(stack.generate(PROMPT, 4, endpoint=ENDPOINT))
        await until(lambda: pool(stack).load(stack.target("p0")).active_requests == 1)
        booked = next(name for name in ("d0", "d1") if stack.load(name)[0])
        await stack.workers[booked].kill()
        messages = await task
        assert [token for message in messages for token in message.token_ids] == expected
        assert messages[0].routing.worker_name != booked
        assert messages[0].routing.prefill.reason == "TRANSFER_FAILED"


async def test_a_cancelled_request_leaves_neither_engine_busy() -> None:
    slow = replace(ENGINE, speedup=1.0, prefill_tokens_per_s=20)
    async with pools(engines={"p0": slow}) as stack:
        request = router_pb2.GenerateRequest(token_ids=PROMPT, endpoint=ENDPOINT)
        call = stack.stub.Generate(request)
        await until(lambda: busy(stack.workers["p0"]) == 1, "the prompt is being computed")
        assert in_flight(stack) == 2
        call.cancel()
        await until(lambda: in_flight(stack) == 0, "both bookings are released")
        await until(lambda: busy(stack.workers["p0"]) == 0, "the prefill is aborted")
        assert busy(stack.workers["d0"]) == 0


async def in_service(stack: Stack) -> None:
    request = health_pb2.HealthCheckRequest(service="kvrouter.v1.KvRouter")
    reply = await health_pb2_grpc.HealthStub(stack.channel).Check(request)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def busy(worker: MockWorker) -> int:
    """Requests that an engine has."""
    return sum(
        engine.scheduler.num_running + engine.scheduler.num_waiting
        for engine in worker._life.engines  # type: ignore[union-attr]
    )
