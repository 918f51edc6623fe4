"""Reads what decides which cached blocks fit: the prompt, and what is folded into its hashes."""

from collections.abc import Mapping, Sequence

from kvrouter_grpc._gen import common_pb2, router_pb2
from kvrouter_grpc.config import ServerConfig
from kvrouter_grpc.core import TokenIds
from kvrouter_grpc.server.incoming import Asked
from kvrouter_grpc.server.violations import Violations
from kvrouter_grpc.types import Prompt

PromptRequest = router_pb2.GenerateRequest | router_pb2.BestWorkerIdRequest | router_pb2.GetOverlapScoresRequest
AskedPrompt = (
    Asked[router_pb2.GenerateRequest]
    | Asked[router_pb2.BestWorkerIdRequest]
    | Asked[router_pb2.GetOverlapScoresRequest]
)

TOKEN_ID_END = 2**31  # engines keep token ids in signed 32-bit integers
MAX_NAME = 256
MAX_SALT = 1024  # vLLM's own bound
MAX_CHARS_PER_TOKEN = 32  # a longer text cannot fit, whatever the tokenizer
MAX_HASHES_PER_BLOCK = 64


def read_prompt(
    asked: AskedPrompt,
    lora_name: str,
    block_size: int,
    config: ServerConfig,
    violations: Violations,
    *,
    tokenizer: bool,
) -> Prompt:
    """Read and check the prompt of a request.

    Args:
        asked: The request.
        lora_name: The adapter it is for, "" for the base model.
        block_size: Tokens per block of the endpoint, 0 while it is not known.
        config: Its limits.
        violations: Takes what is wrong.
        tokenizer: Whether prompts may be given as text. The tokens of such a prompt are empty.
    """
    request, tokens = asked
    violations.check_text("lora_name", request.lora_name, MAX_NAME)
    violations.check_text("cache_salt", request.cache_salt, MAX_SALT)
    if request.text:
        _check_text(request, tokens, config, violations, tokenizer=tokenizer)
    else:
        _check_tokens(tokens, config, violations)
    mm_hashes: Mapping[int, Sequence[int]] = {}
    if request.block_mm_hashes and tokens:
        mm_hashes = _read_mm_hashes(request.block_mm_hashes, len(tokens), block_size, violations)
    return Prompt(tokens, lora_name, request.cache_salt, mm_hashes)


def token_end(config: ServerConfig) -> int:
    """Token ids are below this."""
    return TOKEN_ID_END if config.vocab_size is None else min(config.vocab_size, TOKEN_ID_END)


def too_long(tokens: int, config: ServerConfig) -> str:
    """Say that a prompt has too many tokens."""
    return f"has {tokens} tokens, at most {config.max_prompt_tokens} are allowed (server.max_prompt_tokens)"


def _check_text(
    request: PromptRequest, tokens: TokenIds, config: ServerConfig, violations: Violations, *, tokenizer: bool
) -> None:
    if tokens:
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


def _check_tokens(tokens: TokenIds, config: ServerConfig, violations: Violations) -> None:
    if not tokens:
        violations.add("token_ids", "is empty; give the prompt as at least one token id, or as text")
        return
    if len(tokens) > config.max_prompt_tokens:
        violations.add("token_ids", too_long(len(tokens), config))
        return
    position = tokens.first_at_least(token_end(config))
    if position >= 0:
        token = memoryview(tokens)[position]
        end = "2^31" if token >= TOKEN_ID_END else f"the vocabulary size {config.vocab_size}"
        violations.add(f"token_ids[{position}]", f"must be below {end}, got {token}")


def _read_mm_hashes(
    blocks: Sequence[common_pb2.BlockMultimodalHashes],
    tokens: int,
    block_size: int,
    violations: Violations,
) -> Mapping[int, Sequence[int]]:
    full_blocks = tokens // (block_size or 1)
    if not violations.check_count("block_mm_hashes", blocks, full_blocks):
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
