"""What the client makes of answers that a healthy router does not give: a server of our own says them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2

from kvrouter_client import FinishReason, KvRouterClient, KvRouterError
from kvrouter_client._gen import router_pb2, router_pb2_grpc

Behave = Callable[[int, Any, Any], Any]
Context = grpc.aio.ServicerContext[Any, Any]


async def freely(_request: Any, _context: Any) -> router_pb2.FreeResponse:
    return router_pb2.FreeResponse()


class Servicer(router_pb2_grpc.KvRouterServicer):
    """Counts the calls and lets the test say what becomes of each."""

    def __init__(self, behave: Behave) -> None:
        self.behave = behave
        self.calls = 0
        self.asked: list[str] = []
        self.freed: list[str] = []
        self.freeing: Callable[[Any, Any], Any] = freely

    async def BestWorkerId(self, request: router_pb2.BestWorkerIdRequest, context: Context) -> Any:
        self.calls += 1
        self.asked.append(request.request_id)
        return await self.behave(self.calls, request, context)

    async def Free(self, request: router_pb2.FreeRequest, context: Context) -> router_pb2.FreeResponse:
        self.freed.append(request.request_id)
        return await self.freeing(request, context)

    async def Generate(self, request: router_pb2.GenerateRequest, context: Context) -> AsyncIterator[Any]:
        self.calls += 1
        async for message in self.behave(self.calls, request, context):
            yield message


@asynccontextmanager
async def serving(behave: Behave) -> AsyncIterator[tuple[Servicer, str]]:
    server = grpc.aio.server()
    servicer = Servicer(behave)
    router_pb2_grpc.add_KvRouterServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield servicer, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def details(*messages: Any) -> bytes:
    status = status_pb2.Status(code=3)
    for message in messages:
        status.details.add().Pack(message)
    return status.SerializeToString()


async def failure_with(trailing: tuple[tuple[str, bytes | str], ...]) -> KvRouterError:
    async def behave(_call: int, _request: Any, context: Context) -> None:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "so it is", trailing_metadata=trailing)

    async with serving(behave) as (_, address), KvRouterClient(address) as client:
        with pytest.raises(KvRouterError) as caught:
            await client.best_worker_id([1])
    return caught.value


async def test_details_are_decoded() -> None:
    bad_request = error_details_pb2.BadRequest()
    bad_request.field_violations.add(field="token_ids", description="is empty")
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(1500)
    info = error_details_pb2.ErrorInfo(reason="R", domain="kvrouter.dev", metadata={"request_id": "abc"})
    error = await failure_with((("grpc-status-details-bin", details(info, bad_request, retry)),))
    assert (error.code, error.message, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "so it is", "R")
    assert error.request_id == "abc"
    assert error.violations == (("token_ids", "is empty"),)
    assert error.retry_after_s == 1.5
    assert str(error) == "INVALID_ARGUMENT: so it is [R]"


BROKEN = status_pb2.Status(details=[AnyMessage(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")])
FOREIGN = status_pb2.Status(details=[AnyMessage(type_url="type.example/unknown", value=b"?")])
FAR = error_details_pb2.RetryInfo()
FAR.retry_delay.seconds = 2**62


@pytest.mark.parametrize(
    "trailing",
    [
        (),
        (("grpc-status-details-bin", b"\xff\xff\xff"),),
        (("grpc-status-details-bin", BROKEN.SerializeToString()),),
        (("grpc-status-details-bin", FOREIGN.SerializeToString()),),
        (("grpc-status-details-bin", details(FAR)),),
        (("other", "text"),),
    ],
    ids=["none", "no protobuf", "broken detail", "unknown detail", "beyond every clock", "other key"],
)
async def test_status_stands_whatever_the_details_are(trailing: tuple[tuple[str, bytes | str], ...]) -> None:
    error = await failure_with(trailing)
    assert (error.code, error.message) == (grpc.StatusCode.INVALID_ARGUMENT, "so it is")
    assert error.reason == ""
    assert error.violations == ()


async def test_unary_call_is_retried_when_the_router_is_unavailable() -> None:
    async def behave(call: int, _request: Any, context: Context) -> Any:
        if call < 3:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        return router_pb2.BestWorkerIdResponse(worker_id=7)

    async with serving(behave) as (servicer, address), KvRouterClient(address) as client:
        assert (await client.best_worker_id([1])).worker_id == 7
    assert servicer.calls == 3


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL, grpc.StatusCode.NOT_FOUND]
)
async def test_no_other_failure_is_retried(code: grpc.StatusCode) -> None:
    async def behave(_call: int, _request: Any, context: Context) -> None:
        await context.abort(code, "no")

    async with serving(behave) as (servicer, address), KvRouterClient(address) as client:
        with pytest.raises(KvRouterError):
            await client.best_worker_id([1])
    assert servicer.calls == 1


async def test_stream_is_not_retried() -> None:
    async def behave(_call: int, _request: Any, context: Context) -> AsyncIterator[Any]:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "no")
        yield router_pb2.GenerateResponse()

    async with serving(behave) as (servicer, address), KvRouterClient(address) as client:
        with pytest.raises(KvRouterError) as caught:
            async for _ in client.generate([1]):
                pass
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert servicer.calls == 1


async def test_silent_router_meets_the_deadline() -> None:
    async def behave(_call: int, _request: Any, _context: Context) -> None:
        await asyncio.Event().wait()

    async with serving(behave) as (_, address), KvRouterClient(address, timeout_s=0.2) as client:
        with pytest.raises(KvRouterError) as caught:
            await client.best_worker_id([1])
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        with pytest.raises(KvRouterError):
            await client.best_worker_id([1], timeout_s=0.1)


async def test_absent_router_is_unavailable_without_a_reason() -> None:
    async with KvRouterClient("127.0.0.1:1") as client:
        with pytest.raises(KvRouterError) as caught:
            await client.best_worker_id([1])
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert caught.value.reason == caught.value.request_id == ""


async def test_every_kind_of_chunk_is_converted() -> None:
    async def behave(_call: int, _request: Any, _context: Context) -> AsyncIterator[Any]:
        yield router_pb2.GenerateResponse(token_ids=[2**31 - 1], text="é", usage=router_pb2.Usage(prompt_tokens=1))
        yield router_pb2.GenerateResponse(
            finish_reason=router_pb2.FINISH_REASON_STOP,
            stop_string="end",
            kv_transfer_params_json='{"remote_port": 1}',
            usage=router_pb2.Usage(prompt_tokens=1, completion_tokens=1, cached_tokens=0),
        )
        yield router_pb2.GenerateResponse(index=1, finish_reason=99, stop_token_id=0)

    async with serving(behave) as (_, address), KvRouterClient(address) as client:
        first, second, third = [chunk async for chunk in client.generate([1])]
    assert (first.token_ids, first.text, first.finish_reason) == ((2**31 - 1,), "é", None)
    assert first.usage is not None
    assert first.usage.cached_tokens is None
    assert (second.finish_reason, second.stop_reason) == (FinishReason.STOP, "end")
    assert second.kv_transfer_params == {"remote_port": 1}
    assert second.usage is not None
    assert second.usage.cached_tokens == 0
    assert (third.index, third.stop_reason, third.finish_reason) == (1, 0, None)


async def never(_call: int, _request: Any, _context: Context) -> None:
    await asyncio.Event().wait()


async def test_reservation_whose_answer_is_late_is_freed() -> None:
    async with serving(never) as (servicer, address), KvRouterClient(address) as client:
        with pytest.raises(KvRouterError) as caught:
            async with client.reserve([1], timeout_s=0.2):
                pytest.fail("entered")
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert servicer.freed == servicer.asked != []


async def test_reservation_whose_answer_is_not_waited_for_is_freed() -> None:
    async with serving(never) as (servicer, address), KvRouterClient(address) as client:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.reserve([1]).__aenter__(), 0.2)
        assert servicer.freed == servicer.asked != []


async def test_refused_reservation_has_nothing_to_free() -> None:
    async def behave(_call: int, _request: Any, context: Context) -> None:
        await context.abort(grpc.StatusCode.ALREADY_EXISTS, "the id is in use")

    async with serving(behave) as (servicer, address), KvRouterClient(address) as client:
        with pytest.raises(KvRouterError, match="ALREADY_EXISTS"):
            async with client.reserve([1], request_id="somebody else's"):
                pytest.fail("entered")
        assert servicer.freed == []


async def test_reservation_that_cannot_be_freed_lets_the_work_stand(caplog: pytest.LogCaptureFixture) -> None:
    async def behave(_call: int, _request: Any, _context: Context) -> Any:
        return router_pb2.BestWorkerIdResponse(worker_id=7)

    async with serving(behave) as (servicer, address), KvRouterClient(address) as client:

        async def refuse(_request: Any, context: Context) -> None:
            await context.abort(grpc.StatusCode.INTERNAL, "no")

        servicer.freeing = refuse
        async with client.reserve([1]) as reservation:
            assert reservation.choice.worker_id == 7
        (record,) = caplog.records
        assert reservation.request_id in record.getMessage()
