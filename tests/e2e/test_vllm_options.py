"""Every option of the contract has in the engine the effect that vLLM's own field has."""

import json
from typing import Any, NamedTuple

import pytest

from e2e.conftest import Prompts
from e2e.engines import Engine
from e2e.router import Reply, Router
from kvrouter_client import (
    ChoiceList,
    FinishReason,
    OutputOptions,
    SamplingOptions,
    StopConditions,
    StructuredOutput,
)

pytestmark = pytest.mark.vllm

LENGTH = 64


class Case(NamedTuple):
    """An option as the contract has it, and as vLLM has it."""

    contract: dict[str, Any]  # fields of SamplingOptions
    engine: dict[str, Any]  # fields of POST /v1/completions


SAMPLING = {
    "seed": Case({"temperature": 1.5, "seed": 7}, {"temperature": 1.5, "seed": 7}),
    "top_p": Case({"temperature": 1.5, "seed": 7, "top_p": 0.2}, {"temperature": 1.5, "seed": 7, "top_p": 0.2}),
    "top_k": Case({"temperature": 1.5, "seed": 7, "top_k": 2}, {"temperature": 1.5, "seed": 7, "top_k": 2}),
    "min_p": Case({"temperature": 2, "seed": 7, "min_p": 0.3}, {"temperature": 2, "seed": 7, "min_p": 0.3}),
    "presence_penalty": Case({"presence_penalty": 2}, {"presence_penalty": 2}),
    "frequency_penalty": Case({"frequency_penalty": 2}, {"frequency_penalty": 2}),
    "repetition_penalty": Case({"repetition_penalty": 3}, {"repetition_penalty": 3}),
    "allowed_token_ids": Case(
        {"allowed_token_ids": list(range(100, 120))}, {"allowed_token_ids": list(range(100, 120))}
    ),
    "logit_bias": Case({"logit_bias": {77: 100}}, {"logit_bias": {"77": 100}}),
}


async def ask(router: Router, tokens: list[int], **messages: Any) -> Reply:
    """Generate with options that `Router.generate` does not know."""
    reply = Reply()
    async with router.client.generate(tokens, **messages) as stream:
        await reply.rest(stream)
    return reply


async def test_sampling(fleet: list[Engine], router: Router, prompt: Prompts) -> None:
    stop = StopConditions(max_tokens=LENGTH, ignore_eos=True)
    for name, case in SAMPLING.items():
        asked = prompt(30)
        plain = await fleet[0].generate(asked, LENGTH)
        own = await fleet[0].generate(asked, LENGTH, **case.engine)
        assert own.token_ids != plain.token_ids, f"{name} must have an effect, else this shows nothing"
        options = SamplingOptions(**{"temperature": 0, **case.contract})
        reply = await ask(router, asked, stop_conditions=stop, sampling_options=options)
        assert (reply.token_ids, reply.text) == (own.token_ids, own.text), name


ADDRESS = json.dumps({"type": "object", "properties": {"port": {"enum": [1, 22]}}, "required": ["port"]})
GRAMMAR = 'root ::= "a" ("b" | "c") "d"'
STRUCTURED = {
    "choice": (StructuredOutput(choice=ChoiceList(choices=["a router", "a block"])), ["a router", "a block"]),
    "regex": (StructuredOutput(regex="[0-9]{12}"), "[0-9]{12}"),
    "grammar": (StructuredOutput(grammar=GRAMMAR), GRAMMAR),
    "json": (StructuredOutput(json_schema=ADDRESS), ADDRESS),
}


async def test_structured_output(fleet: list[Engine], router: Router, prompt: Prompts) -> None:
    for name, (constraint, engine_constraint) in STRUCTURED.items():
        asked = prompt(30)
        own = await fleet[0].generate(asked, LENGTH, ignore_eos=False, structured_outputs={name: engine_constraint})
        options = SamplingOptions(temperature=0, structured_output=constraint)
        reply = await ask(router, asked, max_tokens=LENGTH, sampling_options=options)
        assert (reply.token_ids, reply.text) == (own.token_ids, own.text), name
        # The tiny model never ends by itself: this end is the constraint's.
        assert reply.finish_reason is FinishReason.STOP, name


async def test_stop_token(fleet: list[Engine], router: Router, prompt: Prompts) -> None:
    asked = prompt(30)
    greedy = (await fleet[0].generate(asked, LENGTH)).token_ids
    stop = greedy[5]
    for options in (
        {"stop_conditions": StopConditions(max_tokens=LENGTH, stop_token_ids=[stop])},
        {"stop_conditions": StopConditions(max_tokens=LENGTH), "eos_token_ids": [stop]},
    ):
        reply = await ask(router, asked, temperature=0, **options)
        assert reply.token_ids == greedy[: greedy.index(stop) + 1]
        assert (reply.finish_reason, reply.stop_reason) == (FinishReason.STOP, stop)


async def test_stop_string(fleet: list[Engine], router: Router, prompt: Prompts) -> None:
    asked = prompt(30)
    text = (await fleet[0].generate(asked, LENGTH)).text
    stop = text[9:12]
    ends = text.index(stop)
    for included in (False, True):
        reply = await ask(
            router,
            asked,
            temperature=0,
            stop_conditions=StopConditions(max_tokens=LENGTH, stop=[stop], include_stop_str_in_output=included),
        )
        assert reply.text == text[: ends + (len(stop) if included else 0)]
        assert (reply.finish_reason, reply.stop_reason) == (FinishReason.STOP, stop)


async def test_log_probabilities(fleet: list[Engine], router: Router, prompt: Prompts) -> None:
    asked = prompt(30)
    own = (await fleet[0].ask(asked, max_tokens=6, logprobs=3, return_tokens_as_token_ids=True))["choices"][0]
    reply = await ask(router, asked, max_tokens=6, temperature=0, output_options=OutputOptions(logprobs=3))
    assert reply.token_ids == own["token_ids"]
    assert [each.token_id for each in reply.log_probs] == reply.token_ids
    assert [each.logprob for each in reply.log_probs] == pytest.approx(own["logprobs"]["token_logprobs"])
    for chosen, alternatives, expected in zip(
        reply.log_probs, reply.top_logprobs, own["logprobs"]["top_logprobs"], strict=True
    ):
        assert alternatives[0].logprob == pytest.approx(max(expected.values()))
        assert chosen.token_id in {each.token_id for each in alternatives}
        assert len(alternatives) in {3, 4}


async def test_several_answers(fleet: list[Engine], router: Router, prompt: Prompts) -> None:
    asked = prompt(30)
    own = (await fleet[0].ask(asked, max_tokens=10, n=3, temperature=1.2, seed=11))["choices"]
    answers: dict[int, list[int]] = {0: [], 1: [], 2: []}
    ended: dict[int, FinishReason] = {}
    options = SamplingOptions(n=3, temperature=1.2, seed=11)
    stop = StopConditions(max_tokens=10, ignore_eos=True)
    async with router.client.generate(asked, sampling_options=options, stop_conditions=stop) as stream:
        async for chunk in stream:
            answers[chunk.index] += chunk.token_ids
            if chunk.finish_reason is not None:
                ended[chunk.index] = chunk.finish_reason
    assert list(answers.values()) == [choice["token_ids"] for choice in own]
    assert ended == dict.fromkeys(answers, FinishReason.LENGTH)
    assert len({tuple(tokens) for tokens in answers.values()}) == 3


async def test_prompt_log_probabilities(fleet: list[Engine], router: Router, prompt: Prompts) -> None:
    asked = prompt(12)
    own = (await fleet[0].ask(asked, max_tokens=1, prompt_logprobs=1))["choices"][0]["prompt_logprobs"]
    extra: dict[str, Any] = {}
    options = OutputOptions(prompt_logprobs=1)
    async with router.client.generate(asked, max_tokens=1, temperature=0, output_options=options) as stream:
        async for chunk in stream:
            extra |= chunk.extra_args or {}
    got = extra["prompt_logprobs"]
    assert len(got) == len(own) == len(asked)
    assert got[0] is None
    for theirs, ours in zip(own[1:], got[1:], strict=True):
        assert theirs.keys() == ours.keys()
        for token_id, entry in theirs.items():
            assert ours[token_id]["logprob"] == pytest.approx(entry["logprob"])
