"""The mock worker over its sockets: HTTP, server-sent events, what it says of itself, transfers."""

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest

from integration.mock_client import (
    DEADLINE_S,
    FAST,
    complete,
    fast,
    http_session,
    metric,
    prompt,
    stream,
    until,
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
