"""`POST /v1/completions`: what may be asked, checked in vLLM's order and refused in vLLM's words."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from kvrouter_grpc.mock_worker.api_error import ApiError, bad_request, malformed, not_found
from kvrouter_grpc.mock_worker.block_hash import CacheScope
from kvrouter_grpc.mock_worker.config import MockWorkerConfig
from kvrouter_grpc.mock_worker.sequence import StopRules
from kvrouter_grpc.mock_worker.tokens import encode_text

_MAX_LOGPROBS = 20
_DEFAULT_MAX_TOKENS = 16
_MAX_SEQUENCES = 16_384  # of one request


class StreamOptions(msgspec.Struct):
    """Which usage figures a stream carries."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Body(msgspec.Struct):
    """The JSON body; fields that a mock has no use for are ignored, as vLLM ignores unknown ones."""

    prompt: str | list[int | str | list[int]] | None = None
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    logprobs: int | None = None
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool = False
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    cache_salt: str | None = None
    priority: int = 0
    session_id: str | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    vllm_xargs: dict[str, Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A request that can be run.

    Attributes:
        body: As it came.
        model: The served name it asked for.
        scope: What its blocks may be shared with.
        prompts: Token ids per prompt; each has `body.n` choices.
    """

    body: Body
    model: str
    scope: CacheScope
    prompts: tuple[list[int], ...]

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.body.stream_options is not None and self.body.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream carries usage."""
        return self.include_usage and self.body.stream_options.continuous_usage_stats  # type: ignore[union-attr]

    @property
    def report_hits(self) -> bool:
        """Whether reused blocks are reported as stored, too."""
        return (self.body.vllm_xargs or {}).get("kv_cache_report_mode") == "full"

    @property
    def variant(self) -> int:
        """What sets its answer apart from others to the same prompt: the seed, unless it samples greedily."""
        return 0 if self.body.temperature == 0 else self.body.seed or 0

    def rules(self, prompt_tokens: int, context_tokens: int) -> StopRules:
        """When the answer to a prompt ends: at the latest when the context is full."""
        body = self.body
        wanted = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        return StopRules(
            max_tokens=min(wanted, context_tokens - prompt_tokens),
            min_tokens=body.min_tokens,
            ignore_eos=body.ignore_eos,
            stop_token_ids=frozenset(body.stop_token_ids or ()),
            stop=_stop_strings(body.stop),
            include_stop=body.include_stop_str_in_output,
        )


def parse_completion(raw: bytes, config: MockWorkerConfig) -> Completion:
    """Read a request body.

    Raises:
        ApiError: What is wrong, as vLLM would say it. A token outside the vocabulary is found late, by the engine:
            `ApiError.late` is set, and a stream reports it inside a 200.
    """
    try:
        body = msgspec.json.decode(raw, type=Body, strict=False)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise malformed(raw, error) from None
    scope = _scope(body, config)
    prompts = _prompts(body.prompt)
    for prompt in prompts:
        if len(prompt) >= config.context_tokens:
            raise bad_request(
                f"This model's maximum context length is {config.context_tokens} tokens. However, your prompt contains "
                f"{len(prompt)} input tokens, which exceeds this limit even without any output tokens. Please reduce "
                f"the length of the input prompt. (parameter=input_tokens, value={len(prompt)})",
                "input_tokens",
            )
    _check_sampling(body)
    if len(prompts) * body.n > _MAX_SEQUENCES:
        raise bad_request(f"n must be at most {_MAX_SEQUENCES // len(prompts)}, got {body.n}.", "n")
    for prompt in prompts:
        if max(prompt) >= config.vocab_size:
            worst = next(token for token in prompt if token >= config.vocab_size)
            raise bad_request(f"Token id {worst} is out of vocabulary", late=bool(body.stream))
    return Completion(body, body.model or config.model, scope, prompts)


def _scope(body: Body, config: MockWorkerConfig) -> CacheScope:
    if body.cache_salt == "":
        raise bad_request("Parameter 'cache_salt' must be a non-empty string if provided.")
    if body.model is None or body.model == config.model:
        return CacheScope(cache_salt=body.cache_salt)
    for lora_id, (name, path) in enumerate(config.adapters, start=1):
        if name == body.model:
            return CacheScope(lora_id, name, path, body.cache_salt)
    aliases = ", ".join([config.model, *(name for name, _ in config.adapters)])
    raise not_found(f"The model `{body.model}` does not exist. Valid aliases: {aliases}.", "model")


def _prompts(prompt: str | list[int | str | list[int]] | None) -> tuple[list[int], ...]:
    if not prompt:
        raise bad_request("You must pass at least one prompt")
    if isinstance(prompt, str):
        return (encode_text(prompt),)
    token_ids = [item for item in prompt if isinstance(item, int)]
    if token_ids:
        if len(token_ids) != len(prompt):
            raise bad_request(
                "prompt must be a string, a list of strings, token ids or a list of token id lists", "prompt"
            )
        prompts: tuple[list[int], ...] = (token_ids,)
    else:
        prompts = tuple(
            encode_text(item) if isinstance(item, str) else item for item in prompt if not isinstance(item, int)
        )
    for tokens in prompts:
        if not tokens:
            raise bad_request("The decoder prompt cannot be empty")
        if min(tokens) < 0:
            raise ApiError(
                400, "Bad Request", f"Input should be greater than or equal to 0, got {min(tokens)}", "body.prompt"
            )
    return prompts


def _check_sampling(body: Body) -> None:
    def refuse(name: str, rule: str, value: object) -> ApiError:
        return bad_request(f"{name} {rule}, got {value}. (parameter={name}, value={value})", name)

    if body.n < 1:
        raise refuse("n", "must be at least 1", body.n)
    if body.temperature is not None and not 0 <= body.temperature < float("inf"):
        raise refuse("temperature", "must be non-negative", body.temperature)
    if body.top_p is not None and not 0 < body.top_p <= 1:
        raise refuse("top_p", "must be in (0, 1]", body.top_p)
    if body.max_tokens is not None and body.max_tokens < 1:
        raise refuse("max_tokens", "must be at least 1", body.max_tokens)
    if body.min_tokens < 0:
        raise refuse("min_tokens", "must be greater than or equal to 0", body.min_tokens)
    wanted = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if body.min_tokens > wanted:
        raise refuse("min_tokens", f"must be less than or equal to max_tokens={wanted}", body.min_tokens)
    if body.logprobs is not None and not 0 <= body.logprobs <= _MAX_LOGPROBS:
        raise refuse("logprobs", f"must be between 0 and {_MAX_LOGPROBS}", body.logprobs)
    if not all(_stop_strings(body.stop)):
        raise bad_request("stop cannot contain an empty string.")
    if body.n > 1 and body.temperature == 0:
        raise bad_request(f"n must be 1 when using greedy sampling, got {body.n}.")


def _stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def remote_prefill(params: Mapping[str, Any] | None) -> tuple[str, int, str] | None:
    """(host, port, request id) of the worker that has prefilled, None when the parameters do not name one."""
    if params is None or params.get("do_remote_prefill") is not True:
        return None
    match params:
        case {"remote_host": str(host), "remote_port": int(port), "remote_request_id": str(request_id)}:
            return host, port, request_id
    return None
