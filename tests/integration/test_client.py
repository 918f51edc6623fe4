"""The typed client against a real router over real mock workers."""

import asyncio
import time

import grpc
import pytest

from integration.client_rig import (
    BLOCK,
    admin,
    eventually,
    fast,
    prompt,
    router,
)
from kvrouter_client import (
    BestWorkerIdRequest,
    KvRouterAdminClient,
    KvRouterClient,
    KvRouterError,
    RouterConfigOverride,
    RoutingHints,
    SamplingOptions,
    WorkerSpec,
    WorkerState,
)
from programs import ENDPOINT, Fleet, fleet, mock_worker

__all__ = ["admin", "fast", "router"]


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
