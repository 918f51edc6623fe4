"""Clients that mean harm, or are merely broken: the others are served, everything is freed, nothing leaks."""

import asyncio
import dataclasses
import gc
import random
import time
from contextlib import suppress

import grpc
import pytest
from google.rpc import status_pb2

from integration.server_rig import FAST, Worker, collect, refusal, serving, until
from kvrouter_grpc._gen import admin_pb2, router_pb2
from robustness.raw_http2 import DATA, HEADERS, INITIAL_WINDOW_SIZE, SETTINGS, RawConnection

PROMPT = list(range(1000, 1040))
SLOW = dataclasses.replace(FAST, speedup=1.0, itl_ms=2.0)
GENERATE = "/kvrouter.v1.KvRouter/Generate"
BEST = "/kvrouter.v1.KvRouter/BestWorkerId"
CANARY = "canary-7f3a91"


def best():
    return router_pb2.BestWorkerIdRequest(token_ids=PROMPT)


def ask(max_tokens):
    stop = router_pb2.StopConditions(max_tokens=max_tokens, ignore_eos=True)
    return router_pb2.GenerateRequest(token_ids=PROMPT, stop_conditions=stop)


def rss() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * 4096


def canary(*_args, **_kwargs):
    raise RuntimeError(CANARY)


async def closed(reader: asyncio.StreamReader) -> None:
    """Read until the other side closes."""
    with suppress(ConnectionError):
        while await reader.read(65_536):
            pass


# --- what may leave the server ----------------------------------------------------------------------------------


def assert_says_nothing(error: grpc.aio.AioRpcError) -> str:
    """A defect shows nothing but its request id, which is returned."""
    assert error.code() is grpc.StatusCode.INTERNAL
    trailing = dict(error.trailing_metadata())
    for text in (error.details(), repr(trailing), error.debug_error_string()):
        assert CANARY not in text
        assert "RuntimeError" not in text
    details = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    (info,) = details.details
    assert info.value
    return trailing["grpc-status-details-bin"].decode(errors="replace")


@pytest.mark.parametrize(
    "method",
    ["choose", "best_worker", "lease", "overlap_scores", "free", "mark_prefill_complete", "report_output", "load"],
)
async def test_the_text_of_an_exception_stays_inside_unary_calls(method, monkeypatch):
    async with serving(Worker()) as rig:
        monkeypatch.setattr(rig.router, method, canary)
        named = {"request_id": "find-me"}
        calls = {
            "choose": rig.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=PROMPT, **named)),
            "best_worker": rig.stub.BestWorkerId(
                router_pb2.BestWorkerIdRequest(token_ids=PROMPT, cache_salt="tenant", **named)
            ),
            "lease": rig.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=PROMPT, reserve=True, **named)),
            "overlap_scores": rig.stub.GetOverlapScores(router_pb2.GetOverlapScoresRequest(token_ids=PROMPT)),
            "free": rig.stub.Free(router_pb2.FreeRequest(**named)),
            "mark_prefill_complete": rig.stub.MarkPrefillComplete(router_pb2.MarkPrefillCompleteRequest(**named)),
            "report_output": rig.stub.ReportOutput(router_pb2.ReportOutputRequest(output_tokens=1, **named)),
            "load": rig.admin.GetLoads(admin_pb2.GetLoadsRequest()),
        }
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await calls.pop(method)
        said = assert_says_nothing(caught.value)
        if method not in {"overlap_scores", "load"}:
            assert "find-me" in said
        for call in calls.values():
            call.cancel()


@pytest.mark.parametrize("after", [0, 3])
async def test_the_text_of_an_exception_stays_inside_streams(after, monkeypatch, capsys):
    async with serving(Worker()) as rig:
        generate = rig.relay.generate

        async def breaks(*args):
            steps = generate(*args)
            for _ in range(after):
                yield await anext(steps)
            await steps.aclose()
            canary()

        monkeypatch.setattr(rig.relay, "generate", breaks)
        call = aiter(rig.stub.Generate(ask(50)))
        if after:
            await anext(call)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(call)
        assert_says_nothing(caught.value)
        assert rig.in_flight() == 0
    assert CANARY in capsys.readouterr().out  # the log has it


# --- cancellation -----------------------------------------------------------------------------------------------


async def test_clients_that_cancel_at_any_moment_leave_nothing_behind():
    rng = random.Random(7)
    async with serving(Worker(SLOW), Worker(SLOW)) as rig:

        async def one():
            call = rig.stub.Generate(ask(2000))
            with suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                async with asyncio.timeout(rng.uniform(0, 0.2)):
                    await collect(call)
            call.cancel()

        for _ in range(5):
            async with asyncio.TaskGroup() as group:
                for _ in range(20):
                    group.create_task(suppressing_timeout(one()))
        await until(lambda: rig.in_flight() == rig.running() == 0)
        loads = [rig.router.load(rig.target(name)) for name in ("w0", "w1")]
        assert [(load.active_requests, load.queued_prefill_tokens, load.active_blocks) for load in loads] == [
            (0, 0, 0)
        ] * 2


async def suppressing_timeout(work):
    with suppress(TimeoutError):
        await work


async def test_a_connection_that_breaks_in_mid_stream_frees_everything():
    async with serving(Worker(SLOW)) as rig:
        raw = await RawConnection.open(rig.addresses.router)
        stream = raw.call(GENERATE, ask(5000).SerializeToString())
        await raw.read_until(DATA, stream)
        assert rig.in_flight() == 1
        raw.abort()
        await until(lambda: rig.in_flight() == rig.running() == 0, 2.0)


# --- clients that do not read -----------------------------------------------------------------------------------


async def test_readers_that_never_read_cost_little_and_do_not_hold_up_the_stop():
    engine = dataclasses.replace(FAST, max_num_seqs=64)
    async with serving(Worker(engine)) as rig:
        await collect(rig.stub.Generate(ask(100)))
        gc.collect()
        before = rss()
        stuck = []
        for _ in range(20):
            raw = await RawConnection.open(rig.addresses.router, {INITIAL_WINDOW_SIZE: 0})
            raw.call(GENERATE, ask(8000).SerializeToString())
            stuck.append(raw)
        await until(lambda: rig.in_flight() == 20)
        for _ in range(20):  # the others are served
            assert len(await collect(rig.stub.Generate(ask(20)))) > 0
        assert rss() - before < 60 << 20
        started = time.monotonic()
        await rig.server.stop(0.5)
        assert time.monotonic() - started < 1.5
        await until(lambda: rig.in_flight() == rig.running() == 0, 2.0)
        for raw in stuck:
            raw.abort()


async def test_a_reader_that_stops_reading_is_given_up(capsys):
    async with serving(Worker(), write_timeout_s=0.2) as rig:
        raw = await RawConnection.open(rig.addresses.router, {INITIAL_WINDOW_SIZE: 0})
        raw.call(GENERATE, ask(8000).SerializeToString())
        await until(lambda: rig.in_flight() == 1)
        await until(lambda: rig.in_flight() == rig.running() == 0, 2.0)
        assert not raw.reader.at_eof()  # the connection lives: other calls may run on it
        raw.abort()
    assert "client does not read" in capsys.readouterr().out


async def test_a_reader_that_goes_away_while_a_write_is_stuck_is_freed():
    async with serving(Worker()) as rig:
        raw = await RawConnection.open(rig.addresses.router, {INITIAL_WINDOW_SIZE: 0})
        stream = raw.call(GENERATE, ask(8000).SerializeToString())
        await until(lambda: rig.in_flight() == 1)
        await raw.read_until(HEADERS, stream)  # the first message is being written
        raw.reset(stream)
        await until(lambda: rig.in_flight() == rig.running() == 0, 2.0)
        raw.abort()


async def test_health_watchers_that_never_read_do_not_hold_up_the_stop():
    async with serving() as rig:
        raw = await RawConnection.open(rig.addresses.router, {INITIAL_WINDOW_SIZE: 0})
        stream = raw.call("/grpc.health.v1.Health/Watch", b"")
        await raw.read_until(HEADERS, stream)
        for ready in (True, False) * 5:
            rig.server.health.set_ready(ready)
        started = time.monotonic()
        await rig.server.stop(0.5)
        assert time.monotonic() - started < 1.5
        raw.abort()


# --- floods -----------------------------------------------------------------------------------------------------


async def test_silent_connections_are_closed_and_disturb_nobody():
    async with serving(Worker(), handshake_timeout_ms=1000) as rig:
        host, _, port = rig.addresses.router.rpartition(":")
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(200)]
        for _ in range(20):
            await rig.stub.BestWorkerId(best())
        async with asyncio.timeout(8), asyncio.TaskGroup() as group:
            for reader, _ in silent:
                group.create_task(closed(reader))
        for _, writer in silent:
            writer.close()


async def test_calls_without_a_message_do_not_keep_others_out():
    async with serving(Worker(), max_concurrent_streams=100) as rig:
        raw = await RawConnection.open(rig.addresses.router)
        for _ in range(100):
            raw.headers(BEST)
        await raw.writer.drain()
        for _ in range(50):
            assert (await rig.stub.BestWorkerId(best())).worker_name == "w0"
        raw.abort()


async def test_a_flood_of_resets_leaves_the_others_served():
    async with serving(Worker(SLOW), max_concurrent_streams=100) as rig:
        for _ in range(10):
            await rig.stub.BestWorkerId(best())
        before = rss()
        payload = ask(1000).SerializeToString()
        flooding = True
        resets = 0

        async def flood():
            nonlocal resets
            while flooding:
                raw = await RawConnection.open(rig.addresses.router)
                with suppress(ConnectionError, asyncio.IncompleteReadError):
                    for _ in range(500):
                        raw.reset(raw.call(GENERATE, payload))
                        resets += 1
                        if resets % 50 == 0:
                            await raw.writer.drain()
                            await asyncio.sleep(0)
                raw.abort()

        async with asyncio.TaskGroup() as group:
            group.create_task(flood())
            answered = 0
            until_time = time.monotonic() + 2.0
            while time.monotonic() < until_time:
                async with asyncio.timeout(10):
                    await rig.stub.BestWorkerId(best())
                answered += 1
            flooding = False
        assert resets > 500
        assert answered > 5
        await until(lambda: rig.in_flight() == rig.running() == 0)
        assert rss() - before < 100 << 20


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"\x00" * 4096,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64,
    ],
    ids=["http1", "tls", "zeros", "broken-frames"],
)
async def test_what_is_not_grpc_is_closed(data):
    async with serving(Worker(), handshake_timeout_ms=1000) as rig:
        host, _, port = rig.addresses.router.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        async with asyncio.timeout(8):
            await closed(reader)
        writer.close()
        assert (await rig.stub.BestWorkerId(best())).worker_name == "w0"


async def test_a_message_that_is_no_protobuf_is_the_callers_fault():
    async with serving(Worker()) as rig:
        calls = [
            rig.channel.unary_unary(BEST)(b"\xff" * 9),
            collect(rig.channel.unary_stream(GENERATE)(b"\xff" * 9)),
            rig.channel.unary_unary("/grpc.health.v1.Health/Check")(b"\xff" * 9),
        ]
        for call in calls:
            refused = await refusal(call)
            assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
            assert "DecodeError" not in refused.message
        assert (await rig.stub.BestWorkerId(best())).worker_name == "w0"


async def test_an_unknown_method_is_not_remembered():
    async with serving() as rig:
        for number in range(100):
            call = rig.channel.unary_unary(f"/kvrouter.v1.KvRouter/Nope{number}")
            refused = await refusal(call(b""))
            assert refused.code is grpc.StatusCode.UNIMPLEMENTED


async def test_the_stream_limit_is_announced():
    async with serving(max_concurrent_streams=17) as rig:
        raw = await RawConnection.open(rig.addresses.router)
        settings = await raw.read_until(SETTINGS, 0)
        pairs = [settings.payload[start : start + 6] for start in range(0, len(settings.payload), 6)]
        values = {int.from_bytes(pair[:2], "big"): int.from_bytes(pair[2:], "big") for pair in pairs}
        assert values[3] == 17  # SETTINGS_MAX_CONCURRENT_STREAMS
        raw.abort()
