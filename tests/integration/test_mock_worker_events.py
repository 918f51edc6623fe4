"""What the mock worker publishes, over its sockets: events say what its caches hold, and a replay what was said."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
import pytest
import zmq

from integration.mock_client import (
    DEADLINE_S,
    FAST,
    Frames,
    complete,
    fast,
    http_session,
    metric,
    prompt,
    replayed,
    until,
    zmq_socket,
)
from kvrouter_grpc.mock_worker import MockWorker


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with http_session() as session:
        yield session


async def test_events_say_what_the_cache_holds(http: aiohttp.ClientSession) -> None:
    async with MockWorker(FAST) as worker, zmq_socket(zmq.SUB, worker.events_endpoints[0]) as sub:
        # The subscription takes effect some time after connect: prompt until one comes through.
        seen: list[Frames] = []
        async with asyncio.timeout(DEADLINE_S):
            for seed in range(1000):
                await complete(http, worker, prompt=prompt(seed, 33), max_tokens=1)
                if await sub.poll(20):
                    break
            while len(seen) < 3 or await sub.poll(50):
                seen.append(await sub.recv_multipart())
                await complete(http, worker, prompt=prompt(2000 + len(seen), 33), max_tokens=1) if len(
                    seen
                ) < 3 else None
        numbers = [int.from_bytes(frames[1], "big") for frames in seen]
        assert numbers == list(range(numbers[0], numbers[0] + len(seen)))
        assert numbers[-1] == worker.next_seq() - 1
        topic, _, payload = seen[-1]
        assert topic == b"kv-events"
        ts, (event,), dp_rank = msgspec.msgpack.decode(payload)
        assert ts > 1.6e9
        assert dp_rank == 0
        assert event["type"] == "BlockStored"
        assert event["token_ids"] == prompt(2002, 33)[:32]
        assert len(event["block_hashes"]) == 2
        # What was replayed are the same bytes.
        replies = await replayed(worker.replay_endpoints[0], numbers[0])
        assert replies[-1] == [b"", b"", b"\xff" * 8, b""]
        assert replies[:-1] == [[b"", *frames] for frames in seen]


async def test_after_a_storm_the_events_still_say_what_the_cache_holds(http: aiohttp.ClientSession) -> None:
    """Shared prefixes, eviction, preemption and clients that leave, all at once."""
    rng = random.Random(11)
    async with MockWorker(fast(block_size=4, num_blocks=40, max_num_seqs=8, max_num_batched_tokens=32)) as worker:

        async def one(seed: int) -> None:
            body = {"prompt": prompt(seed % 5, 8 + seed % 29), "max_tokens": 1 + seed % 40, "stream": True}
            async with http.post(f"{worker.url}/v1/completions", json=body) as response:
                if seed % 4 == 0:
                    await response.content.readany()
                    response.close()
                else:
                    assert (await response.text()).endswith("data: [DONE]\n\n")

        async with asyncio.TaskGroup() as tasks:
            for _ in range(300):
                tasks.create_task(one(rng.randrange(1_000_000)))
        blocks = worker.block_manager()
        await until(lambda: blocks.usage == 0)
        assert await metric(http, worker, "vllm:num_preemptions_total") > 0
        # One more step, so that what the last abort left unsaid is published.
        await complete(http, worker, prompt=prompt(99, 5), max_tokens=1)
        held: Counter[int] = Counter()
        removals = 0
        for frames in (await replayed(worker.replay_endpoints[0]))[:-1]:
            for event in msgspec.msgpack.decode(frames[-1])[1]:
                if event["type"] == "BlockStored":
                    held.update(event["block_hashes"])
                else:
                    held.subtract(event["block_hashes"])
                    removals += 1
        assert removals > 100
        assert min(held.values()) == 0
        assert held.total() == blocks.cached_blocks


async def test_replay_keeps_what_the_ring_holds(http: aiohttp.ClientSession) -> None:
    async with MockWorker(fast(buffer_steps=3, replay_frames=3)) as worker:
        for seed in range(5):
            await complete(http, worker, prompt=prompt(seed, 17), max_tokens=1)
        endpoint = worker.replay_endpoints[0]
        replies = await replayed(endpoint)
        assert [int.from_bytes(frames[1], "big") for frames in replies[:-1]] == [2, 3, 4]
        assert {len(frames) for frames in replies} == {3}
        assert replies[-1] == [b"", b"\xff" * 8, b""]
        assert len(await replayed(endpoint, 1_000_000)) == 1
        async with zmq_socket(zmq.DEALER, endpoint) as dealer:  # nonsense is passed over
            for frames in ([b""], [b"", b"short"], [b"", bytes(8), b"more"]):
                await dealer.send_multipart(frames)
        assert len(await replayed(endpoint, 4)) == 2


@pytest.mark.parametrize(("event_format", "hash_format"), [("map", "bytes"), ("array", "int"), ("batch-map", "int")])
async def test_dialects(http: aiohttp.ClientSession, event_format: Any, hash_format: Any) -> None:
    async with MockWorker(fast(event_format=event_format, hash_format=hash_format)) as worker:
        await complete(http, worker, prompt=prompt(1, 17), max_tokens=1)
        batch = msgspec.msgpack.decode((await replayed(worker.replay_endpoints[0]))[0][-1])
        (event,) = batch["events"] if event_format == "batch-map" else batch[1]
        if event_format == "array":
            assert event[0] == "BlockStored"
            assert len(event) == 12
            (digest,) = event[1]
        else:
            assert event["type"] == "BlockStored"
            (digest,) = event["block_hashes"]
        assert isinstance(digest, bytes if hash_format == "bytes" else int)


async def test_a_reset_is_told_with_the_next_step(http: aiohttp.ClientSession) -> None:
    async with MockWorker(FAST) as worker:
        await complete(http, worker, prompt=prompt(1, 17), max_tokens=1)
        async with http.post(f"{worker.url}/reset_prefix_cache") as response:
            assert await response.json() == {"success": True}
        assert worker.next_seq() == 1
        _, answer = await complete(http, worker, prompt=prompt(1, 17), max_tokens=1)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        batch = msgspec.msgpack.decode((await replayed(worker.replay_endpoints[0], 1))[0][-1])
        assert [event["type"] for event in batch[1]] == ["AllBlocksCleared", "BlockStored"]


async def test_ranks_have_their_own_caches(http: aiohttp.ClientSession) -> None:
    async with MockWorker(fast(dp_size=2)) as worker:
        cached = []
        for rank in ("0", "1", "1", "0"):
            headers = {"X-data-parallel-rank": rank}
            _, answer = await complete(http, worker, headers, prompt=prompt(1, 17), max_tokens=1)
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert cached == [0, 0, 16, 16]
        batch = msgspec.msgpack.decode((await replayed(worker.replay_endpoints[1]))[0][-1])
        assert batch[2] == 1
        status, error = await complete(http, worker, {"X-data-parallel-rank": "2"}, prompt=[300])
        assert (status, error["error"]["message"]) == (400, "data_parallel_rank 2 is out of range [0, 2).")
        status, _ = await complete(http, worker, {"X-data-parallel-rank": "x"}, prompt=[300], max_tokens=1)
        assert status == 200
        for seed in range(2, 6):  # without the header the ranks take turns
            await complete(http, worker, prompt=prompt(seed, 17), max_tokens=1)
        assert (worker.next_seq(0), worker.next_seq(1)) == (3, 3)


async def test_adapters_and_salts_share_nothing(http: aiohttp.ClientSession) -> None:
    async with MockWorker(fast(loras=("ad",))) as worker:
        outcomes = []
        for body in ({}, {"model": "ad"}, {"cache_salt": "s"}, {"model": "ad"}, {"cache_salt": "s"}):
            _, answer = await complete(http, worker, prompt=prompt(1, 17), max_tokens=3, return_token_ids=True, **body)
            outcomes.append(
                (answer["usage"]["prompt_tokens_details"]["cached_tokens"], answer["choices"][0]["token_ids"])
            )
        assert [cached for cached, _ in outcomes] == [0, 0, 0, 16, 16]
        assert outcomes[0][1] != outcomes[1][1] == outcomes[3][1]
        assert outcomes[0][1] == outcomes[2][1]
