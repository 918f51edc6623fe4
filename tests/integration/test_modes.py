"""Every mode over the real server with mock workers: who gets a request, and what still holds in each of them."""

from collections import Counter
from dataclasses import replace

import grpc
import pytest

from integration.server_rig import BLOCK, FAST, Worker, collect, refusal, router_pb2, serving, until
from kvrouter_grpc.routing.mode import CPU_TAINT
from kvrouter_grpc.types import EngineReport

PROMPT = list(range(1000, 1000 + 4 * BLOCK))
MODES = (
    "kv",
    "round-robin",
    "random",
    "power-of-two",
    "least-loaded",
    "device-aware-weighted",
    "session",
    "prefix",
    "kv-aware",
    "direct",
)


class Asker:
    """Asks for workers, and reserves them."""

    def __init__(self, rig):
        self.rig = rig
        self.count = 0

    async def reserve(self, tokens=(1, 2, 3), metadata=None, **routing):
        """The name of the worker that a request is booked on."""
        self.count += 1
        request = router_pb2.BestWorkerIdRequest(
            token_ids=tokens,
            reserve=True,
            request_id=f"r{self.count}",
            routing=router_pb2.RoutingHints(**routing),
        )
        return (await self.rig.stub.BestWorkerId(request, metadata=metadata)).worker_name

    async def reserve_many(self, count, **request):
        return Counter([await self.reserve(**request) for _ in range(count)])


@pytest.mark.parametrize("mode", MODES)
async def test_pins_filters_and_temperature_hold_in_every_mode(mode):
    async with serving(Worker(), Worker(taints=frozenset({"gpu"})), policy={"mode": mode, "temperature": 0.5}) as rig:
        ask, (w0, w1) = Asker(rig), (rig.target(name).worker_id for name in ("w0", "w1"))
        for _ in range(3):
            assert await ask.reserve(worker_id=w1) == "w1"
            assert await ask.reserve(worker_id=w0) == "w0"
            if mode != "direct":
                assert await ask.reserve(allowed_worker_ids=[w0]) == "w0"
                assert await ask.reserve(required_taints=["gpu"]) == "w1"
        answer = await collect(
            rig.stub.Generate(
                router_pb2.GenerateRequest(
                    token_ids=PROMPT,
                    routing=router_pb2.RoutingHints(worker_id=w1),
                    stop_conditions=router_pb2.StopConditions(max_tokens=2),
                )
            )
        )
        assert answer[0].routing.worker_name == "w1"


async def test_round_robin_and_random():
    async with serving(*[Worker()] * 3, policy={"mode": "round-robin"}) as rig:
        assert await Asker(rig).reserve_many(9) == {"w0": 3, "w1": 3, "w2": 3}
    async with serving(*[Worker()] * 3, policy={"mode": "random"}) as rig:
        assert set(await Asker(rig).reserve_many(30)) == {"w0", "w1", "w2"}


@pytest.mark.parametrize("mode", ["least-loaded", "power-of-two"])
async def test_requests_are_spread_by_load(mode):
    async with serving(*[Worker()] * 3, policy={"mode": mode}) as rig:
        counts = await Asker(rig).reserve_many(30)
        assert max(counts.values()) - min(counts.values()) <= (1 if mode == "least-loaded" else 6)


async def test_workers_on_cpus_get_their_share():
    policy = {"mode": "device-aware-weighted", "accelerator_to_cpu_ratio": 4}
    async with serving(Worker(), Worker(taints=frozenset({CPU_TAINT})), policy=policy) as rig:
        counts = await Asker(rig).reserve_many(25)
        assert counts["w0"] == pytest.approx(20, abs=1)


@pytest.mark.parametrize("policy", [{"mode": "session"}, {"mode": "least-loaded", "session_affinity_ttl_secs": 60}])
async def test_a_session_stays_on_its_worker(policy):
    async with serving(*[Worker()] * 4, policy={"session_load_bound": 100, **policy}) as rig:
        ask = Asker(rig)
        homes = {name: await ask.reserve(session_id=name) for name in map(str, range(20))}
        assert len(set(homes.values())) > 1
        for name, home in homes.items():
            assert await ask.reserve(session_id=name) == home
            assert await ask.reserve(metadata=[("x-session-id", name)]) == home
        request = router_pb2.BestWorkerIdRequest(
            token_ids=[1], routing=router_pb2.RoutingHints(session_id="0"), include_candidates=True
        )
        reply = await rig.stub.BestWorkerId(request)
        assert reply.worker_name == homes["0"]
        if "session_affinity_ttl_secs" in policy:
            said = {candidate.dropped for candidate in reply.candidates if candidate.worker_name != homes["0"]}
            assert said == {f"its session is bound to {homes['0']}"}
        wrong = await refusal(ask.reserve(session_id="s" * 257))
        assert (wrong.code, list(wrong.fields)) == (grpc.StatusCode.INVALID_ARGUMENT, ["routing.session_id"])
        wrong = await refusal(ask.reserve(metadata=[("x-session-id", "s" * 257)]))
        assert list(wrong.fields) == ["metadata x-session-id"]


async def test_a_session_leaves_a_worker_that_fails():
    policy = {"mode": "session", "session_affinity_ttl_secs": 60, "session_load_bound": 100}
    async with serving(*[Worker()] * 3, policy=policy) as rig:
        ask = Asker(rig)
        home = await ask.reserve(session_id="a")
        await rig.engines[home].kill()
        request = router_pb2.GenerateRequest(
            token_ids=PROMPT,
            routing=router_pb2.RoutingHints(session_id="a"),
            stop_conditions=router_pb2.StopConditions(max_tokens=2),
        )
        moved = (await collect(rig.stub.Generate(request)))[0].routing.worker_name
        assert moved != home
        assert await ask.reserve(session_id="a") == moved


@pytest.mark.parametrize("mode", ["prefix", "kv-aware"])
async def test_the_longest_prefix_is_followed_whatever_the_load(mode):
    policy = {"mode": mode, "prefix_threshold": 2 * BLOCK, "kv_aware_threshold": 2 * BLOCK}
    async with serving(*[Worker()] * 3, policy=policy) as rig:
        ask = Asker(rig)
        await rig.cache("w1", PROMPT)
        w1 = rig.target("w1").worker_id
        for _ in range(3):
            await ask.reserve(worker_id=w1)
        assert await ask.reserve_many(3, tokens=PROMPT) == {"w1": 3}
        # A match that is too short does not count: then load decides.
        assert "w1" not in await ask.reserve_many(2, tokens=PROMPT[:BLOCK] + list(range(3 * BLOCK)))


async def test_direct_needs_a_pin():
    async with serving(Worker(), Worker(), policy={"mode": "direct"}) as rig:
        wrong = await refusal(rig.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=[1])))
        assert (wrong.code, list(wrong.fields)) == (grpc.StatusCode.INVALID_ARGUMENT, ["routing.worker_id"])
        assert "--router-mode direct" in wrong.fields["routing.worker_id"]
        wrong = await refusal(collect(rig.stub.Generate(router_pb2.GenerateRequest(token_ids=[1]))))
        assert list(wrong.fields) == ["routing.worker_id"]
        assert rig.in_flight() == 0


@pytest.mark.parametrize("cost", ["default", "dynamo", "dynamo-example", "lmetric"])
async def test_every_cost_may_be_asked_for(cost):
    async with serving(Worker(), Worker()) as rig:
        await rig.cache("w1", PROMPT)
        override = router_pb2.RouterConfigOverride(cost=cost)
        request = router_pb2.BestWorkerIdRequest(
            token_ids=PROMPT, router_config_override=override, include_candidates=True
        )
        reply = await rig.stub.BestWorkerId(request)
        assert reply.worker_name == "w1"
        for candidate in reply.candidates:
            assert sum(term.value for term in candidate.terms) == pytest.approx(candidate.cost)


async def test_output_counts_while_it_comes():
    slow = replace(FAST, speedup=1.0)
    async with serving(Worker(slow), policy={"track_output_blocks": True}) as rig:
        request = router_pb2.GenerateRequest(
            token_ids=PROMPT, stop_conditions=router_pb2.StopConditions(max_tokens=10 * BLOCK, ignore_eos=True)
        )
        call = rig.stub.Generate(request)
        generated = 0
        async for message in call:
            generated += len(message.token_ids)
            if generated > 2 * BLOCK:
                break
        assert rig.router.load(rig.target("w0")).active_blocks >= 4 + 3
        call.cancel()
        await until(lambda: rig.router.load(rig.target("w0")).active_blocks == 0)


async def test_load_from_elsewhere_counts():
    async with serving(Worker(), Worker()) as rig:
        busy = rig.target("w0")
        rig.router.feedback.engine_reported(busy, EngineReport(running=3, waiting=5, kv_usage=0.5))
        assert rig.router.load(busy).active_requests == rig.router.loads.foreign(busy).requests == 8
        assert await Asker(rig).reserve() == "w1"
