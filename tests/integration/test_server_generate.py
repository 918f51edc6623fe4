"""Generate over real sockets: client, router, mock workers."""

import asyncio
import dataclasses
import json

import aiohttp
import grpc
import pytest

from integration.server_rig import BLOCK, ENDPOINT, FAST, Worker, collect, refusal, serving, until
from kvrouter_grpc._gen import router_pb2
from kvrouter_grpc.types import Role

PROMPT = list(range(1000, 1040))
SLOW = dataclasses.replace(FAST, speedup=1.0, itl_ms=5.0)


def ask(prompt=PROMPT, max_tokens=8, **fields):
    stop = router_pb2.StopConditions(max_tokens=max_tokens, ignore_eos=True)
    return router_pb2.GenerateRequest(token_ids=prompt, stop_conditions=stop, **fields)


def tokens_of(messages, index=0):
    return [token for message in messages if message.index == index for token in message.token_ids]


async def engines_own(worker, prompt, **fields):
    body = {"model": "mock", "prompt": prompt, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{worker.url}/v1/completions", json=body | fields) as reply,
    ):
        return (await reply.json())["choices"]


async def test_a_streamed_answer_is_the_engines_own():
    async with serving(Worker()) as rig:
        messages = await collect(rig.stub.Generate(ask()))
        (own,) = await engines_own(rig.engines["w0"], PROMPT)
        assert tokens_of(messages) == own["token_ids"]
        assert "".join(message.text for message in messages) == own["text"]
        assert messages[-1].finish_reason == router_pb2.FINISH_REASON_LENGTH
        assert [message.finish_reason for message in messages[:-1]] == [0] * (len(messages) - 1)
        usage = messages[-1].usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (40, 8, 0)


async def test_the_first_message_and_no_other_carries_the_decision():
    async with serving(Worker(), Worker()) as rig:
        await rig.cache("w1", PROMPT)
        messages = await collect(rig.stub.Generate(ask(request_id="req-7")))
        assert [message.HasField("routing") for message in messages] == [True] + [False] * (len(messages) - 1)
        routing = messages[0].routing
        assert (routing.worker_id, routing.dp_rank) == rig.target("w1")
        assert routing.worker_name == "w1"
        assert routing.overlap.device_blocks == len(PROMPT) // BLOCK
        assert routing.expected_cached_tokens == 32
        assert (routing.prompt_tokens, routing.attempts, routing.request_id) == (40, 1, "req-7")


async def test_a_request_without_an_id_gets_one_of_its_own():
    async with serving(Worker()) as rig:
        ids = {(await collect(rig.stub.Generate(ask())))[0].routing.request_id for _ in range(3)}
        assert len(ids) == 3
        assert all(len(name) == 32 for name in ids)


async def test_several_answers_keep_their_indexes():
    async with serving(Worker()) as rig:
        options = router_pb2.SamplingOptions(n=3, temperature=1.0, seed=4)
        messages = await collect(rig.stub.Generate(ask(sampling_options=options)))
        own = await engines_own(rig.engines["w0"], PROMPT, n=3, temperature=1.0, seed=4)
        for choice in own:
            assert tokens_of(messages, choice["index"]) == choice["token_ids"]
        ends = [message.index for message in messages if message.finish_reason]
        assert sorted(ends) == [0, 1, 2]
        assert messages[-1].usage.completion_tokens == 24


async def test_log_probabilities_on_request():
    async with serving(Worker()) as rig:
        messages = await collect(rig.stub.Generate(ask(output_options=router_pb2.OutputOptions(logprobs=2))))
        chosen = [entry for message in messages for entry in message.log_probs]
        assert [entry.token_id for entry in chosen] == tokens_of(messages)
        assert len([step for message in messages for step in message.top_logprobs]) == 8
        last = [message for message in messages if message.log_probs][-1]
        assert last.cum_log_prob == pytest.approx(sum(entry.logprob for entry in chosen))
        plain = await collect(rig.stub.Generate(ask()))
        assert not any(message.HasField("cum_log_prob") for message in plain)


@pytest.mark.parametrize("annotation", ["query_instance_id", "query_instance_id:token_data"])
async def test_a_query_decides_and_sends_nothing(annotation):
    async with serving(Worker()) as rig:
        await rig.cache("w0", PROMPT)
        before = rig.engines["w0"].block_manager().cached_blocks
        (message,) = await collect(rig.stub.Generate(ask(range(5000, 5100), annotations=["other", annotation])))
        assert message.routing.worker_name == "w0"
        assert message.routing.attempts == 0
        assert message == router_pb2.GenerateResponse(routing=message.routing)
        assert rig.in_flight() == 0
        assert rig.engines["w0"].block_manager().cached_blocks == before


async def test_the_prefill_leg_returns_the_transfer_parameters_as_they_are():
    async with serving(Worker(dataclasses.replace(FAST, kv_transfer=True))) as rig:
        leg = ask(max_tokens=1, kv_transfer_params_json='{"do_remote_decode": true, "do_remote_prefill": false}')
        (message,) = await collect(rig.stub.Generate(leg))
        parameters = json.loads(message.kv_transfer_params_json)
        assert parameters["do_remote_prefill"] is True
        assert parameters["remote_block_ids"]


async def test_an_adapter_may_be_named_as_the_model():
    async with serving(Worker(dataclasses.replace(FAST, loras=("ad",)))) as rig:
        base = tokens_of(await collect(rig.stub.Generate(ask())))
        as_model = tokens_of(await collect(rig.stub.Generate(ask(model="ad"))))
        as_lora = tokens_of(await collect(rig.stub.Generate(ask(lora_name="ad", model="mock"))))
        assert as_model == as_lora != base
        fresh = list(range(2000, 2040))
        await rig.cache("w0", fresh)
        for model, blocks in (("mock", 2), ("ad", 0)):
            (message,) = await collect(rig.stub.Generate(ask(fresh, model=model, annotations=["query_instance_id"])))
            assert message.routing.overlap.device_blocks == blocks


async def test_pins_and_phases():
    prefill, decode = "dynamo.prefill.generate", ENDPOINT
    workers = (
        Worker(name="p0", endpoint=prefill, role=Role.PREFILL),
        Worker(name="p1", endpoint=prefill, role=Role.PREFILL),
        Worker(name="d0", endpoint=decode, role=Role.DECODE),
        Worker(name="d1", endpoint=decode, role=Role.DECODE),
    )
    async with serving(*workers, endpoints=(prefill, decode)) as rig:
        hints = router_pb2.RoutingHints(
            prefill_worker_id=rig.target("p1").worker_id, decode_worker_id=rig.target("d0").worker_id
        )
        for endpoint, name in ((prefill, "p1"), (decode, "d0")):
            for _ in range(3):
                messages = await collect(rig.stub.Generate(ask(endpoint=endpoint, routing=hints)))
                assert messages[0].routing.worker_name == name


async def test_the_same_id_twice_in_flight_is_refused():
    async with serving(Worker(SLOW)) as rig:
        call = rig.stub.Generate(ask(request_id="twin", max_tokens=500))
        await call.read()
        refused = await refusal(collect(rig.stub.Generate(ask(request_id="twin"))))
        assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_REQUEST")
        call.cancel()
        await until(lambda: rig.in_flight() == 0)
        assert await collect(rig.stub.Generate(ask(request_id="twin")))


async def test_a_cancel_frees_the_load_and_the_engine():
    async with serving(Worker(SLOW)) as rig:
        call = rig.stub.Generate(ask(max_tokens=5000))
        await call.read()
        assert rig.in_flight() == rig.running() == 1
        call.cancel()
        await until(lambda: rig.in_flight() == 0, 1.0)
        await until(lambda: rig.running() == 0, 1.0)
        assert rig.router.load(rig.target("w0")).active_requests == 0


async def test_a_cancel_before_the_first_token_does_too():
    async with serving(Worker()) as rig:
        rig.engines["w0"].pause()
        call = rig.stub.Generate(ask())
        reading = asyncio.get_running_loop().create_task(call.read())
        await until(lambda: rig.running() == 1)
        call.cancel()
        await asyncio.wait([reading])
        assert reading.cancelled()
        await until(lambda: rig.in_flight() == rig.running() == 0, 1.0)


async def test_a_deadline_frees_the_load_and_the_engine():
    async with serving(Worker(SLOW)) as rig:
        refused = await refusal(collect(rig.stub.Generate(ask(max_tokens=5000), timeout=0.3)))
        assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: rig.in_flight() == rig.running() == 0, 1.0)


async def test_a_worker_that_dies_in_mid_stream_ends_it_with_aborted():
    async with serving(Worker(SLOW), Worker(SLOW)) as rig:
        call = aiter(rig.stub.Generate(ask(max_tokens=5000)))
        name = (await anext(call)).routing.worker_name
        await rig.engines[name].kill()
        refused = await refusal(collect(call))
        assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "STREAM_INTERRUPTED")
        assert rig.in_flight() == 0


async def test_a_worker_that_dies_before_its_first_token_is_replaced():
    async with serving(Worker(), Worker()) as rig:
        for name in ("w0", "w1"):
            rig.engines[name].pause()
        call = rig.stub.Generate(ask())
        reading = asyncio.get_running_loop().create_task(collect(call))
        await until(lambda: rig.running() == 1)
        (first,) = (name for name in ("w0", "w1") if rig.router.load(rig.target(name)).active_requests)
        (second,) = {"w0", "w1"} - {first}
        rig.engines[second].resume()
        await rig.engines[first].kill()
        messages = await reading
        assert (messages[0].routing.worker_name, messages[0].routing.attempts) == (second, 2)
        assert len(tokens_of(messages)) == 8


async def test_a_request_that_kills_engines_kills_two_of_them_at_most():
    async with serving(*[Worker()] * 4) as rig:
        for engine in rig.engines.values():
            engine.pause()
        reading = asyncio.get_running_loop().create_task(collect(rig.stub.Generate(ask(request_id="poison"))))
        victims = []
        while len(victims) < 2:
            await until(lambda: rig.running() == 1)
            (name,) = (name for name in rig.engines if rig.router.load(rig.target(name)).active_requests)
            rig.engines[name].fail_engine()
            victims.append(name)
            await until(lambda: rig.running() != 1 or reading.done() or booked_elsewhere(rig, victims))
        refused = await refusal(reading)
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "UPSTREAM_UNAVAILABLE")
        assert len(set(victims)) == 2
        assert rig.in_flight() == 0


def booked_elsewhere(rig, victims):
    return any(rig.router.load(rig.target(name)).active_requests for name in rig.engines if name not in victims)


async def test_engines_that_turn_a_request_away_are_not_its_victims():
    full = dataclasses.replace(FAST, max_num_queued_reqs=0)
    async with serving(Worker(full), Worker(), Worker(full), policy={"mode": "round-robin"}) as rig:
        messages = await collect(rig.stub.Generate(ask()))
        # Each booking takes a turn among those that are left: the first, the second of two, and the one that is left.
        assert (messages[0].routing.worker_name, messages[0].routing.attempts) == ("w1", 3)


async def test_what_the_engine_refuses_is_the_callers_fault():
    async with serving(Worker()) as rig:
        refused = await refusal(collect(rig.stub.Generate(ask([40_000]))))
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "ENGINE_REJECTED")
        assert "the engine refused the request" in refused.message
        assert rig.in_flight() == 0


async def test_prompts_as_text(tmp_path):
    save_tokenizer(tmp_path)
    async with serving(Worker(), tokenizer=tmp_path, max_prompt_tokens=6) as rig:
        text = router_pb2.BestWorkerIdRequest(text="kv router kv")
        reply = await rig.stub.BestWorkerId(text)
        assert reply.prompt_tokens == 4  # with the <s> that the tokenizer puts first
        request = router_pb2.GenerateRequest(
            text="kv router kv", stop_conditions=router_pb2.StopConditions(max_tokens=8, ignore_eos=True)
        )
        messages = await collect(rig.stub.Generate(request))
        assert tokens_of(messages) == tokens_of(await collect(rig.stub.Generate(ask([1, 2, 3, 2]))))
        refused = await refusal(rig.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(text="kv " * 6)))
        assert refused.fields == {"text": "has 7 tokens, at most 6 are allowed (server.max_prompt_tokens)"}


def save_tokenizer(path):
    """A tokenizer of three words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    unknown, begin = "<unk>", "<s>"
    tokenizer = Tokenizer(models.WordLevel({unknown: 0, begin: 1, "kv": 2, "router": 3}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, bos_token=begin).save_pretrained(path)
