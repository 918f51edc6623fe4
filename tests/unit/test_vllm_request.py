import json
from array import array
from typing import Any

import pytest

from kvrouter_grpc.errors import InvalidRequestError
from kvrouter_grpc.types import EngineRequest
from kvrouter_grpc.upstream.request import request_body, request_headers


def request(**fields: Any) -> EngineRequest:
    return EngineRequest(
        **{"request_id": "r-1", "model": "m", "tokens": array("I", [1, 2, 2**32 - 1]), "params": {}} | fields
    )


def body(**fields: Any) -> Any:
    return json.loads(request_body(request(**fields)))


def test_a_plain_request() -> None:
    assert body(params={"max_tokens": 4, "temperature": 0.5}) == {
        "model": "m",
        "prompt": [1, 2, 2**32 - 1],
        "max_tokens": 4,
        "temperature": 0.5,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


def test_optional_fields_are_sent_when_given() -> None:
    sent = body(cache_salt="s", priority=0, kv_transfer_params={"do_remote_prefill": True})
    assert (sent["cache_salt"], sent["priority"]) == ("s", 0)
    assert sent["kv_transfer_params"] == {"do_remote_prefill": True}
    assert sent["stream"] is True


def test_a_remote_decode_leg_is_not_streamed() -> None:
    sent = body(kv_transfer_params={"do_remote_decode": True}, params={"stream_options": {"include_usage": True}})
    assert sent["stream"] is False
    assert "stream_options" not in sent


def test_the_routers_own_fields_win() -> None:
    sent = body(params={"prompt": "text", "model": "other", "stream": False, "return_token_ids": False})
    assert (sent["prompt"][:2], sent["model"], sent["stream"], sent["return_token_ids"]) == (
        [1, 2],
        "m",
        True,
        True,
    )


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("value", [1 << 20_000, nested(100_000), object()], ids=["number", "nesting", "object"])
def test_what_json_cannot_carry_is_the_callers_fault(value: object) -> None:
    with pytest.raises(InvalidRequestError):
        request_body(request(params={"x": value}))


def test_headers() -> None:
    assert request_headers(request(), None) == {"Content-Type": "application/json", "X-Request-Id": "r-1"}
    assert request_headers(request(), 0)["X-data-parallel-rank"] == "0"


def test_a_request_id_cannot_add_headers() -> None:
    assert request_headers(request(request_id="a\r\nX: é~!%"), None)["X-Request-Id"] == "a%0D%0AX:%20%C3%A9~!%"
