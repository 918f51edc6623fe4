"""Routers that start with what one before them knew, and must be exact again whatever happened meanwhile."""

import random
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import grpc
import pytest

import programs
from integration.mock_client import complete, http_session
from integration.stack import ENDPOINT, FAST, admin_pb2, router_pb2, running, serving, until
from kvrouter_grpc._gen import router_pb2_grpc
from kvrouter_grpc.mock_worker import MockWorker
from kvrouter_grpc.routing import snapshot as form
from kvrouter_grpc.routing.snapshot import Part, Snapshot
from kvrouter_grpc.snapshots import keeper
from kvrouter_grpc.types import StreamState

SHORT_RING = replace(FAST, buffer_steps=20)  # a replay alone cannot bring the index back


def words(seed, count=160):
    return random.Random(seed).choices(range(300, 4000), k=count)


@asynccontextmanager
async def engines(*names, config=SHORT_RING):
    async with AsyncExitStack() as stack:
        yield {name: await stack.enter_async_context(MockWorker(config)) for name in names}


async def warm_up(stack, prompts=40):
    for seed in range(prompts):
        for name in stack.workers:
            await stack.on(name, words(f"{name} {seed}"), max_tokens=1)


async def exact(stack, seeds):
    """What the router expects of each prompt is what the engine finds; how many blocks that was."""
    found = 0
    for name, engine in stack.workers.items():
        stream = stack.router.index.stream(stack.target(name))
        await until(lambda stream=stream: stream.state is StreamState.LIVE, f"{name} is live: {stream}")
        await stack.synced(name)
        pin = router_pb2.RoutingHints(worker_id=stack.target(name).worker_id, dp_rank=0)
        for seed in seeds:
            messages = await stack.generate(words(f"{name} {seed}"), 1, routing=pin)
            cached = messages[-1].usage.cached_tokens
            assert messages[0].routing.expected_cached_tokens == cached, (name, seed)
            found += cached // engine.config.block_size
            await stack.synced(name)
    return found


async def test_a_restarted_router_is_as_warm_and_exact_as_before(tmp_path):
    router = {"snapshot_dir": tmp_path}
    async with engines("a", "b") as workers, http_session() as http:
        async with serving(workers, router=router) as stack:
            await warm_up(stack)
            held = {name: stack.router.index.blocks(stack.target(name)) for name in workers}
        for seed in range(15):  # while no router listens, and enough to evict
            status, _ = await complete(http, workers["a"], model="mock", prompt=words(f"a {100 + seed}"), max_tokens=1)
            assert status == 200
        async with serving(workers, router=router) as stack:
            await stack.synced("b")
            assert stack.router.index.blocks(stack.target("b")) == held["b"]
            assert stack.router.index.stream(stack.target("b")).restarts == 0
            assert not stack.router.index.stream(stack.target("a")).partial
            assert await exact(stack, [*range(0, 40, 4), *range(100, 115)]) > 200


async def test_without_a_snapshot_a_short_ring_brings_back_little(tmp_path):
    async with engines("a") as workers:
        async with serving(workers, router={"snapshot_dir": tmp_path}) as stack:
            await warm_up(stack)
            held = stack.router.index.blocks(stack.target("a"))
        async with serving(workers, router={"snapshot_dir": tmp_path, "reset_states": True}) as stack:
            await stack.synced("a")
            assert stack.router.index.stream(stack.target("a")).partial
            assert stack.router.index.blocks(stack.target("a")) < held / 1.5


@pytest.mark.parametrize("tells_its_start", [True, False])
async def test_an_engine_that_restarted_meanwhile_holds_nothing(tmp_path, tells_its_start, monkeypatch):
    if not tells_its_start:  # then only the events can prove it
        monkeypatch.setattr("kvrouter_grpc.routing.snapshot.Part.of", _of_an_engine_that_does_not_tell())
    async with engines("a", "b") as workers, http_session() as http:
        async with serving(workers, router={"snapshot_dir": tmp_path}) as stack:
            await warm_up(stack)
        await workers["a"].restart()
        for seed in range(45):  # past the number that the old process had reached
            await complete(http, workers["a"], model="mock", prompt=words(f"a {200 + seed}"), max_tokens=1)
        async with serving(workers, router={"snapshot_dir": tmp_path}) as stack:
            assert await exact(stack, [0, 20, 39, 240, 244]) >= 18


def _of_an_engine_that_does_not_tell():
    true = Part.of
    return lambda index, target, _started_at: true(index, target, None)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "other version", "other block size"])
async def test_a_snapshot_of_no_use_is_refused_and_the_start_is_cold(tmp_path, damage, caplog):
    async with engines("a", config=FAST) as workers:
        router = {"snapshot_dir": tmp_path, "block_size": 16}
        async with serving(workers, router=router) as stack:
            await warm_up(stack, 5)
        (file,) = tmp_path.iterdir()
        data = bytearray(file.read_bytes())
        if damage == "flipped":
            data[len(data) // 2] ^= 4
        elif damage == "cut":
            del data[-20:]
        elif damage == "empty":
            data.clear()
        elif damage == "other version":
            data[8] += 1
        file.write_bytes(data)
        if damage == "other block size":
            snapshot = Snapshot.read(bytes(data), ENDPOINT)
            file.write_bytes(_with_block_size(snapshot, 32))
        async with serving(workers, router=router) as stack:
            assert await exact(stack, range(5)) == 5 * 9  # of full hits an engine computes the last block again
        assert Snapshot.read(file.read_bytes(), ENDPOINT).parts, "the next one is whole again"


def _with_block_size(snapshot, block_size):
    parts = [form.framed(part) for part in snapshot.parts.values()]
    return form.head(ENDPOINT, block_size, 0.0) + b"".join(parts) + form.tail(len(parts))


async def test_a_joining_router_takes_the_snapshot_of_another():
    async with engines("a", "b") as workers, serving(workers) as first:
        await warm_up(first)
        async with serving(workers, router={"snapshot_from": first.app.admin_address}) as second:
            for name in workers:
                await second.synced(name)
                held = [stack.router.index.blocks(stack.target(name)) for stack in (first, second)]
                assert held[0] == held[1]
            assert await exact(second, range(0, 40, 8)) > 30
            pieces = [piece.data async for piece in second.admin.StreamSnapshot(admin_pb2.StreamSnapshotRequest())]
            snapshot = Snapshot.read(b"".join(pieces), ENDPOINT)
            assert {target.worker_id for target in snapshot.parts} == {second.target(n).worker_id for n in workers}


async def test_a_peer_that_is_not_there_or_knows_nothing_is_passed_over(tmp_path):
    async with engines("a") as workers:
        async with serving(workers, router={"snapshot_dir": tmp_path}) as stack:
            await warm_up(stack)
            held = stack.router.index.blocks(stack.target("a"))
        async with serving({}) as ignorant:
            for address in ("127.0.0.1:1", ignorant.app.admin_address):
                router = {"snapshot_dir": tmp_path, "snapshot_from": address}
                async with serving(workers, router=router) as stack:
                    await stack.synced("a")
                    assert stack.router.index.blocks(stack.target("a")) == held, "the file is read instead"


async def test_snapshots_are_written_while_it_runs_and_what_nobody_claimed_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setattr(keeper, "LOOK_S", 0.02)
    monkeypatch.setattr(keeper, "REST_S", 0.02)
    router = {"snapshot_dir": tmp_path, "snapshot_threshold": 5, "block_size": 16}

    def written():
        files = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
        return Snapshot.read(files[0].read_bytes(), ENDPOINT) if files else None

    async with engines("a", "b") as workers:
        async with serving(workers, router=router) as stack:
            await warm_up(stack, 10)
            await until(lambda: (snapshot := written()) and len(snapshot.parts) == 2, "a snapshot is written")
        alone = {"a": workers["a"]}
        async with serving(alone, router=router) as stack:
            await warm_up(stack, 12)
        assert {part.target for part in written().parts.values()} == {stack.target("a"), stack.target("b")}
        async with serving(workers, router=router) as stack:
            assert await exact(stack, range(10)) > 100
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


async def test_a_directory_that_cannot_be_written_is_no_reason_to_stop(tmp_path):
    (tmp_path / "file").write_text("in the way")
    async with running("a", router={"snapshot_dir": tmp_path / "file" / "below"}) as stack:
        assert (await stack.generate(words(1)))[-1].usage.prompt_tokens == 160


async def test_too_many_snapshots_at_a_time_are_refused():
    async with running("a") as stack:
        await warm_up(stack, 2)
        calls = [stack.admin.StreamSnapshot(admin_pb2.StreamSnapshotRequest()) for _ in range(12)]
        codes = []
        for call in calls:
            try:
                assert b"".join([piece.data async for piece in call])
            except grpc.aio.AioRpcError as error:
                codes.append(error.code())
        assert set(codes) <= {grpc.StatusCode.RESOURCE_EXHAUSTED}
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.admin.StreamSnapshot(admin_pb2.StreamSnapshotRequest(endpoint="a.b.c")).read()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


# --- as processes ---------------------------------------------------------------------------------------------------


def overlap_of(address, tokens):
    """Blocks of a prompt on the worker that holds most, by the process at `address`."""
    with grpc.insecure_channel(address) as channel:
        request = router_pb2.GetOverlapScoresRequest(token_ids=tokens)
        reply = router_pb2_grpc.KvRouterStub(channel).GetOverlapScores(request, timeout=10)
        return max((score.device_blocks, score.freshness) for score in reply.workers)


def generate(address, tokens):
    with grpc.insecure_channel(address) as channel:
        request = router_pb2.GenerateRequest(
            token_ids=tokens, stop_conditions=router_pb2.StopConditions(max_tokens=1, ignore_eos=True)
        )
        return [*router_pb2_grpc.KvRouterStub(channel).Generate(request, timeout=10)][-1].usage.cached_tokens


def settles(condition):
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_router_process_comes_back_warm_after_sigterm_and_cold_without_a_snapshot(tmp_path):
    tokens = words("first")
    with programs.mock_worker("--full-speed", "--buffer-steps", "4") as worker:
        flags = ["serve", "--endpoint", programs.ENDPOINT, "--listen", "127.0.0.1:0"]
        flags += ["--router-min-initial-workers", "1", "--worker", programs.worker_flag("w0", worker)]
        warm = [*flags, "--router-snapshot-dir", str(tmp_path)]
        with programs.program(warm) as router:
            address = router.said["address"]
            programs.wait_until_ready(address)
            for prompt in (tokens, *(words(seed) for seed in range(8))):  # the ring rolls past the first
                generate(address, prompt)
            settles(lambda: overlap_of(address, tokens) >= (10, 0.9))
        with programs.program(warm) as router:
            programs.wait_until_ready(router.said["address"])
            settles(lambda: overlap_of(router.said["address"], tokens) >= (10, 0.9))
            assert generate(router.said["address"], tokens) == 144
            router.kill()
        with programs.program([*warm, "--router-reset-states"]) as router:
            programs.wait_until_ready(router.said["address"])
            settles(lambda: overlap_of(router.said["address"], words(7)) >= (10, 0.5))
            assert overlap_of(router.said["address"], tokens)[0] == 0
