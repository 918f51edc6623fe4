"""Explain over the real server, and `kvrouter explain` against it."""

import asyncio
import json
import sys
from collections import Counter

import grpc
import pytest

from integration.stack import ENDPOINT, Stack, admin_pb2, router_pb2, running, until
from kvrouter_grpc.routing.workers import worker_id_of
from programs import environment

PROMPT = list(range(1, 65))


def question(**fields) -> admin_pb2.ExplainRequest:
    return admin_pb2.ExplainRequest(**fields)


async def explain(stack: Stack, **fields) -> list[admin_pb2.Explanation]:
    return list((await stack.admin.Explain(question(**fields))).decisions)


async def test_a_request_is_explained_as_it_would_be_decided() -> None:
    async with running("a", "b", "c") as stack:
        await stack.on("b", PROMPT)
        await stack.admin.DrainWorker(admin_pb2.DrainWorkerRequest(name="c"))
        asked = router_pb2.BestWorkerIdRequest(token_ids=[*PROMPT, 7], include_candidates=True)
        answer = await stack.stub.BestWorkerId(asked)
        count = stack.router.log.count
        (told,) = await explain(stack, request=asked)
        assert stack.router.log.count == count
        assert (told.worker_id, told.worker_name) == (answer.worker_id, "b")
        assert told.candidates == answer.candidates
        assert (told.endpoint, told.mode, told.cost) == (ENDPOINT, "kv", "default")
        assert (told.prompt_tokens, told.prompt_blocks, told.block_size) == (65, 4, 16)
        assert told.reason == "the lowest cost"
        b, a, c = told.candidates
        assert [each.worker_name for each in (b, a, c)] == ["b", "a", "c"]
        assert (b.overlap.device_blocks, a.overlap.device_blocks) == (4, 0)
        assert (b.chance, a.chance) == (1, 0)
        assert b.cost < a.cost
        assert all(each.cost == each.score == pytest.approx(sum(term.value for term in each.terms)) for each in (a, b))
        assert c.dropped.startswith("draining")
        assert not c.HasField("cost")


async def test_decisions_are_remembered_on_every_path() -> None:
    async with running("a", "b", router={"mode": "least-loaded"}) as stack:
        plain = router_pb2.BestWorkerIdRequest(token_ids=PROMPT, request_id="plain")
        other = router_pb2.BestWorkerIdRequest(token_ids=PROMPT, request_id="other", include_candidates=True)
        booked = router_pb2.BestWorkerIdRequest(token_ids=PROMPT, request_id="booked", reserve=True)
        answers = {
            "plain": await stack.stub.BestWorkerId(plain),
            "other": await stack.stub.BestWorkerId(other),
            "booked": await stack.stub.BestWorkerId(booked),
        }
        batch = router_pb2.BestWorkerIdBatchRequest(
            requests=[router_pb2.BestWorkerIdRequest(token_ids=PROMPT, request_id="one-of-many")]
        )
        answers["one-of-many"] = (await stack.stub.BestWorkerIdBatch(batch)).results[0].response
        answers["stream"] = (await stack.generate(PROMPT, request_id="stream"))[0].routing
        for request_id, answer in answers.items():
            (told,) = await explain(stack, request_id=request_id)
            assert (told.request_id, told.worker_id) == (request_id, answer.worker_id)
            assert told.mode == "least-loaded"
            picked = next(each for each in told.candidates if each.worker_id == told.worker_id)
            assert picked.score == picked.active_requests == min(each.active_requests for each in told.candidates)
        (tie,) = await explain(stack, request_id="plain")
        assert tie.reason == "the fewest requests in flight, as 1 more; drawn by chance"
        assert [each.chance for each in tie.candidates] == [0.5, 0.5]
        newest = [each.request_id for each in await explain(stack, recent=100)]
        assert newest == ["stream", "one-of-many", "booked", "other", "plain"]
        assert len(await explain(stack, recent=2, endpoint=ENDPOINT)) == 2


async def test_pins_and_sessions_say_why_the_others_are_left_out() -> None:
    async with running("a", "b", router={"session_affinity_ttl_secs": 60}) as stack:
        pin = router_pb2.RoutingHints(worker_id=worker_id_of("b"), session_id="s")
        booked = router_pb2.BestWorkerIdRequest(token_ids=PROMPT, routing=pin, request_id="1", reserve=True)
        await stack.stub.BestWorkerId(booked)
        (told,) = await explain(stack, request_id="1")
        assert told.reason == "the only one that may take it"
        assert [each.dropped for each in told.candidates] == ["", "not the pinned worker"]
        asked = router_pb2.BestWorkerIdRequest(token_ids=PROMPT, routing=router_pb2.RoutingHints(session_id="s"))
        (told,) = await explain(stack, request=asked)
        assert told.worker_name == "b"
        assert [each.dropped for each in told.candidates] == ["", "its session is bound to b"]


async def test_every_attempt_is_remembered() -> None:
    async with running("a", "b") as stack:
        await stack.on("a", PROMPT)
        await stack.workers["a"].kill()
        answer = await stack.generate(PROMPT, request_id="again")
        decisions = await explain(stack, request_id="again")
        assert len(decisions) == answer[0].routing.attempts
        assert decisions[0].worker_id == answer[0].routing.worker_id


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({}, "INVALID_ARGUMENT", "recent"),
        ({"recent": 101}, "INVALID_ARGUMENT", "recent"),
        ({"request_id": "nobody"}, "NOT_FOUND", "nobody"),
        ({"request_id": "two words"}, "INVALID_ARGUMENT", "request_id"),
        ({"recent": 1}, "NOT_FOUND", "no decisions were taken yet"),
        ({"recent": 1, "endpoint": "x.y.z"}, "NOT_FOUND", "x.y.z"),
        ({"request": {}}, "INVALID_ARGUMENT", "token_ids"),
        ({"request": {"token_ids": [1], "reserve": True, "request_id": "1"}}, "INVALID_ARGUMENT", "reserve"),
    ],
    ids=repr,
)
async def test_what_cannot_be_explained_is_said(fields, code, said) -> None:
    async with running("a") as stack:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await explain(stack, **fields)
        assert caught.value.code().name == code
        assert said in caught.value.details()


async def test_without_a_log_requests_are_explained_and_ids_are_not() -> None:
    async with running("a", decisions={"log_size": 0}) as stack:
        assert stack.router.log is None
        (told,) = await explain(stack, request=router_pb2.BestWorkerIdRequest(token_ids=PROMPT))
        assert told.worker_name == "a"
        with pytest.raises(grpc.aio.AioRpcError, match="--decision-log-size"):
            await explain(stack, recent=1)


async def command(stack: Stack, *args: str) -> tuple[int, str, str]:
    """Run `kvrouter explain` against the stack."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvrouter_grpc", "explain", "--address", stack.app.admin_address, *args),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(),
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_the_command_shows_what_the_rpc_says() -> None:
    async with running("a", "b") as stack:
        await stack.on("b", PROMPT)
        await stack.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=PROMPT, request_id="mine"))
        code, out, _ = await command(stack, "mine")
        assert code == 0
        lines = out.splitlines()
        assert lines[0].startswith("mine at 20")
        assert lines[2] == "went to b: the lowest cost"
        assert "replication" in out or "new_prefill" in out
        code, out, _ = await command(stack, "--json", "--tokens", "[1, 2, 3]")
        assert code == 0
        assert json.loads(out)["decisions"][0]["prompt_tokens"] == 3
        pinned = {"token_ids": PROMPT, "routing": {"worker_id": worker_id_of("a")}}
        code, out, _ = await command(stack, "--request", json.dumps(pinned))
        assert "went to a: the only one that may take it" in out
        code, _, err = await command(stack, "nobody")
        assert (code, "NOT_FOUND" in err) == (1, True)
        code, _, err = await command(stack, "--tokens", "1,x")
        assert (code, "--tokens must be token ids" in err) == (64, True)


async def test_decisions_are_written_while_they_are_taken_and_replayed(tmp_path) -> None:
    log = tmp_path / "decisions.jsonl"
    async with running("a", "b", decisions={"log_file": str(log)}) as stack:
        await stack.on("b", PROMPT)
        await until(lambda: log.exists() and log.read_text().count("\n") == 2)  # settings, decision
        for number in range(20):
            asked = router_pb2.BestWorkerIdRequest(token_ids=[*PROMPT[: 16 * (number % 4)], 1], request_id=f"r{number}")
            await stack.stub.BestWorkerId(asked)
        picks = {each.request_id: each.worker_name for each in await explain(stack, recent=100)}
    # What was taken last was written when the router stopped.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvrouter_grpc", "replay", str(log), "--json"),
        stdout=asyncio.subprocess.PIPE,
        env=environment(),
    )
    out, _ = await process.communicate()
    told = json.loads(out)
    assert (told["decisions"], told["changed"], told["unlike"], told["lost"], told["unreadable"]) == (21, 0, 0, 0, 0)
    assert {each["worker"]: each["before"] for each in told["workers"]} == dict(Counter(picks.values()))


async def test_workers_above_a_threshold_are_left_out_for_that_reason() -> None:
    async with running("a", "b") as stack:
        booked = router_pb2.BestWorkerIdRequest(token_ids=PROMPT, request_id="1", reserve=True)
        busy = (await stack.stub.BestWorkerId(booked)).worker_name
        limit = admin_pb2.Thresholds(active_prefill_tokens=10)
        await stack.admin.SetThresholds(admin_pb2.SetThresholdsRequest(thresholds=limit))
        for request in (
            router_pb2.BestWorkerIdRequest(token_ids=PROMPT, request_id="2"),
            router_pb2.BestWorkerIdRequest(token_ids=PROMPT, request_id="3", include_candidates=True),
        ):
            await stack.stub.BestWorkerId(request)
            (told,) = await explain(stack, request_id=request.request_id)
            assert told.reason == "the only one that may take it"
            assert (told.candidates[1].worker_name, told.candidates[1].dropped[:10]) == (busy, "overloaded")
