"""Pictures that are checked: hits foretold against hits found, prompts without an echo, and what is done about both."""

import asyncio
import os
import random
import signal
from array import array
from dataclasses import replace

import grpc
import pytest

from integration.stack import ENDPOINT, FAST, admin_pb2, router_pb2, running, until
from kvrouter_grpc.mock_worker import MockWorker
from kvrouter_grpc.routing import stream as streams
from kvrouter_grpc.routing.stream import freshness
from kvrouter_grpc.routing.workers import worker_id_of
from programs import mock_worker
from reference.kv_encode import encode_batch
from reference.kv_events import BlocksStored

OFTEN = {"metrics_interval_s": 0.05}


def words(seed, count):
    rng = random.Random(seed)
    return [rng.randrange(300, 20_000) for _ in range(count)]


def to(name):
    return router_pb2.RoutingHints(worker_id=worker_id_of(name), dp_rank=0)


async def status(stack, name="a"):
    reply = await stack.admin.ListWorkers(admin_pb2.ListWorkersRequest(endpoint=ENDPOINT))
    return next(worker.streams[0] for worker in reply.workers if worker.spec.name == name), list(reply.findings)


def believe(stack, name, prompts):
    """Let the picture claim these prompts, as it would had the engine evicted them without a word."""
    for seed, tokens in prompts.items():
        hashes = array("Q", range(seed << 32, (seed << 32) + len(tokens) // 16))
        event = BlocksStored(hashes, None, array("I", tokens), 16)
        stack.router.index.apply_payload(stack.target(name), encode_batch([event]))


async def test_what_is_foretold_is_what_the_engine_finds():
    async with running("a") as stack:
        for length in (64, 64, 70, 130, 160, 160):
            await stack.on("a", words(1, length))
        await asyncio.gather(*(stack.generate(words(2, 640), routing=to("a")) for _ in range(8)))
        await stack.synced("a")
        stream, findings = await status(stack)
        hits = stream.hits
        assert (hits.exact, hits.over, hits.under, hits.error_tokens) == (14, 0, 0, 0)
        assert (hits.told, hits.drifting, hits.alarms, hits.accuracy) == (True, False, 0, 1.0)
        assert (stream.freshness, stream.resyncs, findings) == (1.0, 0, [])
        (load,) = (await stack.admin.GetLoads(admin_pb2.GetLoadsRequest())).loads
        assert load.hits == hits


async def test_a_picture_that_foretells_wrongly_is_begun_anew():
    async with running("a") as stack:
        await stack.on("a", words(0, 320))
        prompts = {seed: words(seed, 320) for seed in range(1, 9)}
        believe(stack, "a", prompts)
        assert stack.router.index.blocks(stack.target("a")) == 20 + 8 * 20
        for tokens in prompts.values():
            await stack.generate(tokens[:160], 1, routing=to("a"))
        stream = stack.router.index.stream(stack.target("a"))
        await until(lambda: stream.resyncs == 1 and stream.state.value == "live", f"begun anew: {stream}")
        await stack.synced("a")
        assert stack.router.index.blocks(stack.target("a")) == 20 + 8 * 10  # what the engine holds
        told, findings = await status(stack)
        assert (told.hits.over, told.hits.alarms, told.hits.drifting, told.resyncs) == (8, 1, False, 1)
        assert (told.partial, told.restarts, told.freshness, findings) == (False, 0, 1.0, [])
        # At most one a minute: what goes wrong now is told and discounted until then.
        wrong = {seed: words(seed, 160) for seed in range(11, 20)}
        believe(stack, "a", wrong)
        for tokens in wrong.values():
            await stack.generate(tokens, 1, routing=to("a"))
        await asyncio.sleep(0)
        told, findings = await status(stack)
        assert (told.resyncs, told.hits.drifting, told.hits.alarms) == (1, True, 2)
        assert told.hits.accuracy == told.freshness == 1 - 9 / 16
        assert "found less cached than foretold in 9 of the last 16 requests" in findings[0]


async def test_requests_that_prove_nothing_are_not_counted():
    slow = replace(FAST, speedup=1.0, itl_ms=20)
    async with running("a", worker=slow) as stack:
        believe(stack, "a", {1: words(1, 160)})
        tokens = words(1, 160)
        sampling = router_pb2.SamplingOptions(n=2, temperature=1.0)
        await stack.generate(tokens, 2, routing=to("a"), sampling_options=sampling)
        await stack.generate(tokens, 2, routing=to("a"), output_options=router_pb2.OutputOptions(prompt_logprobs=0))
        request = router_pb2.GenerateRequest(
            token_ids=tokens, stop_conditions=router_pb2.StopConditions(max_tokens=100, ignore_eos=True)
        )
        call = stack.stub.Generate(request)
        await call.read()
        call.cancel()
        await until(lambda: stack.load("a") == (0, 0, 0), "the cancelled one has ended")
        stream, _ = await status(stack)
        assert (stream.hits.exact, stream.hits.over, stream.hits.under) == (0, 0, 0)


async def test_an_engine_that_does_not_report_hits_is_judged_by_its_metrics():
    quiet = replace(FAST, prompt_tokens_details=False)
    async with running("a", worker=quiet, upstream=OFTEN) as stack:
        target = stack.target("a")
        await until(lambda: stack.router.feedback.engine_report(target), "it reports")
        hits = stack.router.index.hits(target)
        polled = lambda: stack.router.feedback.engine_report(target).prefix_queries  # noqa: E731
        for round_ in range(3):  # of 16 requests each, none of which is held as believed
            prompts = {seed: words(seed, 160) for seed in range(20 * round_ + 1, 20 * round_ + 17)}
            believe(stack, "a", prompts)
            for tokens in prompts.values():
                await stack.generate(tokens, 1, routing=to("a"))
            await until(lambda asked=160 * 16 * (round_ + 1): polled() == asked, "their metrics are read")
            if round_ == 0:
                assert hits.tells is False
                _, findings = await status(stack)
                assert "--enable-prompt-tokens-details" in findings[0]
            if hits.alarms:
                break
        assert hits.alarms == 1
        await until(lambda: stack.router.index.stream(target).resyncs == 1, "it is begun anew")


async def test_prompts_that_no_event_tells_of_cost_trust(monkeypatch):
    """The events are another engine's: nothing is missing, and nothing is ever heard of what is computed."""
    monkeypatch.setattr(streams, "ECHO_S", 0.05)
    async with MockWorker(FAST) as other, running("a") as stack, MockWorker(FAST) as engine:
        spec = admin_pb2.WorkerSpec(
            name="x", url=engine.url, events=other.events_endpoints[0], replay=other.replay_endpoints[0]
        )
        await stack.admin.RegisterWorker(admin_pb2.RegisterWorkerRequest(spec=spec))
        await stack.ready("x")
        target = stack.target("x")
        trust = lambda: freshness(stack.router.index.evidence(target))  # noqa: E731
        await until(lambda: trust().value == 1.0, "quiet, and trusted")
        for seed in range(4):
            await stack.generate(words(seed, 64), 1, routing=to("x"))
        await until(lambda: trust().silence == 0.25, "four prompts without an echo")
        stream, findings = await status(stack, "x")
        assert (stream.freshness, stream.freshness_parts.silence) == (0.25, 0.25)
        assert "no event has told of the blocks of prompts that were computed there (4)" in findings[0]
        request = router_pb2.BestWorkerIdRequest(token_ids=words(9, 64), routing=to("x"))
        async with asyncio.timeout(5):
            while (await stack.stub.BestWorkerId(request)).freshness != 0.25:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        stack.workers["y"] = other
        spec = admin_pb2.WorkerSpec(name="y", url=other.url)
        await stack.admin.RegisterWorker(admin_pb2.RegisterWorkerRequest(spec=spec))
        await stack.ready("y")
        await stack.on("y", words(9, 64))
        await until(lambda: trust().value == 1.0, "events do come")


async def test_prompts_that_were_cached_after_all_are_no_silence(monkeypatch):
    """The picture does not know them, as after an unknown start: the engine has nothing to announce."""
    monkeypatch.setattr(streams, "ECHO_S", 0.0)
    async with running("a") as stack:
        target = stack.target("a")
        await stack.on("a", words(1, 330), max_tokens=1)
        stack.router.index.clear(target)
        for _ in range(3):
            await stack.generate(words(1, 330), 1, routing=to("a"))
        stream, _ = await status(stack)
        assert (stream.hits.under, stream.freshness, stream.blocks) == (3, 1.0, 0)


async def rest(call):
    async for _ in call:
        pass


async def test_a_stream_of_a_worker_that_hangs_is_ended():
    """A stopped process closes no connection: its health check is what tells."""
    async with running("a", upstream={"health_timeout_s": 0.2}) as stack:
        with mock_worker("--itl-ms", "30") as hung:
            spec = admin_pb2.WorkerSpec(name="x", url=hung.said["url"])
            await stack.admin.RegisterWorker(admin_pb2.RegisterWorkerRequest(spec=spec))
            await stack.ready("x")
            request = router_pb2.GenerateRequest(
                token_ids=words(1, 64),
                stop_conditions=router_pb2.StopConditions(max_tokens=1000, ignore_eos=True),
                routing=to("x"),
            )
            call = aiter(stack.stub.Generate(request))
            await anext(call)
            os.kill(hung.process.pid, signal.SIGSTOP)
            try:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await asyncio.wait_for(rest(call), 10)
                assert caught.value.code() is grpc.StatusCode.ABORTED
                await until(lambda: stack.load("x") == (0, 0, 0), "its load is free")
            finally:
                os.kill(hung.process.pid, signal.SIGCONT)
            await stack.ready("x")
            assert len(await stack.generate(words(2, 64), 2, routing=to("x"))) >= 1
