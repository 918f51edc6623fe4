"""Reads what decides which cached blocks fit: the prompt, and what is folded into its hashes."""

import sys
from array import array
from collections.abc import Mapping, Sequence

from kvrouter_grpc._gen import common_pb2, router_pb2
from kvrouter_grpc.config import ServerConfig
from kvrouter_grpc.server.violations import Violations
from kvrouter_grpc.types import Prompt

PromptRequest = router_pb2.GenerateRequest | router_pb2.BestWorkerIdRequest | router_pb2.GetOverlapScoresRequest

TOKEN_ID_END = 2**31  # engines keep token ids in signed 32-bit integers
MAX_NAME = 256
MAX_SALT = 1024  # vLLM's own bound
MAX_CHARS_PER_TOKEN = 32  # a longer text cannot fit, whatever the tokenizer
MAX_HASHES_PER_BLOCK = 64

_PACKED_FIELD_1 = 1 << 3 | 2  # tag of field 1 with wire type LEN
_TOP_BYTE = slice(3, None, 4) if sys.byteorder == "little" else slice(0, None, 4)
_BELOW_128 = bytes(range(128))


def read_prompt(
    request: PromptRequest,
    lora_name: str,
    block_size: int,
    config: ServerConfig,
    violations: Violations,
    *,
    tokenizer: bool,
) -> Prompt:
    """Read and check the prompt of a request.

    Args:
        request: The request.
        lora_name: The adapter it is for, "" for the base model.
        block_size: Tokens per block of the endpoint, 0 while it is not known.
        config: Its limits.
        violations: Takes what is wrong.
        tokenizer: Whether prompts may be given as text. The tokens of such a prompt are left empty.
    """
    violations.check_text("lora_name", request.lora_name, MAX_NAME)
    violations.check_text("cache_salt", request.cache_salt, MAX_SALT)
    tokens = array("I")
    if request.text:
        _check_text(request, config, violations, tokenizer=tokenizer)
    elif not request.token_ids:
        violations.add("token_ids", "is empty; give the prompt as at least one token id, or as text")
    elif len(request.token_ids) > config.max_prompt_tokens:
        violations.add("token_ids", too_long(len(request.token_ids), config))
    else:
        tokens = _token_array(request)
        _check_tokens(tokens, config, violations)
    mm_hashes = (
        _read_mm_hashes(request.block_mm_hashes, len(tokens), block_size, violations) if request.block_mm_hashes else {}
    )
    return Prompt(tokens, lora_name, request.cache_salt, mm_hashes)


def too_long(tokens: int, config: ServerConfig) -> str:
    """Say that a prompt has too many tokens."""
    return f"has {tokens} tokens, at most {config.max_prompt_tokens} are allowed (server.max_prompt_tokens)"


def _token_array(request: PromptRequest) -> "array[int]":
    """The token ids, copied from the packed field of the message as it is on the wire.

    A packed field of fixed32 is an array of little-endian u32. Walking the field from Python would make an object
    per token, which takes a hundred times as long as all else that is read of a long prompt.
    """
    tokens = array("I")
    packed = _first_field(request.SerializeToString(), 4 * len(request.token_ids))
    if packed is None:
        return array("I", request.token_ids)
    tokens.frombytes(packed)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


def _first_field(message: bytes, size: int) -> memoryview | None:
    """The content of field 1 if the message starts with it and it has `size` bytes, else None."""
    if not message or message[0] != _PACKED_FIELD_1:
        return None
    length, position, shift = 0, 1, 0
    while True:  # a varint: seven bits per byte, lowest first, the top bit says that more follow
        byte = message[position]
        length |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            break
    return memoryview(message)[position : position + size] if length == size else None


def _check_text(request: PromptRequest, config: ServerConfig, violations: Violations, *, tokenizer: bool) -> None:
    if request.token_ids:
        violations.add("text", "is given beside token_ids; give one of them")
    elif not tokenizer:
        violations.add("text", "this router has no tokenizer; send token_ids, or start it with server.tokenizer set")
    elif len(request.text) > config.max_prompt_tokens * MAX_CHARS_PER_TOKEN:
        violations.add(
            "text",
            f"has {len(request.text)} characters, too many for {config.max_prompt_tokens} tokens "
            "(server.max_prompt_tokens)",
        )
    if request.block_mm_hashes:
        violations.add("block_mm_hashes", "needs token_ids: the blocks of a text are not known to its sender")


def _check_tokens(tokens: "array[int]", config: ServerConfig, violations: Violations) -> None:
    # Without a Python object per token: the ids that are too large have a top byte above 127.
    if tokens.tobytes()[_TOP_BYTE].translate(None, _BELOW_128):
        _add_token(tokens, TOKEN_ID_END, "2^31", violations)
    elif config.vocab_size is not None and max(tokens) >= config.vocab_size:
        _add_token(tokens, config.vocab_size, f"the vocabulary size {config.vocab_size}", violations)


def _add_token(tokens: "array[int]", end: int, name: str, violations: Violations) -> None:
    position, token = next((position, token) for position, token in enumerate(tokens) if token >= end)
    violations.add(f"token_ids[{position}]", f"must be below {name}, got {token}")


def _read_mm_hashes(
    blocks: Sequence[common_pb2.BlockMultimodalHashes],
    tokens: int,
    block_size: int,
    violations: Violations,
) -> Mapping[int, Sequence[int]]:
    full_blocks = tokens // (block_size or 1)
    if not tokens or not violations.check_count("block_mm_hashes", blocks, full_blocks):
        return {}
    found: dict[int, Sequence[int]] = {}
    for position, block in enumerate(blocks):
        field = f"block_mm_hashes[{position}]"
        index = block.block_index
        if index >= full_blocks:
            violations.add(
                f"{field}.block_index", f"must be below {full_blocks}, the prompt's full blocks; got {index}"
            )
        elif index in found:
            violations.add(f"{field}.block_index", f"block {index} is given twice; merge its hashes")
        elif not block.mm_hashes:
            violations.add(f"{field}.mm_hashes", "is empty; leave the block out")
        elif violations.check_count(f"{field}.mm_hashes", block.mm_hashes, MAX_HASHES_PER_BLOCK):
            found[index] = tuple(block.mm_hashes)
    return found
