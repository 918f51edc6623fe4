"""The engine client over real sockets: whatever an engine does wrong becomes an error that says so, at once."""

import asyncio
import socket
from contextlib import ExitStack

import pytest
from aiohttp import web

from integration.engine_server import (
    DONE,
    HEAD,
    PREFILL_LEG,
    STREAM,
    WIRE,
    Handler,
    anext_until_fault,
    chunked,
    client_of,
    collect,
    completing,
    endless,
    fail,
    raw,
    request,
    serving,
    silent,
    streaming,
    token,
)
from kvrouter_grpc.errors import (
    EngineRejectedError,
    RouterError,
    StreamInterruptedError,
    UpstreamError,
    UpstreamTimeoutError,
    UpstreamUnavailableError,
)
from kvrouter_grpc.types import EngineRequest
from kvrouter_grpc.upstream import vllm_http


class TestFaults:
    async def test_refused_connection(self) -> None:
        async with serving() as engine:
            pass
        await fail(engine.url, UpstreamUnavailableError)

    async def test_unknown_host(self) -> None:
        await fail("http://worker.invalid:8000", UpstreamUnavailableError)

    @pytest.mark.parametrize("reset", [False, True])
    async def test_connection_lost_before_the_answer(self, reset: bool) -> None:
        async with raw(reset=reset) as engine:
            await fail(engine.url, UpstreamUnavailableError)
        async with raw(HEAD, reset=reset) as engine:
            await fail(engine.url, UpstreamUnavailableError)

    @pytest.mark.parametrize("reset", [False, True])
    @pytest.mark.parametrize(
        "rest",
        [b"", b"5\r\ndata:", chunked(token(2)[:-9]), b"zz\r\n", b"0\r\n\r\n", chunked(DONE) + b"0\r\n\r\n"],
        ids=["nothing", "cut-frame", "cut-event", "garbage", "end-of-body", "done-without-finish"],
    )
    async def test_connection_lost_after_a_token(self, rest: bytes, reset: bool) -> None:
        delivered = asyncio.Event()
        steps = (HEAD + chunked(token(1)), delivered, rest)
        async with raw(*steps, reset=reset) as engine, client_of(engine.url) as client:
            answer = client.generate(request(), None)
            assert len(await anext(answer)) == 1
            delivered.set()
            with pytest.raises(StreamInterruptedError) as caught:
                await anext(answer)
        assert caught.value.before_first_token is False
        assert caught.value.metadata["worker_url"] == engine.url

    @pytest.mark.parametrize(
        "garbage",
        [
            b"\x00\x01\x02\r\n\r\n",
            b"SSH-2.0-OpenSSH\r\n",
            b"HTTP/1.1 banana\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n\x00: x\r\n\r\n",
        ],
    )
    async def test_not_http(self, garbage: bytes) -> None:
        async with raw(garbage) as engine:
            await fail(engine.url, UpstreamUnavailableError)

    @pytest.mark.parametrize(
        ("status", "body", "kind"),
        [
            (400, (WIRE / "error_400_rank.json").read_bytes(), EngineRejectedError),
            (404, (WIRE / "error_404.json").read_bytes(), EngineRejectedError),
            (422, b'{"detail":[]}', EngineRejectedError),
            (400, b"\xff" * 100_000, EngineRejectedError),
            (404, b'{"detail":"Not Found"}', UpstreamError),
            (401, b'{"error":"Unauthorized"}', UpstreamError),
            (302, b"", UpstreamError),
            (204, b"", UpstreamError),
            (429, b"", UpstreamUnavailableError),
            (500, b'{"error":{"message":"boom","code":500}}', UpstreamUnavailableError),
            (503, b'{"error":{"message":"engine is currently busy","code":503}}', UpstreamUnavailableError),
        ],
    )
    async def test_http_status(self, status: int, body: bytes, kind: type[RouterError]) -> None:
        async def answer(call: web.Request) -> web.StreamResponse:
            return web.Response(status=status, body=body, headers={"Location": "/elsewhere"})

        async with completing(answer) as engine:
            error = await fail(engine.url, kind)
            assert error.metadata["http_status"] == str(status)
            assert len(engine.requests) == 1  # no redirect is followed, nothing is sent twice

    async def test_the_engines_reason_is_passed_on(self) -> None:
        async def answer(call: web.Request) -> web.StreamResponse:
            return web.Response(status=400, body=(WIRE / "error_400_multiline.json").read_bytes())

        async with completing(answer) as engine:
            error = await fail(engine.url, EngineRejectedError)
        assert error.message.startswith("the engine refused the request: 4 validation errors: {'type':")
        assert "\n" not in error.message
        assert error.metadata["param"] == "body.prompt.0"

    async def test_a_refusal_whose_body_never_comes_still_counts(self) -> None:
        async def answer(call: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(status=503)
            await response.prepare(call)
            await asyncio.Event().wait()
            raise AssertionError

        async with completing(answer) as engine:
            await fail(engine.url, UpstreamUnavailableError, first_token_timeout_s=0.1)

    @pytest.mark.parametrize("body", [b"\x00" * 5000, b"data: " + b"x" * 5000, b"data: x\n" * 1000, b"data: {\n\n"])
    async def test_garbage_in_a_stream(self, body: bytes) -> None:
        async with completing(streaming(body)) as engine:
            await fail(engine.url, UpstreamError, max_response_bytes=1024)

    async def test_too_large_a_whole_answer(self) -> None:
        async def answer(call: web.Request) -> web.StreamResponse:
            return web.Response(body=b" " * 5000)

        async with completing(answer) as engine:
            await fail(engine.url, UpstreamError, asked=request(**PREFILL_LEG), max_response_bytes=1024)

    @pytest.mark.parametrize("asked", [request(), request(**PREFILL_LEG)], ids=["stream", "whole"])
    async def test_first_token_timeout(self, asked: EngineRequest) -> None:
        async with completing(silent) as engine:
            error = await fail(engine.url, UpstreamTimeoutError, asked=asked, first_token_timeout_s=0.05)
            assert error.message == "no answer from the worker within 0.05 s"
            await asyncio.wait_for(engine.gone.wait(), 5)  # the engine is told to stop

    async def test_inter_token_timeout(self) -> None:
        async with completing(endless(3600)) as engine:
            error = await fail(engine.url, UpstreamTimeoutError, chunks=1, inter_token_timeout_s=0.05)
            assert error.message == "no token from the worker within 0.05 s"
            await asyncio.wait_for(engine.gone.wait(), 5)

    @pytest.mark.parametrize(("answer", "chunks"), [(silent, 0), (endless(3600), 1)], ids=["no-answer", "no-token"])
    async def test_a_server_that_is_down_is_not_waited_for(
        self, answer: Handler, chunks: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(vllm_http, "_SILENCE_S", 0.05)
        async with completing(answer) as engine, client_of(engine.url) as client:
            for known_before in (False, True):
                client.set_down(known_before)
                engine.called.clear()
                got = asyncio.create_task(anext_until_fault(client))
                await asyncio.wait_for(engine.called.wait(), 5)
                client.set_down(True)
                seen, fault = await asyncio.wait_for(got, 5)
                assert seen == chunks
                assert type(fault) is (StreamInterruptedError if chunks else UpstreamUnavailableError)
                assert fault.before_first_token == (not chunks)

    async def test_a_server_that_is_back_in_time_is_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(vllm_http, "_SILENCE_S", 0.2)
        go_on = asyncio.Event()

        async def late(call: web.Request) -> web.StreamResponse:
            await go_on.wait()
            return await streaming(STREAM)(call)

        async with completing(late) as engine, client_of(engine.url) as client:
            got = asyncio.create_task(collect(client))
            await asyncio.wait_for(engine.called.wait(), 5)
            client.set_down(True)
            client.set_down(False)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(got), 0.4)
            go_on.set()
            assert len(await got) > 0

    async def test_a_server_that_is_down_and_goes_on_answering_is_listened_to(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(vllm_http, "_SILENCE_S", 0.2)

        async def steady(call: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(call)
            for number in range(20):
                await response.write(token(number, "stop" if number == 19 else None))
                await asyncio.sleep(0.03)
            await response.write(DONE)
            return response

        async with completing(steady) as engine, client_of(engine.url) as client:
            client.set_down(True)
            assert len(await collect(client)) == 20

    async def test_bytes_without_tokens_do_not_reset_the_timeout(self) -> None:
        async def drip(call: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(call)
            while True:
                await response.write(b": still here\n\n")
                await asyncio.sleep(0.005)

        async with completing(drip) as engine:
            await fail(engine.url, UpstreamTimeoutError, first_token_timeout_s=0.1)

    async def test_a_slow_caller_is_not_the_engines_silence(self) -> None:
        seen = 0
        async with (
            completing(streaming(token(1), token(2, "stop"), DONE)) as engine,
            client_of(engine.url, inter_token_timeout_s=0.05) as client,
        ):
            async for chunks in client.generate(request(), None):
                seen += len(chunks)
                await asyncio.sleep(0.1)  # longer than the timeout
        assert seen == 2

    async def test_connect_timeout(self) -> None:
        # A listener that accepts nothing and whose backlog is full lets no further connection in.
        with socket.socket() as listener, ExitStack() as stack:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            for _ in range(4):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(listener.getsockname())
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            error = await fail(url, UpstreamTimeoutError, connect_timeout_s=0.1)
        assert error.message == "no connection from the worker within 0.1 s"
