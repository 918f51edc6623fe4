"""The typed client against a real router over real mock workers."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVar

import aiohttp
import grpc
import pytest

from kvrouter_client import (
    BestWorkerIdRequest,
    FinishReason,
    GenerateChunk,
    GenerateStream,
    KvRouterAdminClient,
    KvRouterClient,
    KvRouterError,
    OutputOptions,
    RouterConfigOverride,
    RoutingHints,
    SamplingOptions,
    WorkerSpec,
    WorkerState,
)
from programs import ENDPOINT, Fleet, fleet, mock_worker

BLOCK = 16
SLOW = ("--itl-ms", "20")
DEADLINE_S = 10.0

T = TypeVar("T")


@pytest.fixture(scope="module")
def fast() -> Iterator[Fleet]:
    """Two workers that compute as fast as they can."""
    with fleet(2) as running:
        yield running


@pytest.fixture(scope="module")
def slow() -> Iterator[Fleet]:
    """Two workers that take their time, so that a stream is still open when the test looks."""
    with fleet(2, workers=SLOW) as running:
        yield running


@pytest.fixture
async def router(fast: Fleet) -> AsyncIterator[KvRouterClient]:
    async with KvRouterClient(fast.address) as client:
        yield client


@pytest.fixture
async def admin(fast: Fleet) -> AsyncIterator[KvRouterAdminClient]:
    async with KvRouterAdminClient(fast.address) as client:
        yield client


def prompt(seed: int, blocks: int = 6, rest: int = 4) -> list[int]:
    """Tokens that no other seed shares a block with."""
    return [1000 + seed * 100 + i % 97 for i in range(blocks * BLOCK + rest)]


async def eventually(ask: Callable[[], Awaitable[T]], fits: Callable[[T], bool]) -> T:
    """Ask again until the answer fits."""
    end = time.monotonic() + DEADLINE_S
    while not fits(answer := await ask()):
        assert time.monotonic() < end, f"still not so after {DEADLINE_S} s: {answer}"
        await asyncio.sleep(0.01)
    return answer


async def requests_in_flight(address: str) -> int:
    async with KvRouterAdminClient(address) as admin:
        return sum(each.load.active_requests for each in (await admin.get_loads()).loads)


async def requests_running(running: Fleet) -> int:
    """What the engines themselves say."""
    total = 0
    async with aiohttp.ClientSession(raise_for_status=True) as http:
        for worker in running.workers.values():
            async with http.get(f"{worker.said['url']}/metrics") as reply:
                text = await reply.text()
            counts = re.findall(r"^vllm:num_requests_(?:running|waiting){.*} (\S+)$", text, re.MULTILINE)
            total += sum(int(float(count)) for count in counts)
    return total


async def assert_nothing_is_left(running: Fleet) -> None:
    """Neither the router nor an engine still has a request."""
    await eventually(lambda: requests_in_flight(running.address), lambda count: count == 0)
    await eventually(lambda: requests_running(running), lambda count: count == 0)


# --- Generate -----------------------------------------------------------------------------------------------------


async def test_stream_is_the_answer_of_the_engine(fast: Fleet, router: KvRouterClient) -> None:
    chunks = [chunk async for chunk in router.generate(prompt(1), max_tokens=12, temperature=0.0)]

    routing = chunks[0].routing
    assert routing is not None
    assert routing.worker_name in fast.workers
    assert routing.prompt_tokens == len(prompt(1))
    assert all(chunk.routing is None for chunk in chunks[1:])
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12

    body = {"prompt": prompt(1), "max_tokens": 12, "temperature": 0.0, "return_token_ids": True}
    url = f"{fast.workers['w0'].said['url']}/v1/completions"
    async with aiohttp.ClientSession(raise_for_status=True) as http, http.post(url, json=body) as reply:
        (choice,) = (await reply.json())["choices"]
    assert [token for chunk in chunks for token in chunk.token_ids] == choice["token_ids"]
    assert "".join(chunk.text for chunk in chunks) == choice["text"]


async def test_options_reach_the_engine(router: KvRouterClient) -> None:
    stream = router.generate(
        prompt(2),
        max_tokens=4,
        sampling_options=SamplingOptions(n=2, temperature=1.0, seed=7),
        output_options=OutputOptions(logprobs=2),
        request_id="options-reach-the-engine",
    )
    chunks = [chunk async for chunk in stream]
    assert {chunk.index for chunk in chunks} == {0, 1}
    assert sum(len(chunk.token_ids) for chunk in chunks) == 8
    with_tokens = [chunk for chunk in chunks if chunk.token_ids]
    assert all(len(chunk.log_probs) == len(chunk.token_ids) for chunk in with_tokens)
    assert all(len(position) >= 2 for chunk in with_tokens for position in chunk.top_logprobs)
    assert chunks[0].routing is not None
    assert chunks[0].routing.request_id == "options-reach-the-engine"


async def test_query_annotation_decides_only(fast: Fleet, router: KvRouterClient) -> None:
    chunks = [chunk async for chunk in router.generate(prompt(3), annotations=["query_instance_id"])]
    (only,) = chunks
    assert only.routing is not None
    assert only.token_ids == ()
    await assert_nothing_is_left(fast)


async def first_chunk(client: KvRouterClient) -> GenerateChunk:
    return await anext(aiter(client.generate(prompt(4), max_tokens=2000)))


async def last_chunk(stream: GenerateStream) -> GenerateChunk:
    return [chunk async for chunk in stream][-1]


async def test_leaving_the_block_cancels_the_request(slow: Fleet) -> None:
    async with KvRouterClient(slow.address) as client:
        async with client.generate(prompt(4), max_tokens=2000) as stream:
            async for _ in stream:
                break
            assert await requests_in_flight(slow.address) == 1
        await assert_nothing_is_left(slow)
        assert [chunk async for chunk in stream] == []


async def test_forgetting_the_stream_cancels_the_request(slow: Fleet) -> None:
    async with KvRouterClient(slow.address) as client:
        await first_chunk(client)
        await assert_nothing_is_left(slow)


async def test_cancelling_the_reader_cancels_the_request(slow: Fleet) -> None:
    async with KvRouterClient(slow.address) as client:
        stream = client.generate(prompt(5), max_tokens=2000)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(last_chunk(stream), 0.3)
        await assert_nothing_is_left(slow)


async def test_deadline_ends_the_stream_and_the_request(slow: Fleet) -> None:
    async with KvRouterClient(slow.address, generate_timeout_s=0.5) as client:
        with pytest.raises(KvRouterError) as caught:
            async for _ in client.generate(prompt(6), max_tokens=2000):
                pass
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await assert_nothing_is_left(slow)


async def test_worker_that_dies_in_mid_stream_is_told() -> None:
    with fleet(1, workers=SLOW) as running:
        async with KvRouterClient(running.address) as client:
            stream = client.generate(prompt(7), max_tokens=2000)
            assert (await anext(stream)).routing is not None
            running.workers["w0"].kill()
            with pytest.raises(KvRouterError) as caught:
                async for _ in stream:
                    pass
        assert caught.value.code is grpc.StatusCode.ABORTED
        assert caught.value.reason == "STREAM_INTERRUPTED"
        assert caught.value.retry_after_s is None
        assert caught.value.request_id


# --- BestWorkerId and GetOverlapScores ----------------------------------------------------------------------------


async def test_choice_names_the_worker_that_holds_the_prompt(fast: Fleet, router: KvRouterClient) -> None:
    answer = [chunk async for chunk in router.generate(prompt(10), max_tokens=1)]
    assert answer[0].routing is not None

    choice = await eventually(lambda: router.best_worker_id(prompt(10)), lambda choice: choice.overlap_blocks == 6)
    assert choice.worker_id == answer[0].routing.worker_id
    assert choice.worker_name == answer[0].routing.worker_name
    assert choice.url == fast.workers[choice.worker_name].said["url"]
    assert choice.overlap.device_blocks == choice.overlap.total == 6
    assert choice.expected_cached_tokens == 6 * BLOCK
    assert (choice.prompt_tokens, choice.block_size) == (len(prompt(10)), BLOCK)
    assert choice.freshness == 1.0
    assert choice.candidates == ()
    assert choice.reservation_ttl_s is None


async def test_candidates_explain_the_choice(fast: Fleet, router: KvRouterClient) -> None:
    plain = await router.best_worker_id(prompt(11))
    hints = RoutingHints(allowed_worker_ids=[plain.worker_id])
    choice = await router.best_worker_id(prompt(11), routing=hints, include_candidates=True)
    allowed, dropped = choice.candidates
    assert allowed.worker_id == choice.worker_id
    assert allowed.cost == choice.cost
    assert sum(allowed.terms.values()) == pytest.approx(allowed.cost)
    assert dropped.cost is None
    assert dropped.dropped


async def test_decision_for_decoding_alone_has_its_own_cost(router: KvRouterClient) -> None:
    choice = await router.best_worker_id(prompt(12), prefilled=True, include_candidates=True)
    assert set(choice.candidates[0].terms) == {"prefill", "decode", "active_requests"}


async def test_reasons_are_told(router: KvRouterClient, admin: KvRouterAdminClient) -> None:
    choice = await router.best_worker_id(prompt(16), include_candidates=True)
    told = await admin.explain(prompt(16))
    assert (told.prompt_tokens, told.block_size, told.mode, told.prefilled) == (len(prompt(16)), BLOCK, "kv", False)
    assert {each.worker_name for each in told.candidates} == {each.worker_name for each in choice.candidates}
    request = BestWorkerIdRequest(token_ids=prompt(16), prefilled=True)
    assert (await admin.explain(request)).prefilled

    answer = [chunk async for chunk in router.generate(prompt(17), max_tokens=1, request_id="told-later")]
    assert answer[0].routing is not None
    (why,) = await admin.decisions("told-later")
    assert (why.request_id, why.worker_id) == ("told-later", answer[0].routing.worker_id)
    assert abs(why.decided_at.timestamp() - time.time()) < 60
    assert why == (await admin.decisions())[0]
    assert len(await admin.decisions(recent=2, endpoint=ENDPOINT)) == 2
    with pytest.raises(KvRouterError, match="UNKNOWN_DECISION"):
        await admin.decisions("never-heard-of")


async def test_snapshot_is_streamed(router: KvRouterClient, admin: KvRouterAdminClient) -> None:
    assert b"".join([piece async for piece in admin.stream_snapshot()])
    with pytest.raises(KvRouterError, match="UNKNOWN_ENDPOINT"):
        await anext(admin.stream_snapshot("no.such.endpoint"))


async def test_override_changes_the_cost(router: KvRouterClient) -> None:
    override = RouterConfigOverride(cost="dynamo")
    choice = await router.best_worker_id(prompt(12), router_config_override=override, include_candidates=True)
    assert set(choice.candidates[0].terms) == {"prefill", "decode", "active_requests"}


async def test_overlap_scores_name_every_worker(fast: Fleet, router: KvRouterClient) -> None:
    async for _ in router.generate(prompt(13), max_tokens=1):
        pass
    scores = await eventually(
        lambda: router.get_overlap_scores(prompt(13)),
        lambda scores: any(each.device_blocks for each in scores.workers),
    )
    assert (scores.block_size, scores.num_blocks) == (BLOCK, 6)
    assert {each.worker_name for each in scores.workers} == set(fast.workers)
    assert sorted(each.device_blocks for each in scores.workers) == [0, 6]


async def test_every_wrong_field_is_told(router: KvRouterClient) -> None:
    options = SamplingOptions(top_p=3.0, min_p=-1.0)
    with pytest.raises(KvRouterError) as caught:
        async for _ in router.generate(prompt(14), sampling_options=options):
            pass
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.reason == "INVALID_REQUEST"
    assert {each.field for each in caught.value.violations} == {
        "sampling_options.top_p",
        "sampling_options.min_p",
    }
    assert all(each.description for each in caught.value.violations)


async def test_text_needs_a_tokenizer(router: KvRouterClient) -> None:
    with pytest.raises(KvRouterError) as caught:
        await router.best_worker_id("What is a router?")
    (violation,) = caught.value.violations
    assert violation.field == "text"


async def test_unknown_endpoint_is_told(router: KvRouterClient) -> None:
    with pytest.raises(KvRouterError, match="UNKNOWN_ENDPOINT") as caught:
        await router.best_worker_id(prompt(15), endpoint="no.such.endpoint")
    assert caught.value.code is grpc.StatusCode.NOT_FOUND


# --- reservations -------------------------------------------------------------------------------------------------


async def booked(admin: KvRouterAdminClient) -> tuple[int, int]:
    """Requests and waiting prompt tokens that the router has booked."""
    loads = (await admin.get_loads()).loads
    return (
        sum(each.load.active_requests for each in loads),
        sum(each.load.queued_prefill_tokens for each in loads),
    )


async def test_reservation_lasts_as_long_as_its_block(router: KvRouterClient, admin: KvRouterAdminClient) -> None:
    async with router.reserve(prompt(20), ttl_s=30) as reservation:
        assert reservation.choice.reservation_ttl_s == pytest.approx(30, abs=1)
        assert await booked(admin) == (1, len(prompt(20)))
        await reservation.mark_prefill_complete()
        await reservation.mark_prefill_complete()
        assert await booked(admin) == (1, 0)
    assert await booked(admin) == (0, 0)


async def test_reservation_reports_its_output(router: KvRouterClient, admin: KvRouterAdminClient) -> None:
    async with router.reserve(prompt(23), prefilled=True) as reservation:
        assert await booked(admin) == (1, 0)  # its prompt is computed elsewhere
        await reservation.report_output(16)
        with pytest.raises(KvRouterError, match="output_tokens"):
            await reservation.report_output(0)
    with pytest.raises(KvRouterError, match="UNKNOWN_RESERVATION"):
        await reservation.report_output(32)


async def test_reservation_is_freed_when_its_block_fails(router: KvRouterClient, admin: KvRouterAdminClient) -> None:
    with pytest.raises(ZeroDivisionError):
        async with router.reserve(prompt(21)):
            raise ZeroDivisionError
    assert await booked(admin) == (0, 0)


async def test_reservation_is_freed_when_its_task_is_cancelled(
    router: KvRouterClient, admin: KvRouterAdminClient
) -> None:
    inside = asyncio.Event()

    async def hold() -> None:
        async with router.reserve(prompt(22)):
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    await inside.wait()
    assert await booked(admin) == (1, len(prompt(22)))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await booked(admin) == (0, 0)


async def test_second_reservation_of_a_name_is_refused_and_frees_nothing(
    router: KvRouterClient, admin: KvRouterAdminClient
) -> None:
    async with router.reserve(prompt(24), request_id="mine"):
        with pytest.raises(KvRouterError) as caught:
            async with router.reserve(prompt(24), request_id="mine"):
                pytest.fail("entered")
        assert caught.value.code is grpc.StatusCode.ALREADY_EXISTS
        assert (await booked(admin))[0] == 1
    assert await booked(admin) == (0, 0)


async def test_expired_reservation_is_told_and_leaves_quietly(
    router: KvRouterClient, admin: KvRouterAdminClient, caplog: pytest.LogCaptureFixture
) -> None:
    async with router.reserve(prompt(25), ttl_s=1) as reservation:

        async def refusal() -> str:
            try:
                await reservation.mark_prefill_complete()
            except KvRouterError as error:
                return error.reason
            return ""

        assert await eventually(refusal, lambda reason: reason != "") == "UNKNOWN_RESERVATION"
        assert await booked(admin) == (0, 0)
    assert caplog.records == []


async def test_burst_of_reservations_spreads(router: KvRouterClient) -> None:
    async with router.reserve(prompt(26)) as one, router.reserve(prompt(27)) as two:
        assert one.choice.worker_id != two.choice.worker_id


# --- administration -----------------------------------------------------------------------------------------------


async def test_fleet_is_listed_with_its_streams(fast: Fleet, admin: KvRouterAdminClient) -> None:
    listed = await admin.list_workers(ENDPOINT)
    assert listed.ready
    assert listed.findings == ()
    assert [worker.spec.name for worker in listed.workers] == sorted(fast.workers)
    for worker in listed.workers:
        assert worker.state is WorkerState.READY
        assert worker.spec.url == fast.workers[worker.spec.name].said["url"]
        assert worker.spec.block_size == BLOCK
        assert worker.registration_ttl_s is None
        (stream,) = worker.streams
        assert stream.freshness == 1.0


async def test_worker_registers_renews_drains_and_goes(fast: Fleet) -> None:
    with mock_worker() as spare, fleet(1) as running:
        async with KvRouterAdminClient(running.address) as admin, KvRouterClient(running.address) as router:
            worker_id = await admin.register_worker(WorkerSpec(url=spare.said["url"], name="spare"), ttl_s=60)
            pin = RoutingHints(worker_id=worker_id)

            async def state() -> WorkerState:
                listed = await admin.list_workers()
                return next(each.state for each in listed.workers if each.worker_id == worker_id)

            await eventually(state, lambda state: state is WorkerState.READY)
            assert await admin.renew_worker("spare") == pytest.approx(60, abs=1)
            assert (await router.best_worker_id(prompt(30), routing=pin)).worker_name == "spare"

            assert await admin.drain_worker("spare") == 0
            assert await state() is WorkerState.DRAINING
            with pytest.raises(KvRouterError, match="PINNED_WORKER_UNAVAILABLE"):
                await router.best_worker_id(prompt(30), routing=pin)
            await admin.drain_worker("spare", undo=True)
            assert await state() is WorkerState.READY

            await admin.deregister_worker("spare")
            assert [each.spec.name for each in (await admin.list_workers()).workers] == ["w0"]
            with pytest.raises(KvRouterError, match="UNKNOWN_WORKER"):
                await admin.renew_worker("spare")


async def test_configured_worker_is_not_replaced_by_a_registration(fast: Fleet, admin: KvRouterAdminClient) -> None:
    with pytest.raises(KvRouterError) as caught:
        await admin.register_worker(WorkerSpec(url="http://127.0.0.1:1", name="w0"))
    assert caught.value.code is grpc.StatusCode.ALREADY_EXISTS
    assert caught.value.reason == "CONFIGURED_WORKER"


async def test_loads_name_every_target(fast: Fleet, admin: KvRouterAdminClient) -> None:
    loads = await admin.get_loads()
    assert [each.worker_name for each in loads.loads] == sorted(fast.workers)
    assert all(each.endpoint == ENDPOINT for each in loads.loads)
    (index,) = loads.indexes
    assert (index.endpoint, index.block_size) == (ENDPOINT, BLOCK)
