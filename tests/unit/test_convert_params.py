"""How an answer is generated, opaque JSON and bounds, and everything that is wrong with them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrouter_grpc._gen import router_pb2
from kvrouter_grpc.errors import InvalidRequestError
from kvrouter_grpc.server import opaque_json, params
from kvrouter_grpc.server.opaque_json import read_object
from kvrouter_grpc.server.params import OUTPUT, SAMPLING, STOP, read_params
from kvrouter_grpc.server.violations import Bounds, Violations

NAN, INF = float("nan"), float("inf")


def found(violations: Violations) -> dict[str, str]:
    try:
        violations.raise_if_any()
    except InvalidRequestError as error:
        return dict(error.violations)
    return {}


def params_of(**fields):
    violations = Violations()
    read = read_params(router_pb2.GenerateRequest(**fields), violations)
    return read, found(violations)


def test_nothing_given_leaves_every_default_to_the_engine():
    assert params_of() == ({}, {})


@pytest.mark.parametrize(
    ("message", "table"),
    [
        (router_pb2.StopConditions, STOP),
        (router_pb2.SamplingOptions, SAMPLING),
        (router_pb2.OutputOptions, OUTPUT),
    ],
)
def test_every_field_of_the_contract_has_a_row(message, table):
    assert set(message.DESCRIPTOR.fields_by_name) == set(table)


def test_parameters_have_the_engines_names():
    read, wrong = params_of(
        stop_conditions=router_pb2.StopConditions(
            max_tokens=10,
            min_tokens=0,
            stop=["a"],
            stop_token_ids=[5],
            ignore_eos=False,
            include_stop_str_in_output=True,
        ),
        sampling_options=router_pb2.SamplingOptions(
            n=2,
            temperature=0,
            top_p=1,
            top_k=-1,
            min_p=0.1,
            presence_penalty=-2,
            frequency_penalty=2,
            repetition_penalty=1.1,
            seed=-5,
            use_beam_search=False,
            length_penalty=-1,
            logit_bias={3: -100},
            allowed_token_ids=[1, 2],
            bad_words=["no"],
        ),
        output_options=router_pb2.OutputOptions(
            logprobs=0, prompt_logprobs=2, skip_special_tokens=False, spaces_between_special_tokens=False
        ),
        extra_args_json='{"thinking_token_budget": 7}',
    )
    assert not wrong
    assert read == {
        "max_tokens": 10,
        "min_tokens": 0,
        "stop": ["a"],
        "stop_token_ids": [5],
        "ignore_eos": False,
        "include_stop_str_in_output": True,
        "n": 2,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.1,
        "presence_penalty": -2.0,
        "frequency_penalty": 2.0,
        "repetition_penalty": 1.1,
        "seed": -5,
        "use_beam_search": False,
        "length_penalty": -1.0,
        "logit_bias": {"3": -100.0},
        "allowed_token_ids": [1, 2],
        "bad_words": ["no"],
        "logprobs": 0,
        "return_tokens_as_token_ids": True,
        "prompt_logprobs": 2,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "thinking_token_budget": 7,
    }
    json.dumps(read)  # nothing but JSON


@pytest.mark.parametrize(
    ("constraint", "engine"),
    [
        ({"json_schema": "{}"}, {"json": "{}"}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"grammar": "root ::= x"}, {"grammar": "root ::= x"}),
        ({"choice": router_pb2.ChoiceList(choices=["a", "b"])}, {"choice": ["a", "b"]}),
        ({"json_object": True}, {"json_object": True}),
        ({"structural_tag": "{}"}, {"structural_tag": "{}"}),
    ],
)
def test_structured_output(constraint, engine):
    message = router_pb2.StructuredOutput(**constraint)
    read, wrong = params_of(sampling_options=router_pb2.SamplingOptions(structured_output=message))
    assert not wrong
    assert read == {"structured_outputs": engine}


@pytest.mark.parametrize(("ignore_eos", "stop_token_ids"), [(None, [5, 2, 3]), (False, [5, 2, 3]), (True, [5, 2])])
def test_end_tokens_stop_unless_they_are_ignored(ignore_eos, stop_token_ids):
    stop = router_pb2.StopConditions(stop_token_ids=[5, 2], ignore_eos=ignore_eos)
    read, wrong = params_of(stop_conditions=stop, eos_token_ids=[2, 3])
    assert not wrong
    assert read["stop_token_ids"] == stop_token_ids


def sampling(**fields):
    return {"sampling_options": router_pb2.SamplingOptions(**fields)}


def stopping(**fields):
    return {"stop_conditions": router_pb2.StopConditions(**fields)}


def constrained(**fields):
    return sampling(structured_output=router_pb2.StructuredOutput(**fields))


@pytest.mark.parametrize(
    ("fields", "field", "text"),
    [
        (stopping(max_tokens=0), "stop_conditions.max_tokens", "must be at least 1, got 0"),
        (stopping(min_tokens=5, max_tokens=4), "stop_conditions.min_tokens", "at most max_tokens (4), got 5"),
        (stopping(stop=["a", ""]), "stop_conditions.stop[1]", "is empty"),
        (stopping(stop=["a" * 4097]), "stop_conditions.stop[0]", "at most 4096"),
        (stopping(stop=["a"] * 1025), "stop_conditions.stop", "has 1025 entries"),
        (stopping(stop_token_ids=[2**31]), "stop_conditions.stop_token_ids", "got 2147483648"),
        ({"eos_token_ids": [2**32 - 1]}, "eos_token_ids", "got 4294967295"),
        (sampling(n=0), "sampling_options.n", "must be in [1, 128], got 0"),
        (sampling(n=129), "sampling_options.n", "got 129"),
        (sampling(temperature=-0.5), "sampling_options.temperature", "must be at least 0, got -0.5"),
        (sampling(temperature=NAN), "sampling_options.temperature", "got nan"),
        (sampling(temperature=INF), "sampling_options.temperature", "got inf"),
        (sampling(top_p=3), "sampling_options.top_p", "must be in (0, 1], got 3"),
        (sampling(top_p=0), "sampling_options.top_p", "must be in (0, 1], got 0"),
        (sampling(top_k=-2), "sampling_options.top_k", "must be at least -1, got -2"),
        (sampling(min_p=1.1), "sampling_options.min_p", "must be in [0, 1]"),
        (sampling(presence_penalty=2.1), "sampling_options.presence_penalty", "must be in [-2, 2]"),
        (sampling(frequency_penalty=-2.1), "sampling_options.frequency_penalty", "must be in [-2, 2]"),
        (sampling(repetition_penalty=0), "sampling_options.repetition_penalty", "must be above 0"),
        (sampling(length_penalty=NAN), "sampling_options.length_penalty", "must be finite, got nan"),
        (sampling(logit_bias={4: 101}), "sampling_options.logit_bias[4]", "must be in [-100, 100]"),
        (sampling(logit_bias={2**31: 1}), "sampling_options.logit_bias", "got 2147483648"),
        (sampling(allowed_token_ids=[2**31]), "sampling_options.allowed_token_ids", "got 2147483648"),
        (sampling(bad_words=[""]), "sampling_options.bad_words[0]", "is empty"),
        (constrained(), "sampling_options.structured_output", "without a constraint"),
        (constrained(json_schema="{"), "sampling_options.structured_output.json_schema", "not valid JSON"),
        (constrained(structural_tag="x"), "sampling_options.structured_output.structural_tag", "not valid JSON"),
        (constrained(regex=""), "sampling_options.structured_output.regex", "is empty"),
        (constrained(json_object=False), "sampling_options.structured_output.json_object", "must be true"),
        (
            constrained(choice=router_pb2.ChoiceList()),
            "sampling_options.structured_output.choice",
            "has no choices",
        ),
        ({"annotations": ["a"] * 65}, "annotations", "has 65 entries"),
        ({"extra_args_json": "{"}, "extra_args_json", "is not valid JSON"),
        ({"extra_args_json": "[1]"}, "extra_args_json", "must be a JSON object, got an array"),
        ({"extra_args_json": '{"top_p": 1}'}, "extra_args_json.top_p", "set sampling_options.top_p instead"),
        ({"extra_args_json": '{"n": 1}'}, "extra_args_json.n", "set sampling_options.n instead"),
        ({"extra_args_json": '{"stream": false}'}, "extra_args_json.stream", "the router sets it"),
        ({"extra_args_json": '{"prompt": "x"}'}, "extra_args_json.prompt", "set token_ids or text instead"),
        ({"extra_args_json": '{"model": "x"}'}, "extra_args_json.model", "set model or lora_name"),
        (
            {"extra_args_json": '{"structured_outputs": {}}'},
            "extra_args_json.structured_outputs",
            "set sampling_options.structured_output instead",
        ),
        (
            {"extra_args_json": '{"vllm_xargs": {"kv_cache_report_mode": "full"}}'},
            "extra_args_json.vllm_xargs.kv_cache_report_mode",
            "falsify",
        ),
    ],
)
def test_bad_parameters(fields, field, text):
    _, wrong = params_of(**fields)
    assert text in wrong[field]
    assert len(wrong) == 1


def test_everything_wrong_is_said_at_once():
    fields = sampling(top_p=3, n=0) | stopping(max_tokens=0) | {"extra_args_json": '{"seed": 1, "model": ""}'}
    assert list(params_of(**fields)[1]) == [
        "stop_conditions.max_tokens",
        "sampling_options.n",
        "sampling_options.top_p",
        "extra_args_json.model",
        "extra_args_json.seed",
    ]


def test_a_huge_list_is_counted_and_not_copied(monkeypatch):
    monkeypatch.setattr(params, "MAX_TOKEN_IDS", 3)
    read, wrong = params_of(
        **stopping(stop_token_ids=[1, 2, 3, 4]), **sampling(logit_bias=dict.fromkeys(range(4), 1.0))
    )
    assert set(wrong) == {"stop_conditions.stop_token_ids", "sampling_options.logit_bias"}
    assert read == {"stop_token_ids": None, "logit_bias": None}


# --- opaque JSON and bounds -------------------------------------------------------------------------------------


def json_of(text):
    violations = Violations()
    return read_object("f", text, violations), found(violations).get("f")


def test_an_object_passes_as_it_is():
    text = '{"remote_block_ids": [[1, 2]], "x": null, "y": 1.5, "z": {"ä": true}}'
    assert json_of(text) == (json.loads(text), None)
    assert json_of("") == (None, None)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("null", "must be a JSON object, got null"),
        ("3", "got a number"),
        ("1.5", "got a number"),
        ('"x"', "got a string"),
        ("true", "got a boolean"),
        ("{'a': 1}", "is not valid JSON"),
        ('{"a": NaN}', "is not valid JSON"),
        ('{"a": 1} x', "is not valid JSON"),
        ('{"a": 1e999}', "is not valid JSON"),
        ('{"a":' * 32 + "1" + "}" * 32, None),
        ('{"a":' * 33 + "1" + "}" * 33, "nested too deep, at most 32"),
        ('{"a":' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deep"),
        ('{"a":' + "[" * 200_000, "nested too deep"),
        ('{"a": "' + "x" * opaque_json.MAX_BYTES + '"}', "at most 1048576"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_json(text, wrong):
    value, said = json_of(text)
    if wrong is None:
        assert value is not None
        assert said is None
    else:
        assert value is None
        assert wrong in said


@given(st.text(max_size=200))
def test_any_text_is_an_object_or_a_violation(text):
    value, said = json_of(text)
    assert (value is None) == (said is not None or not text)


@pytest.mark.parametrize(
    ("bounds", "said", "inside", "outside"),
    [
        (Bounds(), "be finite", [0, -1e300], [NAN, INF]),
        (Bounds(high=2), "be at most 2", [2, -5], [2.1, -INF]),
        (Bounds(1), "be at least 1", [1, 2**40], [0.9, INF]),
        (Bounds(0, low_open=True), "be above 0", [1e-9], [0, -1, NAN]),
        (Bounds(0, 1), "be in [0, 1]", [0, 1], [-1e-9, 1.0000001]),
        (Bounds(0, 1, low_open=True), "be in (0, 1]", [0.5, 1], [0]),
    ],
)
def test_bounds(bounds, said, inside, outside):
    assert str(bounds) == said
    assert all(bounds.hold(value) for value in inside)
    assert not any(bounds.hold(value) for value in outside)
