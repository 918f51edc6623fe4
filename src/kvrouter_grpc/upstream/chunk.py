"""The JSON of vLLM's completions API, decoded into `EngineChunk`.

Source of the shapes: `CompletionStreamResponse`, `CompletionResponse` and `ErrorResponse` of vLLM 0.10 to
0.32, as seen on the wire. Fields that are not listed are passed over, so newer versions decode too.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import msgspec

from kvrouter_grpc.types import EngineChunk, Json, TokenLogprob, Usage

_U32_END = 2**32
_Count = Annotated[int, msgspec.Meta(ge=0, lt=_U32_END)]
_Index = Annotated[int, msgspec.Meta(ge=0, lt=16384)]  # the largest `n`: vLLM's VLLM_MAX_N_SEQUENCES
_TOKEN_ID_PREFIX = "token_id:"  # noqa: S105 - vLLM's placeholder for the text of a token, not a secret
_U32_DIGITS = 10


class MalformedAnswerError(ValueError):
    """The engine sent what is not JSON, or JSON of another shape."""


class Logprobs(msgspec.Struct, gc=False):
    """`choices[].logprobs`: parallel lists, one item per token."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float | None] | None] | None = None


class Choice(msgspec.Struct, gc=False):
    """`choices[]`: what one of the `n` answers grew by, or the whole of it when not streamed."""

    index: _Index = 0
    text: str = ""
    token_ids: list[_Count] | None = None
    finish_reason: str | None = None
    stop_reason: _Count | str | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Json = None


class PromptTokensDetails(msgspec.Struct, gc=False):
    """`usage.prompt_tokens_details`: null unless the engine runs with `--enable-prompt-tokens-details`."""

    cached_tokens: _Count | None = None


class CompletionUsage(msgspec.Struct, gc=False):
    """`usage`."""

    prompt_tokens: _Count = 0
    completion_tokens: _Count | None = None
    prompt_tokens_details: PromptTokensDetails | None = None


class ErrorInfo(msgspec.Struct, gc=False):
    """`error`: in a body with a status of 4xx or 5xx, or in an event of a stream with status 200."""

    message: str = ""
    param: str | None = None
    code: int | str | None = None


class Completion(msgspec.Struct):
    """One event of a streamed answer, the body of one that is not streamed, or the body of a refusal."""

    choices: list[Choice] = []
    usage: CompletionUsage | None = None
    kv_transfer_params: Json = None
    error: ErrorInfo | str | None = None


_decoder = msgspec.json.Decoder(Completion)


def decode_completion(payload: bytes) -> Completion:
    """Decode one JSON document of the completions API.

    Raises:
        MalformedAnswerError: It is not one.
    """
    try:
        return _decoder.decode(payload)
    except (ValueError, RecursionError) as error:  # ValueError: msgspec's own errors and UnicodeDecodeError
        raise MalformedAnswerError from error


def engine_chunk(choice: Choice, usage: Usage | None = None, kv_transfer_params: Json = None) -> EngineChunk:
    """Turn one choice into a chunk.

    Raises:
        MalformedAnswerError: The parallel lists of the log-probabilities differ in length.
    """
    token_ids = choice.token_ids or ()
    logprobs = choice.logprobs
    return EngineChunk(
        choice.index,
        token_ids,
        choice.text,
        choice.finish_reason,
        choice.stop_reason,
        () if logprobs is None else _chosen(logprobs, token_ids),
        () if logprobs is None else [_alternatives(step or {}) for step in logprobs.top_logprobs or ()],
        usage,
        kv_transfer_params,
        choice.prompt_logprobs,
    )


def engine_usage(usage: CompletionUsage) -> Usage:
    """Turn `usage` into the domain's type."""
    details = usage.prompt_tokens_details
    return Usage(
        usage.prompt_tokens,
        usage.completion_tokens or 0,
        None if details is None else details.cached_tokens,
    )


def _chosen(logprobs: Logprobs, token_ids: Sequence[int]) -> list[TokenLogprob]:
    """One entry per token; the ids of the chosen tokens are known even where the engine writes their text."""
    if len(logprobs.tokens) != len(logprobs.token_logprobs):
        raise MalformedAnswerError
    entries = map(_token_logprob, logprobs.tokens, logprobs.token_logprobs)
    if len(token_ids) != len(logprobs.tokens):
        return list(entries)
    return [replace(entry, token_id=token_id) for entry, token_id in zip(entries, token_ids, strict=True)]


def _alternatives(step: dict[str, float | None]) -> list[TokenLogprob]:
    """Likeliest first; vLLM lists the chosen token before the others."""
    return sorted(
        (_token_logprob(token, logprob) for token, logprob in step.items()),
        key=lambda entry: -math.inf if math.isnan(entry.logprob) else entry.logprob,
        reverse=True,
    )


def _token_logprob(token: str, logprob: float | None) -> TokenLogprob:
    # vLLM writes NaN (and a probability it did not compute) as null.
    value = math.nan if logprob is None else logprob
    # With `return_tokens_as_token_ids` the text of a token is `token_id:<n>`.
    digits = token.removeprefix(_TOKEN_ID_PREFIX)
    if len(digits) < len(token) and len(digits) <= _U32_DIGITS and digits.isascii() and digits.isdecimal():
        token_id = int(digits)
        if token_id < _U32_END:
            return TokenLogprob(token_id, "", value)
    return TokenLogprob(None, token, value)
