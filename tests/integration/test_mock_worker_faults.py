"""The mock worker when things go wrong: killed, restarted, paused, deaf, dying."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import msgspec
import pytest
import zmq

from integration.mock_client import (
    DEADLINE_S,
    FAST,
    complete,
    fast,
    http_session,
    metric,
    prompt,
    replayed,
    stream,
    zmq_socket,
)
from kvrouter_grpc.mock_worker import MockWorker, MockWorkerConfig
from kvrouter_grpc.mock_worker.kv_events import BlockRemoved

SLOW = fast(speedup=1.0, itl_ms=10.0)


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with http_session() as session:
        yield session


@pytest.fixture
async def fixture_worker() -> AsyncIterator[MockWorker]:
    """Entered and left by different tasks, as fixtures are."""
    async with MockWorker(FAST) as worker:
        yield worker


@contextmanager
def raises_connection_error() -> Iterator[None]:
    with pytest.raises(aiohttp.ClientConnectionError):
        yield


async def first_piece(http: aiohttp.ClientSession, worker: MockWorker, **body: Any) -> aiohttp.ClientResponse:
    """A stream that has begun."""
    response = await http.post(
        f"{worker.url}/v1/completions", json={"prompt": prompt(1, 40), "max_tokens": 900, "stream": True, **body}
    )
    await response.content.readany()
    return response


async def until_metric(http: aiohttp.ClientSession, worker: MockWorker, name: str, value: float) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while await metric(http, worker, name) != value:  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def test_a_fixture_may_hold_a_worker(http: aiohttp.ClientSession, fixture_worker: MockWorker) -> None:
    assert (await complete(http, fixture_worker, prompt=[300]))[0] == 200


async def test_an_error_in_its_scope_stays_itself() -> None:
    with pytest.raises(KeyError):
        async with MockWorker(FAST):
            raise KeyError


async def test_a_taken_port_is_an_os_error() -> None:
    async with MockWorker(FAST) as worker:
        port = int(worker.url.rpartition(":")[2])
        with pytest.raises(OSError, match="in use"):
            async with MockWorker(fast(port=port)):
                pass
        events_port = int(worker.events_endpoints[0].rpartition(":")[2])
        with pytest.raises(OSError, match="in use"):
            async with MockWorker(fast(events_port=events_port)):
                pass


async def test_killed_it_is_gone_and_restarted_it_is_new(http: aiohttp.ClientSession) -> None:
    async with MockWorker(SLOW) as worker:
        await complete(http, worker, prompt=prompt(2, 40), max_tokens=1)
        born = await metric(http, worker, "process_start_time_seconds ")
        places = (worker.url, worker.events_endpoints, worker.replay_endpoints)
        response = await first_piece(http, worker)
        await worker.kill()
        assert not worker.alive
        with pytest.raises(aiohttp.ClientError):
            await response.read()
        with raises_connection_error():
            await complete(http, worker, prompt=[300])
        await worker.kill()  # a second time: nothing
        await worker.restart()
        assert (worker.url, worker.events_endpoints, worker.replay_endpoints) == places
        assert worker.next_seq() == 0
        _, answer = await complete(http, worker, prompt=prompt(2, 40), max_tokens=1)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert await metric(http, worker, "process_start_time_seconds ") > born
        (frames, _) = await replayed(worker.replay_endpoints[0])
        assert int.from_bytes(frames[2], "big") == 0


async def test_a_subscriber_survives_a_restart(http: aiohttp.ClientSession) -> None:
    async with MockWorker(FAST) as worker, zmq_socket(zmq.SUB, worker.events_endpoints[0]) as sub:

        async def next_number(seed: int) -> int:
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    await complete(http, worker, prompt=prompt(seed, 17), max_tokens=1)
                    if await sub.poll(20):
                        return int.from_bytes((await sub.recv_multipart())[1], "big")
                    seed += 1

        before = await next_number(0)
        for seed in range(5000, 5003):
            await complete(http, worker, prompt=prompt(seed, 17), max_tokens=1)
        assert [(await sub.recv_multipart())[1] for _ in range(3)] == [
            (before + step).to_bytes(8, "big") for step in (1, 2, 3)
        ]
        await worker.restart()
        after = await next_number(10_000)
        assert after < worker.next_seq() <= after + 1


async def test_dropped_events_can_be_replayed(http: aiohttp.ClientSession) -> None:
    async with MockWorker(FAST) as worker, zmq_socket(zmq.SUB, worker.events_endpoints[0]) as sub:
        async with asyncio.timeout(DEADLINE_S):
            seed = 0
            while not await sub.poll(20):
                await complete(http, worker, prompt=prompt(seed, 17), max_tokens=1)
                seed += 1
        while await sub.poll(0):
            last = int.from_bytes((await sub.recv_multipart())[1], "big")
        worker.drop_events(2)
        for extra in range(3):
            await complete(http, worker, prompt=prompt(5000 + extra, 17), max_tokens=1)
        async with asyncio.timeout(DEADLINE_S):
            assert int.from_bytes((await sub.recv_multipart())[1], "big") == last + 3
        missed = await replayed(worker.replay_endpoints[0], last + 1)
        assert [int.from_bytes(frames[2], "big") for frames in missed[:-1]] == [last + 1, last + 2, last + 3]


async def test_a_large_replay_is_whole_unless_loss_is_asked_for() -> None:
    for lossy_after in (None, 1000):
        async with MockWorker(fast(replay_lossy_after=lossy_after)) as worker:
            (publisher,) = worker._running.publishers
            for _ in range(3000):
                publisher.publish([BlockRemoved(bytes(32))])
            lost = [] if lossy_after is None else list(range(1000, 3000, 16))
            expected = sorted({*range(3000)} - {*lost})
            replies = await replayed(worker.replay_endpoints[0])
            assert [int.from_bytes(frames[2], "big") for frames in replies[:-1]] == expected
            again = await replayed(worker.replay_endpoints[0], 1000)  # asked again from the hole, it is filled
            assert int.from_bytes(again[0][2], "big") == 1000


async def test_paused_it_stalls_but_is_healthy(http: aiohttp.ClientSession) -> None:
    async with MockWorker(fast(max_num_seqs=1)) as worker:
        worker.pause()
        request = asyncio.ensure_future(complete(http, worker, prompt=prompt(1, 20), max_tokens=5))
        await until_metric(http, worker, "vllm:num_requests_waiting{", 1)
        async with http.get(f"{worker.url}/health") as response:
            assert response.status == 200
        assert not request.done()
        worker.resume()
        assert (await request)[0] == 200


async def test_a_dead_engine_ends_streams_with_an_error(http: aiohttp.ClientSession) -> None:
    async with MockWorker(SLOW) as worker:
        response = await first_piece(http, worker)
        waiting = asyncio.ensure_future(complete(http, worker, prompt=prompt(2, 40), max_tokens=900))
        await until_metric(http, worker, "vllm:num_requests_running{", 2)
        worker.fail_engine()
        events = (await response.text()).split("\n\n")
        assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == 500
        assert events[-2:] == ["data: [DONE]", ""]
        assert (await waiting)[0] == 500
        async with http.get(f"{worker.url}/health") as health:
            assert health.status == 503
        assert (await complete(http, worker, prompt=[300]))[0] == 500


@pytest.mark.parametrize(("drain_s", "reason"), [(0.0, "abort"), (DEADLINE_S, "length")])
async def test_draining_ends_what_is_open_and_takes_nothing_new(
    http: aiohttp.ClientSession, drain_s: float, reason: str
) -> None:
    async with MockWorker(fast(speedup=1.0, itl_ms=2.0, drain_s=drain_s)) as worker:
        response = await first_piece(http, worker, max_tokens=40)
        await worker.drain()
        events = (await response.text()).split("\n\n")
        assert json.loads(events[-3].removeprefix("data: "))["choices"][0]["finish_reason"] == reason
        async with http_session() as newcomer:
            with raises_connection_error():
                await complete(newcomer, worker, prompt=[300])


async def test_garbage_leaves_it_standing(http: aiohttp.ClientSession) -> None:
    async with MockWorker(FAST) as worker:
        host, port = worker.url.removeprefix("http://").split(":")
        for garbage in (
            b"\x00" * 64,
            b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\n",
        ):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(garbage)
            writer.close()
            await writer.wait_closed()
        for path in ("/v1/completions", "/tokenize", "/detokenize", "/mock/kv_transfer"):
            async with http.post(worker.url + path, data=b"\xff{") as response:
                assert response.status == 400
                assert (await response.json())["error"]["code"] == 400
        for body in ({"messages": [1]}, {"prompt": 5}, {}):
            async with http.post(f"{worker.url}/tokenize", json=body) as response:
                assert response.status == 400
        async with http.post(f"{worker.url}/detokenize", json={"tokens": ["x"]}) as response:
            assert response.status == 400
        assert (await complete(http, worker, prompt=[300]))[0] == 200


COMMAND = (
    sys.executable,
    "-c",
    "from kvrouter_grpc.mock_worker.command import mock_worker_command; mock_worker_command()",
)


async def run_command(*arguments: str) -> tuple[asyncio.subprocess.Process, dict[str, Any]]:
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        return process, json.loads(await process.stdout.readline() or b"{}")


async def test_the_command_serves_until_it_is_told_to_stop(http: aiohttp.ClientSession) -> None:
    process, ready = await run_command(
        "--dp-size", "2", "--model", "m", "--block-size", "32", "--itl-ms", "2", "--lora", "ad=p", "--lora", "other"
    )
    try:
        assert ready["model"] == "m"
        assert ready["block_size"] == 32
        assert ready["pid"] == process.pid
        assert len(ready["events"]) == len(ready["replay"]) == 2
        async with http.get(f"{ready['url']}/v1/models") as response:
            assert [model["id"] for model in (await response.json())["data"]] == ["m", "ad", "other"]
        body = {"prompt": prompt(1, 40), "max_tokens": 50, "stream": True}
        async with http.post(f"{ready['url']}/v1/completions", json=body) as response:
            await response.content.readany()
            process.send_signal(signal.SIGTERM)
            assert (await response.text()).endswith("data: [DONE]\n\n")
        async with asyncio.timeout(DEADLINE_S):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_a_second_signal_ends_the_command_at_once(http: aiohttp.ClientSession) -> None:
    process, ready = await run_command("--itl-ms", "1000", "--drain-s", "600")
    try:
        body = {"prompt": prompt(1, 40), "max_tokens": 900, "stream": True}
        async with http.post(f"{ready['url']}/v1/completions", json=body) as response:
            await response.content.readany()
            process.send_signal(signal.SIGTERM)
            # The first signal has taken effect once new connections are refused.
            async with asyncio.timeout(DEADLINE_S), http_session() as newcomer:
                while True:
                    try:
                        async with newcomer.get(f"{ready['url']}/health", headers={"Connection": "close"}):
                            await asyncio.sleep(0.002)
                    except aiohttp.ClientConnectionError:
                        break
            process.send_signal(signal.SIGINT)
            async with asyncio.timeout(DEADLINE_S):
                assert await process.wait() == 128 + signal.SIGINT
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (("--block-size", "0"), 64, b"block_size must be at least 1"),
        (("--event-format", "xml"), 2, b"xml"),
        (("--host", "203.0.113.1"), 69, b"cannot listen"),
    ],
)
async def test_the_command_says_what_is_wrong(arguments: tuple[str, ...], code: int, complaint: bytes) -> None:
    process, ready = await run_command(*arguments)
    _, errors = await process.communicate()
    assert ready == {}
    assert process.returncode == code
    assert complaint in errors
    assert b"Traceback" not in errors


def test_the_event_stream_is_empty_without_events() -> None:
    async def scenario() -> None:
        async with MockWorker(MockWorkerConfig(kv_events=False, speedup=0.0)) as worker, http_session() as http:
            assert worker.events_endpoints == worker.replay_endpoints == []
            assert (await stream(http, worker, prompt=prompt(1, 40), max_tokens=2))[-1]["choices"]
            async with http.get(f"{worker.url}/kv_event_sources") as response:
                assert msgspec.json.decode(await response.read()) == {}

    asyncio.run(scenario())
