"""Requests into the router's own types, and everything that is wrong with them."""

import json
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrouter_grpc._gen import common_pb2, router_pb2
from kvrouter_grpc.config import ServerConfig
from kvrouter_grpc.errors import InvalidRequestError
from kvrouter_grpc.server import opaque_json, params
from kvrouter_grpc.server.hints import read_hints
from kvrouter_grpc.server.opaque_json import read_object
from kvrouter_grpc.server.params import OUTPUT, SAMPLING, STOP, read_params
from kvrouter_grpc.server.prompt import _first_field, _token_array, read_prompt
from kvrouter_grpc.server.violations import Bounds, Violations
from kvrouter_grpc.types import Role, RouterOverride, RoutingHints

CONFIG = ServerConfig(max_prompt_tokens=8, vocab_size=100)
NAN, INF = float("nan"), float("inf")


def found(violations: Violations) -> dict[str, str]:
    try:
        violations.raise_if_any()
    except InvalidRequestError as error:
        return dict(error.violations)
    return {}


def prompt_of(config=CONFIG, block_size=2, tokenizer=False, adapter="", **fields):
    violations = Violations()
    request = router_pb2.GenerateRequest(**fields)
    prompt = read_prompt(request, adapter, block_size, config, violations, tokenizer=tokenizer)
    return prompt, found(violations)


def hints_of(role=Role.BOTH, override=None, **routing):
    violations = Violations()
    request = router_pb2.GenerateRequest(routing=router_pb2.RoutingHints(**routing), router_config_override=override)
    return read_hints(request, role, violations), found(violations)


def params_of(**fields):
    violations = Violations()
    read = read_params(router_pb2.GenerateRequest(**fields), violations)
    return read, found(violations)


# --- prompt ----------------------------------------------------------------------------------------------------


def test_a_prompt_carries_what_is_folded_into_its_hashes():
    blocks = [common_pb2.BlockMultimodalHashes(block_index=1, mm_hashes=[2**64 - 1, 3])]
    prompt, wrong = prompt_of(token_ids=[1, 2, 3, 4], cache_salt="s", block_mm_hashes=blocks, adapter="ad")
    assert not wrong
    assert prompt.tokens == array("I", [1, 2, 3, 4])
    assert (prompt.lora_name, prompt.cache_salt) == ("ad", "s")
    assert prompt.mm_hashes == {1: (2**64 - 1, 3)}


@pytest.mark.parametrize(
    ("fields", "field", "text"),
    [
        ({}, "token_ids", "is empty"),
        ({"token_ids": [1] * 9}, "token_ids", "has 9 tokens, at most 8"),
        ({"token_ids": [5, 100]}, "token_ids[1]", "below the vocabulary size 100, got 100"),
        ({"token_ids": [5, 7, 2**31]}, "token_ids[2]", "below 2^31, got 2147483648"),
        ({"token_ids": [2**32 - 1]}, "token_ids[0]", "below 2^31"),
        ({"token_ids": [1], "text": "x"}, "text", "beside token_ids"),
        ({"text": "x"}, "text", "no tokenizer"),
        ({"token_ids": [1], "cache_salt": "x" * 1025}, "cache_salt", "at most 1024"),
        ({"token_ids": [1], "lora_name": "x" * 257}, "lora_name", "at most 256"),
    ],
)
def test_bad_prompts(fields, field, text):
    _, wrong = prompt_of(**fields)
    assert text in wrong[field]
    assert len(wrong) == 1


@pytest.mark.parametrize("vocab_size", [None, 2**31])
def test_the_largest_token_id_an_engine_can_keep_is_fine(vocab_size):
    config = ServerConfig(vocab_size=vocab_size)
    assert not prompt_of(config, token_ids=[2**31 - 1, 0])[1]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_token_ids_of_31_bits_and_no_others_pass(tokens):
    _, wrong = prompt_of(ServerConfig(), token_ids=tokens)
    first = next((position for position, token in enumerate(tokens) if token >= 2**31), None)
    assert set(wrong) == (set() if first is None else {f"token_ids[{first}]"})


@pytest.mark.parametrize(
    "kind", [router_pb2.GenerateRequest, router_pb2.BestWorkerIdRequest, router_pb2.GetOverlapScoresRequest]
)
@given(
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200),
    st.text(max_size=20),
    st.binary(max_size=5),
)
def test_token_ids_are_copied_as_they_are_on_the_wire(kind, tokens, text, tail):
    request = kind(token_ids=tokens, lora_name=text, cache_salt=text)
    request.MergeFromString(bytes([0xFA, 0x06, len(tail)]) + tail)  # a field of a newer contract
    assert _token_array(request) == array("I", tokens)
    assert _first_field(request.SerializeToString(), 4 * len(tokens)) is not None


@pytest.mark.parametrize("message", [b"", b"\x12\x01a", b"\x0a\x04\0\0\0\0", b"\x0d\0\0\0\0"])
def test_only_a_packed_first_field_of_the_right_size_is_copied(message):
    assert _first_field(message, 8) is None


def test_text_is_left_to_the_tokenizer():
    prompt, wrong = prompt_of(text="hello", tokenizer=True)
    assert not wrong
    assert not prompt.tokens


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized():
    assert "too many for 8 tokens" in prompt_of(text="x" * 257, tokenizer=True)[1]["text"]


@pytest.mark.parametrize(
    ("blocks", "field", "text"),
    [
        ([(2, [1])], "block_mm_hashes[0].block_index", "must be below 2"),
        ([(0, [1]), (0, [2])], "block_mm_hashes[1].block_index", "given twice"),
        ([(0, [])], "block_mm_hashes[0].mm_hashes", "is empty"),
        ([(0, [1] * 65)], "block_mm_hashes[0].mm_hashes", "has 65 entries, at most 64"),
        ([(0, [1])] * 3, "block_mm_hashes", "has 3 entries, at most 2"),
    ],
)
def test_bad_multimodal_hashes(blocks, field, text):
    messages = [common_pb2.BlockMultimodalHashes(block_index=index, mm_hashes=items) for index, items in blocks]
    _, wrong = prompt_of(token_ids=[1, 2, 3, 4, 5], block_mm_hashes=messages)
    assert text in wrong[field]
    assert len(wrong) == 1


def test_multimodal_hashes_need_token_ids():
    blocks = [common_pb2.BlockMultimodalHashes(block_index=0, mm_hashes=[1])]
    assert "needs token_ids" in prompt_of(text="x", tokenizer=True, block_mm_hashes=blocks)[1]["block_mm_hashes"]


# --- hints ------------------------------------------------------------------------------------------------------


def test_no_hints_at_all():
    assert read_hints(router_pb2.BestWorkerIdRequest(), Role.BOTH, Violations()) == RoutingHints()


def test_all_hints():
    hints, wrong = hints_of(
        worker_id=7,
        dp_rank=1,
        allowed_worker_ids=[7, 8],
        required_taints=["gpu"],
        preferred_taints={"fast": -0.5},
        expected_output_tokens=20,
        strict_priority=3,
        priority_jump_s=1.5,
    )
    assert not wrong
    assert hints == RoutingHints(7, 1, frozenset({7, 8}), frozenset({"gpu"}), {"fast": -0.5}, 20, 3, 1.5, None)


@pytest.mark.parametrize(
    ("role", "routing", "pin"),
    [
        (Role.BOTH, {"worker_id": 1, "dp_rank": 2}, (1, 2)),
        (Role.DECODE, {"decode_worker_id": 3, "dp_rank": 1}, (3, 1)),
        (Role.BOTH, {"decode_worker_id": 3}, (3, None)),
        (Role.BOTH, {"worker_id": 3, "decode_worker_id": 3}, (3, None)),
        (Role.BOTH, {"prefill_worker_id": 4, "prefill_dp_rank": 1}, (None, None)),
        (Role.PREFILL, {"prefill_worker_id": 4, "prefill_dp_rank": 1}, (4, 1)),
        (Role.PREFILL, {"prefill_worker_id": 4, "dp_rank": 2}, (4, 2)),
        (Role.PREFILL, {"prefill_worker_id": 4, "worker_id": 5, "dp_rank": 2, "prefill_dp_rank": 0}, (4, 0)),
        (Role.PREFILL, {"worker_id": 5, "dp_rank": 2}, (5, 2)),
        (Role.PREFILL, {"decode_worker_id": 6, "dp_rank": 2}, (None, None)),
        (Role.BOTH, {"worker_id": 0}, (0, None)),
        (Role.BOTH, {"worker_id": 2**64 - 1}, (2**64 - 1, None)),
    ],
)
def test_the_pin_of_the_phase(role, routing, pin):
    hints, wrong = hints_of(role, **routing)
    assert not wrong
    assert (hints.worker_id, hints.dp_rank) == pin


@pytest.mark.parametrize(
    ("routing", "field", "text"),
    [
        ({"worker_id": 1, "decode_worker_id": 2}, "routing.decode_worker_id", "names 2 but worker_id names 1"),
        ({"dp_rank": 0}, "routing.dp_rank", "without a worker"),
        ({"prefill_dp_rank": 0}, "routing.prefill_dp_rank", "without a worker"),
        ({"prefill_dp_rank": 0, "decode_worker_id": 1}, "routing.prefill_dp_rank", "without a worker"),
        ({"priority_jump_s": -1}, "routing.priority_jump_s", "must be in [0, 86400], got -1"),
        ({"priority_jump_s": NAN}, "routing.priority_jump_s", "got nan"),
        ({"preferred_taints": {"a": INF}}, "routing.preferred_taints[a]", "got inf"),
        ({"preferred_taints": {"": 1}}, "routing.preferred_taints", "empty taint"),
        ({"required_taints": [""]}, "routing.required_taints", "empty taint"),
        ({"required_taints": ["x" * 257]}, "routing.required_taints", "at most 256"),
        ({"required_taints": ["x"] * 65}, "routing.required_taints", "has 65 entries"),
        ({"preferred_taints": {str(n): 1 for n in range(65)}}, "routing.preferred_taints", "has 65 entries"),
        ({"allowed_worker_ids": range(4097)}, "routing.allowed_worker_ids", "has 4097 entries"),
    ],
)
def test_bad_hints(routing, field, text):
    _, wrong = hints_of(**routing)
    assert text in wrong[field]
    assert len(wrong) == 1


def test_the_override():
    message = router_pb2.RouterConfigOverride(
        overlap_score_credit=0.5,
        prefill_load_scale=2,
        router_temperature=0,
        assume_kv_reuse=False,
        track_prefill_tokens=True,
        shared_cache_multiplier=1,
        cost="dynamo",
    )
    hints, wrong = hints_of(override=message)
    assert not wrong
    assert hints.override == RouterOverride(0.5, 2.0, 0.0, False, True, 1.0, "dynamo")


@pytest.mark.parametrize(("weight", "credit"), [(0.0, 0.0), (3.0, None)])
def test_the_deprecated_weight_scales_prefill_and_at_zero_the_credit(weight, credit):
    hints, wrong = hints_of(override=router_pb2.RouterConfigOverride(overlap_score_weight=weight))
    assert not wrong
    assert hints.override == RouterOverride(overlap_score_credit=credit, prefill_load_scale=weight)


def test_an_explicit_credit_beats_the_deprecated_weight():
    message = router_pb2.RouterConfigOverride(overlap_score_weight=0, overlap_score_credit=0.7)
    assert hints_of(override=message)[0].override == RouterOverride(0.7, 0.0)


@pytest.mark.parametrize(
    ("fields", "name", "text"),
    [
        ({"overlap_score_credit": -1}, "overlap_score_credit", "must be in [0, 1000000], got -1"),
        ({"prefill_load_scale": NAN}, "prefill_load_scale", "got nan"),
        ({"router_temperature": -0.1}, "router_temperature", "got -0.1"),
        ({"router_temperature": INF}, "router_temperature", "got inf"),
        ({"shared_cache_multiplier": 1.5}, "shared_cache_multiplier", "must be in [0, 1], got 1.5"),
        ({"overlap_score_weight": -1}, "overlap_score_weight", "got -1"),
        ({"overlap_score_weight": 1, "prefill_load_scale": 2}, "overlap_score_weight", "old name"),
        ({"cost": "cheapest"}, "cost", "known are default, dynamo"),
        ({"cost": ""}, "cost", "known are"),
    ],
)
def test_bad_overrides(fields, name, text):
    _, wrong = hints_of(override=router_pb2.RouterConfigOverride(**fields))
    assert text in wrong[f"router_config_override.{name}"]
    assert len(wrong) == 1


def test_an_unknown_override_is_refused():
    newer = bytes([0xF8, 0x06, 1])  # field number 111, a varint
    message = router_pb2.RouterConfigOverride.FromString(newer)
    _, wrong = hints_of(override=message)
    assert "unknown field number 111; known are overlap_score_credit" in wrong["router_config_override"]


# --- generation parameters --------------------------------------------------------------------------------------


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


# --- opaque JSON ------------------------------------------------------------------------------------------------


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
