"""Workers that publish no events: what they hold is predicted from what they were given."""

import random
from dataclasses import replace

from integration.stack import FAST, admin_pb2, router_pb2, running, until
from kvrouter_grpc._gen import common_pb2

SILENT = replace(FAST, kv_events=False)


def words(seed, count):
    return random.Random(str(seed)).choices(range(300, 4000), k=count)


async def converse(stack, session, turns=3):
    """A session that sends its whole history with every turn; who answered, and how much of each prompt was cached."""
    history = words(session, 64)
    names, cached, expected = [], [], []
    for turn in range(turns):
        messages = await stack.generate(history, max_tokens=33)
        routing = messages[0].routing
        names.append(routing.worker_name)
        expected.append(routing.expected_cached_tokens)
        cached.append(messages[-1].usage.cached_tokens)
        history += [token for message in messages for token in message.token_ids] + words(f"{session} {turn}", 20)
    return names, cached, expected


async def test_sessions_stay_where_their_history_is_and_predictions_are_exact():
    async with running("a", "b", "c", worker=SILENT, router={"kv_events": False}) as stack:
        seen = set()
        for session in range(6):
            names, cached, expected = await converse(stack, session)
            assert len(set(names)) == 1
            assert cached == expected, "the blocks of the answers count, too"
            assert cached[0] == 0 < cached[1] < cached[2]
            seen.update(names)
        assert len(seen) > 1
        listed = await stack.admin.ListWorkers(admin_pb2.ListWorkersRequest())
        assert listed.ready
        assert not listed.findings
        for worker in listed.workers:
            (stream,) = worker.streams
            assert stream.state == common_pb2.STREAM_STATE_PREDICTED
            assert 0 < stream.freshness < 1


async def test_a_worker_found_without_events_is_predicted_and_says_what_to_change():
    async with running("a", worker=FAST, workers={"b": SILENT}) as stack:
        stream = stack.router.index.stream(stack.target("b"))
        assert stream.state.value == "predicted"
        assert "--kv-events-config" in stream.detail
        asked = words(1, 160)
        pin = router_pb2.RoutingHints(worker_id=stack.target("b").worker_id)
        await stack.generate(asked, routing=pin)
        reply = await stack.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=asked))
        assert reply.worker_name == "b"
        assert reply.overlap.device_blocks == 10
        assert 0 < reply.freshness < 1


async def test_what_the_engine_evicted_is_forgotten_once_it_says_so():
    tiny = replace(SILENT, num_blocks=33)  # 32 usable; the router is not told
    async with running("a", worker=tiny) as stack:
        target = stack.target("a")
        first = words(0, 160)
        for seed in range(6):
            await stack.generate(words(seed, 160), max_tokens=1)
        index = stack.router.index
        index._views[target].predicted.capacity = 0  # as if it had not told its size
        for seed in range(6, 12):
            await stack.generate(words(seed, 160), max_tokens=1)
        before = index.blocks(target)
        assert before > 32
        messages = await stack.generate(words(7, 160), max_tokens=1)
        assert messages[-1].usage.cached_tokens < messages[0].routing.expected_cached_tokens
        await until(lambda: index.blocks(target) < before, "what was used before that is forgotten")
        assert (await stack.generate(words(11, 160), max_tokens=1))[-1].usage.cached_tokens > 0
        reply = await stack.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=first))
        assert reply.overlap.device_blocks == 0


async def test_the_size_of_the_cache_bounds_what_is_predicted():
    async with running("a", worker=replace(SILENT, num_blocks=65)) as stack:
        for seed in range(12):
            await stack.generate(words(seed, 160), max_tokens=1)
        assert stack.router.workers.named("a").spec.total_kv_blocks
        assert 30 < stack.router.index.blocks(stack.target("a")) <= 65


async def test_load_aware_predicts_nothing():
    async with running("a", worker=SILENT, router={"kv_events": False, "load_aware": True}) as stack:
        await stack.generate(words(1, 160))
        stream = stack.router.index.stream(stack.target("a"))
        assert stream.state.value == "off"
        assert stack.router.index.blocks(stack.target("a")) == 0


async def test_a_reservation_predicts_until_it_is_freed_and_for_its_ttl():
    async with running("a", worker=SILENT, router={"ttl_secs": 0.2}) as stack:
        index, target = stack.router.index, stack.target("a")
        request = router_pb2.BestWorkerIdRequest(token_ids=words(1, 160), request_id="r", reserve=True)
        await stack.stub.BestWorkerId(request)
        assert index.blocks(target) == 10
        await stack.stub.Free(router_pb2.FreeRequest(request_id="r"))
        assert index.blocks(target) == 10
        await until(lambda: index.blocks(target) == 0, "the prediction has ended")


async def test_nothing_is_predicted_of_a_request_that_was_never_computed():
    async with running("a", worker=SILENT, router={"request_expiry_s": 0.2}) as stack:
        index, target = stack.router.index, stack.target("a")
        request = router_pb2.BestWorkerIdRequest(token_ids=words(1, 160), request_id="r", reserve=True)
        await stack.stub.BestWorkerId(request)
        assert index.blocks(target) == 10
        await until(lambda: index.blocks(target) == 0, "nobody freed the reservation")


async def test_a_restarted_worker_is_predicted_to_hold_nothing():
    async with running("a", worker=SILENT) as stack:
        index, target = stack.router.index, stack.target("a")
        await stack.generate(words(1, 160))
        assert index.blocks(target) > 0
        await stack.workers["a"].restart()
        await until(lambda: index.blocks(target) == 0, "the old process is forgotten")


async def test_predictions_stand_in_until_events_arrive():
    slow = replace(FAST, speedup=1.0, prefill_tokens_per_s=1000)  # a second until the first event
    router = {"cost": "dynamo", "predicted_ttl_secs": 5.0, "kv_overlap_score_credit": 4.0}
    async with running("a", "b", worker=slow, router=router) as stack:
        asked = words(1, 960)
        call = stack.stub.Generate(
            router_pb2.GenerateRequest(token_ids=asked, stop_conditions=router_pb2.StopConditions(max_tokens=1))
        )
        await until(lambda: stack.load("a")[0] + stack.load("b")[0] == 1)
        reply = await stack.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=asked))
        assert reply.overlap.device_blocks == 60
        await call.read()
        call.cancel()
