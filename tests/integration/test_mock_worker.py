"""The mock worker over its sockets: HTTP, server-sent events, KV events, replay."""

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
    stream,
    until,
    zmq_socket,
)
from kvrouter_grpc.mock_worker import MockWorker


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with http_session() as session:
        yield session


async def test_an_answer_has_vllms_form(http: aiohttp.ClientSession) -> None:
    async with MockWorker(FAST) as worker:
        status, answer = await complete(
            http,
            worker,
            {"X-Request-Id": "rid-123"},
            model="mock",
            prompt=[310, 311, 312],
            max_tokens=4,
            temperature=0,
            return_token_ids=True,
        )
        assert status == 200
        created, fingerprint = answer.pop("created"), answer.pop("system_fingerprint")
        tokens = answer["choices"][0]["token_ids"]
        assert isinstance(created, int)
        assert fingerprint.startswith("vllm-")
        assert len(tokens) == 4
        assert answer == {
            "id": "cmpl-rid-123",
            "object": "text_completion",
            "model": "mock",
            "choices": [
                {
                    "index": 0,
                    "text": "".join(f" w{token}" for token in tokens),
                    "logprobs": None,
                    "finish_reason": "length",
                    "stop_reason": None,
                    "token_ids": tokens,
                    "prompt_logprobs": None,
                    "prompt_token_ids": [310, 311, 312],
                    "routed_experts": None,
                }
            ],
            "service_tier": None,
            "usage": {
                "prompt_tokens": 3,
                "total_tokens": 7,
                "completion_tokens": 4,
                "prompt_tokens_details": {
                    "cached_tokens": 0,
                    "created_cache_tokens": None,
                    "multimodal_tokens": None,
                },
                "completion_tokens_details": None,
            },
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }


async def test_a_stream_says_the_same_in_chunks(http: aiohttp.ClientSession) -> None:
    async with MockWorker(FAST) as worker:
        _, whole = await complete(http, worker, prompt=prompt(1, 40), max_tokens=30, return_token_ids=True)
        chunks = await stream(
            http,
            worker,
            prompt=prompt(1, 40),
            max_tokens=30,
            return_token_ids=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )
        *parts, last = chunks
        choices = [part["choices"][0] for part in parts]
        assert [token for choice in choices for token in choice["token_ids"]] == whole["choices"][0]["token_ids"]
        assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
        assert [choice["prompt_token_ids"] for choice in choices] == [prompt(1, 40), *[None] * (len(choices) - 1)]
        assert [choice["finish_reason"] for choice in choices] == [*[None] * (len(choices) - 1), "length"]
        counts = [part["usage"]["completion_tokens"] for part in parts]
        assert counts == sorted(counts)
        assert counts[-1] == 30
        assert last["choices"] == []
        assert last["usage"] == {
            "prompt_tokens": 40,
            "total_tokens": 70,
            "completion_tokens": 30,
            "prompt_tokens_details": {"cached_tokens": 32},
        }
        bare = await stream(http, worker, prompt=prompt(1, 40), max_tokens=3)
        assert all("usage" not in part for part in bare)
        assert all(part["choices"][0]["token_ids"] is None for part in bare)


async def test_choices_and_prompts_have_their_own_index(http: aiohttp.ClientSession) -> None:
    async with MockWorker(FAST) as worker:
        body = {"prompt": [prompt(1, 20), prompt(2, 20)], "n": 2, "max_tokens": 5, "return_token_ids": True}
        _, whole = await complete(http, worker, **body)
        by_index = {choice["index"]: choice["token_ids"] for choice in whole["choices"]}
        assert list(by_index) == [0, 1, 2, 3]
        assert len({tuple(tokens) for tokens in by_index.values()}) == 4
        assert whole["usage"]["prompt_tokens"] == 40
        assert whole["usage"]["completion_tokens"] == 20
        streamed: dict[int, list[int]] = {index: [] for index in range(4)}
        for part in await stream(http, worker, **body):
            streamed[part["choices"][0]["index"]] += part["choices"][0]["token_ids"]
        assert streamed == by_index


async def test_logprobs_have_vllms_form(http: aiohttp.ClientSession) -> None:
    async with MockWorker(FAST) as worker:
        _, answer = await complete(
            http,
            worker,
            prompt=[300],
            max_tokens=2,
            logprobs=2,
            return_token_ids=True,
            return_tokens_as_token_ids=True,
        )
        choice = answer["choices"][0]
        names = [f"token_id:{token}" for token in choice["token_ids"]]
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == names
        assert logprobs["text_offset"] == [0, len(names[0])]
        for name, chosen, top in zip(names, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
            assert top[name] == chosen < 0
            assert chosen == max(top.values())
            assert len(top) == 2


async def test_text_prompts_are_tokenized(http: aiohttp.ClientSession) -> None:
    async with MockWorker(FAST) as worker:
        async with http.post(f"{worker.url}/tokenize", json={"prompt": "hello", "return_token_strs": True}) as response:
            tokenized = await response.json()
        assert tokenized["count"] == 5
        assert tokenized["token_strs"] == list("hello")
        assert tokenized["max_model_len"] == FAST.context_tokens
        _, by_text = await complete(http, worker, prompt="hello", return_token_ids=True)
        _, by_ids = await complete(http, worker, prompt=tokenized["tokens"], return_token_ids=True)
        assert by_text["choices"] == by_ids["choices"]
        async with http.post(f"{worker.url}/detokenize", json={"tokens": tokenized["tokens"]}) as response:
            assert await response.json() == {"prompt": "hello"}


async def test_what_a_worker_says_of_itself(http: aiohttp.ClientSession) -> None:
    async with MockWorker(fast(loras=("ad=some/path",), dp_size=2)) as worker:
        for path in ("/health", "/ping"):
            async with http.get(worker.url + path) as response:
                assert (response.status, await response.read()) == (200, b"")
        async with http.get(f"{worker.url}/version") as response:
            assert await response.json() == {"version": "0.32.0"}
        async with http.get(f"{worker.url}/v1/models") as response:
            base, adapter = (await response.json())["data"]
        assert (base["id"], base["parent"], base["max_model_len"]) == ("mock", None, 63 * 16)
        assert (adapter["id"], adapter["parent"], adapter["root"]) == ("ad", "mock", "some/path")
        async with http.get(f"{worker.url}/kv_event_sources") as response:
            sources = await response.json()
        assert [sources[rank]["endpoint"] for rank in ("0", "1")] == worker.events_endpoints
        assert [sources[rank]["replay_endpoint"] for rank in ("0", "1")] == worker.replay_endpoints
        assert sources["0"]["topic"] == "kv-events"
        first, second = (int(endpoint.rpartition(":")[2]) for endpoint in worker.events_endpoints)
        assert second == first + 1
        async with http.get(f"{worker.url}/server_info", params={"config_format": "json"}) as response:
            info = (await response.json())["vllm_config"]
        assert info["cache_config"] == {"block_size": 16, "num_gpu_blocks": 64}
        assert info["model_config"]["max_model_len"] == 63 * 16
        async with http.get(f"{worker.url}/nowhere") as response:
            assert response.status == 404
    async with MockWorker(fast(kv_event_sources=False)) as older, http.get(f"{older.url}/kv_event_sources") as response:
        assert response.status == 404


async def test_metrics_count_what_happened(http: aiohttp.ClientSession) -> None:
    async with MockWorker(FAST) as worker:
        for _ in range(2):
            await complete(http, worker, prompt=prompt(1, 40), max_tokens=5)
        expected = {
            "vllm:num_requests_running{": 0,
            "vllm:num_requests_waiting{": 0,
            "vllm:kv_cache_usage_perc{": 0,
            "vllm:prefix_cache_queries_total{": 80,
            "vllm:prefix_cache_hits_total{": 32,
            "vllm:prompt_tokens_total{": 80,
            "vllm:generation_tokens_total{": 10,
            'vllm:request_success_total{engine="0",model_name="mock",finished_reason="length"}': 2,
            "vllm:time_to_first_token_seconds_count{": 2,
            'vllm:time_to_first_token_seconds_bucket{engine="0",model_name="mock",le="+Inf"}': 2,
            'vllm:cache_config_info{block_size="16"': 1,
        }
        assert {name: await metric(http, worker, name) for name in expected} == expected
        assert await metric(http, worker, "process_start_time_seconds ") > 1.6e9
        async with http.get(f"{worker.url}/metrics") as response:
            assert 'num_gpu_blocks="64"' in await response.text()


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


async def test_errors_come_in_vllms_form(http: aiohttp.ClientSession) -> None:
    async with MockWorker(fast(max_num_queued_reqs=1)) as worker:
        bad = {"prompt": [99_999], "max_tokens": 4}
        error = {
            "message": "Token id 99999 is out of vocabulary",
            "type": "BadRequestError",
            "param": None,
            "code": 400,
        }
        assert await complete(http, worker, **bad) == (400, {"error": error})
        assert await stream(http, worker, **bad) == [{"error": error}]
        status, answer = await complete(http, worker, prompt=[300], model="nope", stream=True)
        assert (status, answer["error"]["type"]) == (404, "NotFoundError")
        status, answer = await complete(http, worker, prompt=[300], n=2)
        assert (status, answer["error"]["code"]) == (503, 503)
        assert await metric(http, worker, "vllm:admission_rejections_total") == 1


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_client_that_leaves_aborts_its_request(http: aiohttp.ClientSession, streaming: bool) -> None:
    async with MockWorker(fast(speedup=1.0, itl_ms=20.0)) as worker:
        blocks = worker.block_manager()
        request = asyncio.ensure_future(
            http.post(
                f"{worker.url}/v1/completions", json={"prompt": prompt(1, 40), "max_tokens": 900, "stream": streaming}
            )
        )
        await until(lambda: blocks.usage > 0)
        if streaming:
            response = await request
            await response.content.readany()
            response.close()
        else:
            request.cancel()
        await until(lambda: blocks.usage == 0)
        assert await metric(http, worker, "vllm:num_requests_running{") == 0
        assert (
            await metric(
                http, worker, 'vllm:request_success_total{engine="0",model_name="mock",finished_reason="abort"'
            )
            == 0
        )
        if not streaming:
            with pytest.raises(asyncio.CancelledError):
                await request
        # Its full blocks are still good.
        _, answer = await complete(http, worker, prompt=prompt(1, 40), max_tokens=1)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 32


async def test_time_passes_as_configured(http: aiohttp.ClientSession) -> None:
    """40 steps of 5 ms after a prefill of 50 ms: never faster; how much slower depends on the machine."""
    loop = asyncio.get_running_loop()
    async with MockWorker(fast(speedup=2.0, itl_ms=10.0, prefill_tokens_per_s=1000.0)) as worker:
        started = loop.time()
        body = {"prompt": prompt(1, 100), "max_tokens": 41, "stream": True}
        async with http.post(f"{worker.url}/v1/completions", json=body) as response:
            await response.content.readany()
            first = loop.time() - started
            await response.read()
        total = loop.time() - started
    assert first > 0.045
    assert total > 0.24
    assert total < DEADLINE_S


async def test_prefill_here_decode_there(http: aiohttp.ClientSession) -> None:
    config = fast(kv_transfer=True)
    async with MockWorker(config) as prefill, MockWorker(config) as decode:
        ask = {"prompt": prompt(1, 40), "return_token_ids": True}
        headers = {"X-Request-Id": "pd-1"}
        remote_decode = {"do_remote_decode": True, "do_remote_prefill": False}
        _, leg = await complete(http, prefill, headers, **ask, max_tokens=1, kv_transfer_params=remote_decode)
        params = leg["kv_transfer_params"]
        assert params["do_remote_prefill"] is True
        assert params["remote_num_tokens"] == 40
        assert len(params["remote_block_ids"][0]) == 3
        assert prefill.block_manager().usage > 0  # kept until fetched
        _, answer = await complete(http, decode, headers, **ask, max_tokens=8, kv_transfer_params=params)
        assert prefill.block_manager().usage == 0
        _, local = await complete(http, decode, **ask, max_tokens=8)
        assert answer["choices"][0]["token_ids"] == local["choices"][0]["token_ids"]
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        source = 'vllm:prompt_tokens_by_source_total{engine="0",model_name="mock",source="external_kv_transfer"'
        assert await metric(http, decode, source) == 39
        # A second fetch finds nothing: an error, and both live on.
        status, error = await complete(http, decode, **ask, max_tokens=8, kv_transfer_params=params)
        assert (status, error["error"]["code"]) == (500, 500)
        (failed,) = await stream(http, decode, **ask, max_tokens=8, kv_transfer_params=params)
        assert failed["error"]["code"] == 500
        # Streamed, the prefill leg keeps its blocks but does not say where.
        chunks = await stream(http, prefill, **ask, max_tokens=1, kv_transfer_params=remote_decode)
        assert all("kv_transfer_params" not in chunk for chunk in chunks)
        await until(lambda: prefill.block_manager().usage > 0)


async def test_prefilled_blocks_expire_and_plain_workers_ignore_the_parameters(http: aiohttp.ClientSession) -> None:
    async with MockWorker(fast(kv_transfer=True, kv_transfer_timeout_s=0.05)) as prefill, MockWorker(FAST) as plain:
        body = {"prompt": prompt(1, 40), "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
        _, leg = await complete(http, prefill, **body)
        assert leg["kv_transfer_params"] is not None
        await until(lambda: prefill.block_manager().usage == 0)
        _, answer = await complete(http, plain, **body)
        assert answer["kv_transfer_params"] is None
        assert plain.block_manager().usage == 0
