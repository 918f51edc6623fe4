"""Requests to the mock: what is refused, in which words."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrouter_grpc.mock_worker.api_error import ApiError
from kvrouter_grpc.mock_worker.completion import parse_completion, remote_prefill
from kvrouter_grpc.mock_worker.config import MockWorkerConfig

CONFIG = MockWorkerConfig(model="tiny", loras=("tiny-lora=models/tiny-lora",), vocab_size=512, max_model_len=1024)


def parse(**body: Any) -> Any:
    return parse_completion(json.dumps(body).encode(), CONFIG)


def refusal(raw: bytes) -> tuple[int, dict[str, Any], bool]:
    with pytest.raises(ApiError) as caught:
        parse_completion(raw, CONFIG)
    return caught.value.status, json.loads(caught.value.body())["error"], caught.value.late


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        # Status, type, param and message as a real engine (0.32.0) gave them.
        (
            {"prompt": [10, 99999]},
            400,
            ("BadRequestError", None, "Token id 99999 is out of vocabulary"),
        ),
        (
            {"prompt": [10], "temperature": -1},
            400,
            (
                "BadRequestError",
                "temperature",
                "temperature must be non-negative, got -1.0. (parameter=temperature, value=-1.0)",
            ),
        ),
        (
            {"prompt": [10], "top_p": 2},
            400,
            ("BadRequestError", "top_p", "top_p must be in (0, 1], got 2.0. (parameter=top_p, value=2.0)"),
        ),
        (
            {"prompt": [10], "max_tokens": 0},
            400,
            (
                "BadRequestError",
                "max_tokens",
                "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)",
            ),
        ),
        ({"prompt": [], "max_tokens": 2}, 400, ("BadRequestError", None, "You must pass at least one prompt")),
        (
            {"model": "nope", "prompt": [10]},
            404,
            ("NotFoundError", "model", "The model `nope` does not exist. Valid aliases: tiny, tiny-lora."),
        ),
        (
            {"prompt": [10], "n": 2, "temperature": 0},
            400,
            ("BadRequestError", None, "n must be 1 when using greedy sampling, got 2."),
        ),
        (
            {"prompt": [7] * 1100},
            400,
            (
                "BadRequestError",
                "input_tokens",
                (
                    "This model's maximum context length is 1024 tokens. However, your prompt contains 1100 input tokens, "
                    "which exceeds this limit even without any output tokens. Please reduce the length of the input "
                    "prompt. (parameter=input_tokens, value=1100)"
                ),
            ),
        ),
    ],
)
def test_refusals_are_worded_like_vllm(body: dict[str, Any], status: int, error: tuple[str, str | None, str]) -> None:
    got_status, got, late = refusal(json.dumps(body).encode())
    kind, param, message = error
    assert got_status == status
    assert got == {"message": message, "type": kind, "param": param, "code": status}
    assert not late


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b"", "body.0"),
        (b'{"prompt":[10', "body.13"),
        (b"[1]", "body"),
        (b"\xff\xfe", "body.2"),
        (b'{"prompt":' + b"[" * 5000, None),
        (b'{"prompt":{"a":1}}', "body.prompt"),
        (b'{"prompt":[-1]}', "body.prompt"),
        (b'{"prompt":[[1],[2,null]]}', "body.prompt.1.1"),
        (b'{"prompt":[[1],[]]}', None),
        (b'{"prompt":[1,"a"]}', "prompt"),
        (b'{"prompt":[1],"max_tokens":"many"}', "body.max_tokens"),
        (b'{"prompt":[99999999999999999999999]}', None),
        (b'{"prompt":[1],"n":99999999999}', "n"),
        (b'{"prompt":[1],"stop":[""]}', None),
        (b'{"prompt":[1],"cache_salt":""}', None),
        (b'{"prompt":[1],"logprobs":21}', "logprobs"),
        (b'{"prompt":[1],"min_tokens":5,"max_tokens":4}', "min_tokens"),
        (b'{"prompt":[1],"n":0}', "n"),
        (b"{}", None),
    ],
)
def test_nonsense_is_a_400(raw: bytes, param: str | None) -> None:
    status, error, _ = refusal(raw)
    assert status == 400
    if param is not None:
        assert error["param"] == param
    assert error["message"]


def test_a_bad_token_id_is_found_late_in_a_stream_only() -> None:
    assert refusal(b'{"prompt":[512],"stream":true}')[2]
    assert not refusal(b'{"prompt":[512]}')[2]


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["prompt", "model", "n", "stop", "seed", "stream_options", "kv_transfer_params", "x"]),
                inner,
            )
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_bytes_are_a_request_or_a_400_or_404(raw: bytes) -> None:
    try:
        completion = parse_completion(raw, CONFIG)
    except ApiError as error:
        assert error.status in (400, 404)  # noqa: PT017 - both outcomes are right, no other exception is
    else:
        assert all(completion.prompts)


def test_what_a_request_means() -> None:
    completion = parse(
        model="tiny-lora",
        prompt=[[5, 6, 7], "ab"],
        max_tokens=9999,
        stop="x",
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        cache_salt="s",
        bogus_field=1,
        vllm_xargs={"kv_cache_report_mode": "full"},
    )
    assert completion.prompts == ([5, 6, 7], [102, 103])
    assert (completion.scope.lora_id, completion.scope.lora_name) == (1, "tiny-lora")
    assert completion.scope.lora_path == "models/tiny-lora"
    assert completion.scope.cache_salt == "s"
    assert completion.rules(3, 1024).max_tokens == 1021  # clipped to the context, silently
    assert completion.rules(3, 1024).stop == ("x",)
    assert completion.include_usage
    assert completion.continuous_usage
    assert completion.report_hits


def test_defaults_are_openais() -> None:
    completion = parse(prompt=[5])
    assert completion.rules(1, 1024).max_tokens == 16
    assert completion.model == "tiny"
    assert not completion.include_usage
    assert not parse(prompt=[5], stream_options={"continuous_usage_stats": True}).continuous_usage


def test_the_seed_counts_unless_sampling_is_greedy() -> None:
    assert parse(prompt=[5], seed=3).variant == 3
    assert parse(prompt=[5], seed=3, temperature=0).variant == 0


@pytest.mark.parametrize(
    "params",
    [
        None,
        {},
        {"do_remote_prefill": False, "remote_host": "h", "remote_port": 1, "remote_request_id": "r"},
        {"do_remote_prefill": True},
        {"do_remote_prefill": True, "remote_host": "h", "remote_port": "1", "remote_request_id": "r"},
    ],
)
def test_incomplete_transfer_parameters_are_ignored(params: dict[str, Any] | None) -> None:
    assert remote_prefill(params) is None


def test_complete_transfer_parameters_name_the_source() -> None:
    params = {"do_remote_prefill": True, "remote_host": "h", "remote_port": 1, "remote_request_id": "r"}
    assert remote_prefill(params) == ("h", 1, "r")
