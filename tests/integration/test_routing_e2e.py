"""Requests through the whole router: decision, relay, events, load; over mock workers and real sockets."""

import random
from dataclasses import replace

import grpc
import pytest

from integration.stack import FAST, admin_pb2, router_pb2, running, until


def words(seed, count):
    rng = random.Random(seed)
    return [rng.randrange(300, 20_000) for _ in range(count)]


async def test_a_prompt_goes_where_its_prefix_is_and_the_prediction_is_what_the_engine_finds():
    async with running("a", "b") as stack:
        prefix = words(1, 100)
        await stack.on("b", prefix)
        longer = prefix + words(2, 60)
        best = await stack.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=longer, include_candidates=True))
        assert (best.worker_name, best.overlap_blocks, best.expected_cached_tokens, best.block_size) == ("b", 6, 96, 16)
        assert best.url == stack.workers["b"].url
        messages = await stack.generate(longer)
        routing = messages[0].routing
        assert (routing.worker_name, routing.expected_cached_tokens, routing.attempts) == ("b", 96, 1)
        assert messages[-1].usage.cached_tokens == 96
        assert messages[-1].finish_reason == router_pb2.FINISH_REASON_LENGTH


async def test_predictions_stay_exact_over_random_traffic_with_eviction():
    small = replace(FAST, num_blocks=40)
    async with running("a", "b", worker=small) as stack:
        rng = random.Random(5)
        stems = [words(seed, 96) for seed in range(6)]
        for number in range(120):
            name = rng.choice(["a", "b"])
            prompt = rng.choice(stems)[: rng.randint(1, 96)] + words(1000 + number, rng.randint(0, 40))
            pin = router_pb2.RoutingHints(worker_id=stack.target(name).worker_id)
            messages = await stack.generate(prompt, rng.randint(1, 20), routing=pin)
            assert messages[-1].usage.cached_tokens == messages[0].routing.expected_cached_tokens, number
            await stack.synced(name)
        assert stack.workers["a"].block_manager() is not None


async def test_the_stream_is_the_engines_own_answer_token_by_token():
    async with running("a", "b") as stack:
        prompt = words(3, 50)
        direct = await stack.on("a", prompt, 40)
        routed = [token for message in await stack.generate(prompt, 40) for token in message.token_ids]
        assert len(direct) == 40
        assert routed == direct


async def test_load_is_booked_while_a_stream_lasts_and_released_at_its_end():
    slow = replace(FAST, speedup=1.0, itl_ms=20, prefill_tokens_per_s=100_000)
    async with running("a", worker=slow) as stack:
        call = stack.stub.Generate(
            router_pb2.GenerateRequest(token_ids=words(1, 64), stop_conditions=router_pb2.StopConditions(max_tokens=20))
        )
        answer = aiter(call)
        await anext(answer)
        assert stack.load("a") == (1, 0, 4)  # the first token is here: nothing waits any more
        async for _ in answer:
            pass
        await until(lambda: stack.load("a") == (0, 0, 0))


async def test_a_cancelled_call_frees_the_load_and_the_engine():
    slow = replace(FAST, speedup=1.0, itl_ms=50)
    async with running("a", worker=slow) as stack:
        call = stack.stub.Generate(
            router_pb2.GenerateRequest(
                token_ids=words(1, 64), stop_conditions=router_pb2.StopConditions(max_tokens=500)
            )
        )
        await call.read()
        call.cancel()
        await until(lambda: stack.load("a") == (0, 0, 0))
        await until(lambda: stack.workers["a"].block_manager().usage == 0, "the engine has dropped the request")


async def test_a_deadline_frees_both_as_well():
    slow = replace(FAST, speedup=1.0, itl_ms=50)
    async with running("a", worker=slow) as stack:
        request = router_pb2.GenerateRequest(
            token_ids=words(1, 64), stop_conditions=router_pb2.StopConditions(max_tokens=500)
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stack.stub.Generate(request, timeout=0.4):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: stack.load("a") == (0, 0, 0))


async def test_a_dead_worker_before_the_first_token_is_replaced_by_another():
    # Without events and with rare health checks, only the request itself can find out.
    worker = replace(FAST, kv_events=False)
    async with running("a", "b", worker=worker, upstream={"health_interval_s": 30}) as stack:
        await stack.workers["a"].kill()
        attempts = []
        while 2 not in attempts:  # ties are broken by chance
            messages = await stack.generate(words(len(attempts), 64))
            assert messages[0].routing.worker_name == "b"
            assert messages[-1].finish_reason == router_pb2.FINISH_REASON_LENGTH
            attempts.append(messages[0].routing.attempts)
        assert stack.load("a") == stack.load("b") == (0, 0, 0)
        # Its failure had the worker looked at: no further request tries it.
        await until(lambda: stack.router.workers.named("a").state.value == "unhealthy")
        assert {(await stack.generate(words(seed, 64)))[0].routing.attempts for seed in range(10)} == {1}


async def test_a_pinned_request_is_never_sent_elsewhere():
    async with running("a", "b", upstream={"health_interval_s": 30}) as stack:
        await stack.workers["a"].kill()
        pin = router_pb2.RoutingHints(worker_id=stack.target("a").worker_id)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.generate(words(1, 64), routing=pin)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert stack.load("a") == (0, 0, 0)


async def test_a_worker_that_dies_mid_stream_ends_the_stream_with_aborted():
    slow = replace(FAST, speedup=1.0, itl_ms=20)
    async with running("a", "b", worker=slow) as stack:
        call = stack.stub.Generate(
            router_pb2.GenerateRequest(
                token_ids=words(1, 64), stop_conditions=router_pb2.StopConditions(max_tokens=500)
            )
        )
        answer = aiter(call)
        first = await anext(answer)
        await stack.workers[first.routing.worker_name].kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in answer:
                pass
        assert caught.value.code() is grpc.StatusCode.ABORTED
        await until(lambda: stack.load("a") == stack.load("b") == (0, 0, 0))


async def test_all_workers_dead_is_unavailable_and_says_so():
    async with running("a", "b") as stack:
        for name in ("a", "b"):
            await stack.workers[name].kill()
        for name in ("a", "b"):
            await until(lambda name=name: stack.router.workers.named(name).state.value == "unhealthy")
        calls = (
            lambda: stack.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=[1, 2, 3])),
            lambda: stack.generate([1, 2, 3]),
        )
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "unhealthy" in caught.value.details()


async def test_a_restarted_worker_is_indexed_again_from_nothing():
    async with running("a", "b") as stack:
        prompt = words(1, 64)
        await stack.on("a", prompt)
        assert stack.router.index.blocks(stack.target("a")) == 4
        await stack.workers["a"].restart()
        await until(lambda: stack.router.index.blocks(stack.target("a")) == 0, "the old cache is forgotten")
        await stack.ready("a")
        await stack.on("a", words(2, 64))
        best = await stack.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=words(2, 64)))
        assert (best.worker_name, best.overlap_blocks) == ("a", 4)
        scores = await stack.stub.GetOverlapScores(router_pb2.GetOverlapScoresRequest(token_ids=prompt))
        assert [entry.device_blocks for entry in scores.workers] == [0, 0]


async def test_lost_events_are_replayed():
    async with running("a") as stack:
        await stack.on("a", words(0, 64))
        stack.workers["a"].drop_events(3)
        for seed in range(1, 5):
            await stack.generate(words(seed, 64))
        await stack.synced("a")
        stream = stack.router.index.stream(stack.target("a"))
        assert (stream.gaps, stream.missed, stream.state.value) == (1, 0, "live")
        for seed in range(5):
            best = await stack.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=words(seed, 64)))
            assert best.overlap_blocks == 4


async def test_a_router_that_comes_later_replays_what_it_missed():
    async with running("a") as first:
        prompt = words(1, 64)
        await first.on("a", prompt)
        spec = {"url": first.workers["a"].url}
        async with running("a", specs={"a": spec}, wait=False) as second:
            await second.ready()
            target = second.target("a")
            await until(lambda: second.router.index.blocks(target) == 4, "the cache of before is known")


async def test_adapters_and_salts_never_match_across():
    worker = replace(FAST, loras=("adapter",))
    async with running("a", worker=worker) as stack:
        prompt = words(1, 64)
        kinds = [{}, {"lora_name": "adapter"}, {"cache_salt": "s"}, {"lora_name": "adapter", "cache_salt": "s"}]
        for number, kind in enumerate(kinds):
            for later in kinds[number:]:
                best = await stack.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=prompt, **later))
                assert best.overlap_blocks == 0
            messages = await stack.generate(prompt, 1, **kind)
            assert messages[-1].usage.cached_tokens == messages[0].routing.expected_cached_tokens == 0
            await stack.synced("a")
            best = await stack.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=prompt, **kind))
            assert (best.overlap_blocks, best.expected_cached_tokens) == (4, 48)


async def test_ranks_are_targets_of_their_own():
    worker = replace(FAST, dp_size=2)
    async with running("a", worker=worker) as stack:
        prompts = {rank: words(rank, 64) for rank in (0, 1)}
        for rank, prompt in prompts.items():
            await stack.on("a", prompt, rank=rank)
        for rank, prompt in prompts.items():
            best = await stack.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=prompt))
            assert (best.dp_rank, best.overlap_blocks) == (rank, 4)
            messages = await stack.generate(prompt)
            assert messages[0].routing.dp_rank == rank
            assert messages[-1].usage.cached_tokens == 48


async def test_another_block_size_keeps_the_worker_out_and_says_what_to_set():
    workers = {"a": FAST, "b": replace(FAST, block_size=32)}
    async with running(workers=workers, router={"block_size": 16}, wait=False) as stack:
        await stack.ready("a")
        worker = stack.router.workers.named("b")
        await until(lambda: worker.state.value == "misconfigured")
        listed = await stack.admin.ListWorkers(admin_pb2.ListWorkersRequest())
        assert not listed.ready
        assert any("--router-block-size 32" in finding and "--block-size 16" in finding for finding in listed.findings)
        assert {(await stack.generate(words(seed, 64)))[0].routing.worker_name for seed in range(6)} == {"a"}


async def test_a_burst_spreads_before_any_event_arrives():
    slow = replace(FAST, speedup=1.0, prefill_tokens_per_s=2000)
    async with running("a", "b", "c", "d", worker=slow) as stack:
        calls = []
        for seed in range(8):
            request = router_pb2.GenerateRequest(
                token_ids=words(seed, 320), stop_conditions=router_pb2.StopConditions(max_tokens=1)
            )
            calls.append(stack.stub.Generate(request))
        await until(lambda: all(stack.load(name)[0] == 2 for name in "abcd"), "two requests on each")
        for call in calls:
            await call.read()
        await until(lambda: all(stack.load(name) == (0, 0, 0) for name in "abcd"))
