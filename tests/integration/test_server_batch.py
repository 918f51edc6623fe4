"""Many decisions in one message, and messages in a stream: each request is answered by itself."""

import asyncio
from contextlib import aclosing

import grpc
import pytest
from google.rpc import status_pb2
from grpc import StatusCode

from integration.server_rig import Worker, refusal, serving, until
from kvrouter_client import BestWorkerIdRequest, KvRouterClient, KvRouterError, WorkerChoice
from kvrouter_grpc._gen import router_pb2
from kvrouter_grpc.server import router_service
from kvrouter_grpc.server.router_service import MAX_BATCH

STREAM = "/kvrouter.v1.KvRouter/BestWorkerIdStream"
BATCH = "/kvrouter.v1.KvRouter/BestWorkerIdBatch"


def prompt(blocks=4, seed=0):
    return [seed * 1000 + token for token in range(16 * blocks)]


def best(**fields):
    return router_pb2.BestWorkerIdRequest(**({"token_ids": prompt()} | fields))


def batch(*requests):
    return router_pb2.BestWorkerIdBatchRequest(requests=requests)


async def test_a_batch_answers_as_single_calls_do():
    async with serving(Worker(), Worker()) as rig:
        await rig.cache("w1", prompt())
        requests = [best(), best(token_ids=prompt(seed=1)), best(include_candidates=True), best(request_id="mine")]
        reply = await rig.stub.BestWorkerIdBatch(batch(*requests))
        assert reply.results[0].response.worker_name == "w1"
        assert len(reply.results[2].response.candidates) == 2
        for request, result in zip(requests, reply.results, strict=True):
            single = await rig.stub.BestWorkerId(request)
            if single.overlap_blocks:  # otherwise both workers are as good, and chance decides
                assert result.response == single
            assert result.response.prompt_tokens == len(request.token_ids)


async def test_a_request_that_is_refused_leaves_its_neighbours_alone():
    async with serving(Worker()) as rig:
        wrong = [
            (best(token_ids=[]), StatusCode.INVALID_ARGUMENT),
            (best(endpoint="no.such.endpoint"), StatusCode.NOT_FOUND),
            (best(routing=router_pb2.RoutingHints(worker_id=1)), StatusCode.NOT_FOUND),
            (best(text="x", token_ids=[]), StatusCode.INVALID_ARGUMENT),
            (best(request_id="two words"), StatusCode.INVALID_ARGUMENT),
        ]
        requests = [best()]
        for request, _ in wrong:
            requests += [request, best()]
        reply = await rig.stub.BestWorkerIdBatch(batch(*requests))
        assert [result.WhichOneof("result") for result in reply.results] == ["response", "status"] * 5 + ["response"]
        for (request, code), result in zip(wrong, reply.results[1::2], strict=True):
            refused = await refusal(rig.stub.BestWorkerId(request))
            status = status_pb2.Status.FromString(result.status.SerializeToString())
            assert (status.code, status.message) == (code.value[0], refused.message)
            assert len(status.details) >= 1


async def test_one_request_of_a_batch_that_is_no_message_leaves_its_neighbours_alone():
    async with serving(Worker()) as rig:
        good = best().SerializeToString()
        data = b"".join(
            b"\x0a" + bytes([len(each) & 0x7F | 0x80, len(each) >> 7]) + each for each in (good, b"\xff", good)
        )
        call = rig.channel.unary_unary(BATCH, response_deserializer=router_pb2.BestWorkerIdBatchResponse.FromString)
        reply = await call(data)
        assert [result.WhichOneof("result") for result in reply.results] == ["response", "status", "response"]
        assert reply.results[1].status.code == StatusCode.INVALID_ARGUMENT.value[0]
        refused = await refusal(call(b"\xff" * 9))
        assert (refused.code, refused.reason) == (StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


async def test_reservations_of_a_batch_see_each_other():
    async with serving(Worker(), Worker()) as rig:
        requests = [best(reserve=True, request_id=f"r{i}", token_ids=prompt(seed=i)) for i in range(8)]
        requests.append(best(reserve=True, request_id="r3"))
        reply = await rig.stub.BestWorkerIdBatch(batch(*requests))
        names = [result.response.worker_name for result in reply.results[:8]]
        assert names.count("w0") == names.count("w1") == 4
        assert reply.results[8].status.code == StatusCode.ALREADY_EXISTS.value[0]
        assert rig.in_flight() == 8
        for i in range(8):
            await rig.stub.Free(router_pb2.FreeRequest(request_id=f"r{i}"))
        assert rig.in_flight() == 0


@pytest.mark.parametrize(("method", "asks"), [("choose", {}), ("best_worker", {"cache_salt": "tenant"})])
async def test_a_defect_in_one_request_stays_inside_it(monkeypatch, method, asks):
    async with serving(Worker()) as rig:
        decide = getattr(rig.router, method)

        def breaks(asked, *args, **options):
            if len(asked.prompt.tokens if method == "best_worker" else asked) == 16:
                raise RuntimeError("secret")
            return decide(asked, *args, **options)

        monkeypatch.setattr(rig.router, method, breaks)
        reply = await rig.stub.BestWorkerIdBatch(batch(best(**asks), best(token_ids=prompt(1), **asks), best(**asks)))
        assert [result.WhichOneof("result") for result in reply.results] == ["response", "status", "response"]
        assert reply.results[1].status.code == StatusCode.INTERNAL.value[0]
        assert b"secret" not in reply.SerializeToString()


async def test_the_largest_batch_and_one_more():
    async with serving(Worker()) as rig:
        requests = [best(token_ids=[1])] * MAX_BATCH
        assert len((await rig.stub.BestWorkerIdBatch(batch(*requests))).results) == MAX_BATCH
        refused = await refusal(rig.stub.BestWorkerIdBatch(batch(*requests, best())))
        assert refused.code is StatusCode.INVALID_ARGUMENT
        assert "has 1025 entries, at most 1024" in refused.fields["requests"]
        assert not (await rig.stub.BestWorkerIdBatch(batch())).results


async def test_others_are_served_while_a_large_batch_is_decided(monkeypatch):
    monkeypatch.setattr(router_service, "SLICE_S", 0)  # a turn per request, however fast the machine
    decided = []
    decide = router_service.RouterService._decide_plain

    def noted(service, data, start, stop):
        decided.append(start)
        return decide(service, data, start, stop)

    monkeypatch.setattr(router_service.RouterService, "_decide_plain", noted)
    async with serving(Worker()) as rig:
        deciding = rig.stub.BestWorkerIdBatch(batch(*[best()] * MAX_BATCH))
        most = 0
        while not deciding.done():
            before = len(decided)
            await asyncio.sleep(0)  # the server is on this loop: whoever waits gets a turn as often
            most = max(most, len(decided) - before)
        assert len((await deciding).results) == len(decided) == MAX_BATCH
        assert most <= 2


# --- streams ----------------------------------------------------------------------------------------------------


async def test_a_stream_answers_its_batches_in_order():
    async with serving(Worker()) as rig, KvRouterClient(rig.addresses.router) as client:

        async def batches():
            for count in (1, 3, 0, 2):
                yield [prompt(count)] * count

        async with aclosing(client.best_worker_id_stream(batches())) as answers:
            found = [[choice.prompt_tokens for choice in choices] async for choices in answers]
        assert found == [[16], [48] * 3, [], [32] * 2]


async def test_a_stream_can_be_a_conversation():
    async with serving(Worker()) as rig:
        call = rig.channel.stream_stream(
            STREAM,
            request_serializer=router_pb2.BestWorkerIdStreamRequest.SerializeToString,
            response_deserializer=router_pb2.BestWorkerIdStreamResponse.FromString,
        )()
        for count in (1, 2, 3):
            await call.write(router_pb2.BestWorkerIdStreamRequest(requests=[best()] * count))
            assert len((await call.read()).results) == count
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is StatusCode.OK


@pytest.mark.parametrize("data", [b"\xff" * 9, batch(*[best(token_ids=[1])] * (MAX_BATCH + 1)).SerializeToString()])
async def test_a_bad_batch_ends_its_stream(data):
    async with serving(Worker()) as rig:
        call = rig.channel.stream_stream(STREAM)()
        await call.write(batch(best()).SerializeToString())
        assert await call.read()
        await call.write(data)
        refused = await refusal(call.read())
        assert (refused.code, refused.reason) == (StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


async def test_a_stream_that_waits_does_not_hold_up_the_stop():
    async with serving(Worker()) as rig:
        call = rig.channel.stream_stream(STREAM)()
        await call.write(batch(best()).SerializeToString())
        assert await call.read()
        async with asyncio.timeout(5):
            await rig.server.stop(30)
        refused = await refusal(call.read())
        assert (refused.code, refused.reason, refused.retry_s) == (StatusCode.UNAVAILABLE, "DRAINING", 1.0)


async def test_streams_that_are_dropped_leave_nothing_behind():
    async with serving(Worker()) as rig:
        service = rig.server._router_service
        calls = [rig.channel.stream_stream(STREAM)() for _ in range(5)]
        for call in calls:
            await call.write(batch(best()).SerializeToString())
            assert await call.read()
        await until(lambda: len(service._idle) == 5)
        for call in calls:
            call.cancel()
        await until(lambda: not service._idle)
        assert (await rig.stub.BestWorkerId(best())).worker_name == "w0"


# --- the client -------------------------------------------------------------------------------------------------


async def test_the_client_gives_each_request_its_outcome():
    async with serving(Worker()) as rig, KvRouterClient(rig.addresses.router) as client:
        one, two, three = await client.best_worker_id_batch(
            [prompt(), [], BestWorkerIdRequest(token_ids=prompt(2), include_candidates=True)]
        )
        assert isinstance(one, WorkerChoice)
        assert one.prompt_tokens == 64
        assert isinstance(two, KvRouterError)
        assert (two.code, two.reason) == (StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert [violation.field for violation in two.violations] == ["token_ids"]
        assert two.request_id
        assert isinstance(three, WorkerChoice)
        assert [candidate.worker_name for candidate in three.candidates] == ["w0"]


async def test_what_the_clients_batches_raise_is_raised():
    async with serving(Worker()) as rig, KvRouterClient(rig.addresses.router) as client:

        async def batches():
            yield [prompt()]
            raise LookupError("no more")

        async with aclosing(client.best_worker_id_stream(batches())) as answers:
            with pytest.raises(LookupError, match="no more"):
                [choices async for choices in answers]
