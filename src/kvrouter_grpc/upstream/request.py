"""A request as vLLM's completions API reads it."""

from collections.abc import Mapping
from urllib.parse import quote

import msgspec

from kvrouter_grpc.core import json_array
from kvrouter_grpc.errors import InvalidRequestError
from kvrouter_grpc.types import EngineRequest, Json

# Printable ASCII stays as it is; whatever could end a header line does not.
_HEADER_SAFE = "".join(map(chr, range(0x21, 0x7F)))


def request_body(request: EngineRequest) -> bytes:
    """Encode the body of `POST /v1/completions`.

    The fields that the router owns win over the same fields in `request.params`. Continuous usage makes the
    counts of an answer known even when it is cut short.

    Raises:
        InvalidRequestError: `params` or `kv_transfer_params` hold what JSON cannot carry.
    """
    body: dict[str, Json] = dict(request.params)
    if request.model:
        body["model"] = request.model
    body["prompt"] = msgspec.Raw(json_array(request.tokens))
    body["return_token_ids"] = True
    body["stream"] = request.streams
    if request.streams:
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    else:
        body.pop("stream_options", None)  # vLLM refuses them without a stream
    if request.cache_salt:
        body["cache_salt"] = request.cache_salt
    if request.priority is not None:
        body["priority"] = request.priority
    if request.kv_transfer_params is not None:
        body["kv_transfer_params"] = request.kv_transfer_params
    try:
        return msgspec.json.encode(body)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        text = "holds a value that cannot be written as JSON: nest it less, use smaller numbers"
        raise InvalidRequestError([("params", text)]) from error


def request_headers(request: EngineRequest, dp_rank: int | None) -> Mapping[str, str]:
    """Build the headers that name the request (vLLM: `cmpl-<X-Request-Id>`) and choose the rank."""
    headers = {
        "Content-Type": "application/json",
        "X-Request-Id": quote(request.request_id, safe=_HEADER_SAFE),
    }
    if dp_rank is not None:
        headers["X-data-parallel-rank"] = str(dp_rank)
    return headers
