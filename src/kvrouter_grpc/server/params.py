"""Reads how an answer is generated, into the fields of vLLM's `CompletionRequest`."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from kvrouter_grpc._gen import router_pb2
from kvrouter_grpc.server.opaque_json import read_object
from kvrouter_grpc.server.violations import Bounds, Violations
from kvrouter_grpc.types import Json

MAX_ANSWERS = 128
MAX_STRINGS = 1024
MAX_STRING = 4096
MAX_TOKEN_IDS = 1 << 20  # larger than any vocabulary
MAX_GRAMMAR = 1 << 20
MAX_ANNOTATIONS = 64

_TOKEN_ID = Bounds(0, 2**31 - 1)
_BIAS = Bounds(-100, 100)
_PENALTY = Bounds(-2, 2)

# A check takes (field path, value, violations) and gives the value for the engine, anything if it is wrong.
# Every field of the three messages has a row; the engine calls it the same unless `_ENGINE_NAMES` differs.
_Check = Callable[[str, Any, Violations], Json]


def _number(bounds: Bounds) -> _Check:
    def check(field: str, value: float, violations: Violations) -> Json:
        violations.check_number(field, value, bounds)
        return value

    return check


def _as_is(_field: str, value: Json, _violations: Violations) -> Json:
    return value


def _strings(field: str, values: Any, violations: Violations) -> Json:
    if not violations.check_count(field, values, MAX_STRINGS):
        return None
    for position, value in enumerate(values):
        if not value:
            violations.add(f"{field}[{position}]", "is empty")
        violations.check_text(f"{field}[{position}]", value, MAX_STRING)
    return list(values)


def _token_ids(field: str, values: Any, violations: Violations) -> Json:
    if not violations.check_count(field, values, MAX_TOKEN_IDS):
        return None
    violations.check_number(field, max(values), _TOKEN_ID)
    return list(values)


def _logit_bias(field: str, biases: Any, violations: Violations) -> Json:
    if not violations.check_count(field, biases, MAX_TOKEN_IDS):
        return None
    violations.check_number(field, max(biases), _TOKEN_ID)
    for token_id, bias in biases.items():
        if not violations.check_number(f"{field}[{token_id}]", bias, _BIAS):
            break  # one is enough to know
    return {str(token_id): bias for token_id, bias in biases.items()}


def _structured_output(field: str, message: Any, violations: Violations) -> Json:
    kind = message.WhichOneof("constraint")
    if kind is None:
        violations.add(field, "is given without a constraint; set one of its fields or leave it out")
        return None
    field = f"{field}.{kind}"
    if kind == "choice":
        choices = message.choice.choices
        if not choices:
            violations.add(field, "has no choices")
        return {"choice": _strings(f"{field}.choices", choices, violations)}
    if kind == "json_object":
        if not message.json_object:
            violations.add(field, "must be true; leave structured_output out to allow anything")
        return {"json_object": True}
    text = getattr(message, kind)
    if not text:
        violations.add(field, "is empty")
    elif violations.check_text(field, text, MAX_GRAMMAR) and kind in _JSON_TEXTS:
        _check_json(field, text, violations)
    return {"json" if kind == "json_schema" else kind: text}


_JSON_TEXTS = frozenset({"json_schema", "structural_tag"})


def _check_json(field: str, text: str, violations: Violations) -> None:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, ValueError, RecursionError):
        violations.add(field, "is not valid JSON")


STOP: Mapping[str, _Check] = {
    "max_tokens": _number(Bounds(1)),
    "min_tokens": _as_is,
    "stop": _strings,
    "stop_token_ids": _token_ids,
    "ignore_eos": _as_is,
    "include_stop_str_in_output": _as_is,
}
SAMPLING: Mapping[str, _Check] = {
    "n": _number(Bounds(1, MAX_ANSWERS)),
    "temperature": _number(Bounds(0)),
    "top_p": _number(Bounds(0, 1, low_open=True)),
    "top_k": _number(Bounds(-1)),
    "min_p": _number(Bounds(0, 1)),
    "presence_penalty": _number(_PENALTY),
    "frequency_penalty": _number(_PENALTY),
    "repetition_penalty": _number(Bounds(0, low_open=True)),
    "seed": _as_is,
    "use_beam_search": _as_is,
    "length_penalty": _number(Bounds()),
    "logit_bias": _logit_bias,
    "allowed_token_ids": _token_ids,
    "bad_words": _strings,
    "structured_output": _structured_output,
}
OUTPUT: Mapping[str, _Check] = {
    "logprobs": _as_is,
    "prompt_logprobs": _as_is,
    "skip_special_tokens": _as_is,
    "spaces_between_special_tokens": _as_is,
}
_MESSAGES = {"stop_conditions": STOP, "sampling_options": SAMPLING, "output_options": OUTPUT}
_ENGINE_NAMES = {"structured_output": "structured_outputs"}

# Fields of the engine's request that `extra_args_json` may not set, and what to do instead.
_REFUSED: Mapping[str, str] = {
    _ENGINE_NAMES.get(name, name): f"set {message}.{name} instead"
    for message, checks in _MESSAGES.items()
    for name in checks
} | {
    "prompt": "set token_ids or text instead",
    "prompt_embeds": "the router cannot route a prompt that has no tokens; leave it out",
    "truncate_prompt_tokens": "the worker would serve another prompt than the routed one; truncate it before",
    "truncation_side": "the worker would serve another prompt than the routed one; truncate it before",
    "echo": "the caller has the prompt; leave it out",
    "model": "set model or lora_name instead",
    "cache_salt": "set cache_salt instead",
    "priority": "set priority instead",
    "request_id": "set request_id instead",
    "kv_transfer_params": "set kv_transfer_params_json instead",
    "stream": "the router sets it; leave it out",
    "stream_options": "the router sets it; leave it out",
    "return_token_ids": "the router sets it; leave it out",
}
_REPORT_MODE = "kv_cache_report_mode"


def read_params(request: router_pb2.GenerateRequest, violations: Violations) -> dict[str, Json]:
    """Read and check the sampling, stop and output options and the extra fields.

    Returns:
        Fields of vLLM's request; those that were left out are absent, so that the engine's defaults hold.
    """
    params: dict[str, Json] = {}
    for message, checks in _MESSAGES.items():
        if request.HasField(message):  # type: ignore[arg-type]  # the stub wants a literal
            for descriptor, value in getattr(request, message).ListFields():
                name = descriptor.name
                params[_ENGINE_NAMES.get(name, name)] = checks[name](f"{message}.{name}", value, violations)
    _add_end_tokens(params, request, violations)
    if params.get("min_tokens", 0) > params.get("max_tokens", 2**32):
        violations.add(
            "stop_conditions.min_tokens",
            f"must be at most max_tokens ({params['max_tokens']}), got {params['min_tokens']}",
        )
    if "logprobs" in params:
        params["return_tokens_as_token_ids"] = True  # ids name alternatives exactly, their texts may not
    extra = read_object("extra_args_json", request.extra_args_json, violations)
    if extra:
        _check_extra(extra, violations)
        params |= extra
    violations.check_count("annotations", request.annotations, MAX_ANNOTATIONS)
    return params


def _add_end_tokens(params: dict[str, Json], request: router_pb2.GenerateRequest, violations: Violations) -> None:
    if not request.eos_token_ids:
        return
    end_tokens = _token_ids("eos_token_ids", request.eos_token_ids, violations) or ()
    if not params.get("ignore_eos"):
        stop_tokens = params.get("stop_token_ids") or ()
        params["stop_token_ids"] = list(dict.fromkeys([*stop_tokens, *end_tokens]))


def _check_extra(extra: dict[str, Json], violations: Violations) -> None:
    for name in sorted(extra.keys() & _REFUSED.keys()):
        violations.add(f"extra_args_json.{name}", _REFUSED[name])
    arguments = extra.get("vllm_xargs")
    if isinstance(arguments, dict) and _REPORT_MODE in arguments:
        # It makes the engine announce blocks again that it only reused; nothing ever balances that, so the
        # index would keep the blocks for ever.
        violations.add(f"extra_args_json.vllm_xargs.{_REPORT_MODE}", "would falsify the router's index; leave it out")
