"""Prompts of requests, and everything that is wrong with them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrouter_grpc._gen import common_pb2, router_pb2
from kvrouter_grpc.config import ServerConfig
from kvrouter_grpc.errors import InvalidRequestError
from kvrouter_grpc.server.incoming import AskedReader
from kvrouter_grpc.server.prompt import read_prompt
from kvrouter_grpc.server.violations import Violations

CONFIG = ServerConfig(max_prompt_tokens=8, vocab_size=100)


def found(violations: Violations) -> dict[str, str]:
    try:
        violations.raise_if_any()
    except InvalidRequestError as error:
        return dict(error.violations)
    return {}


def asked(message):
    """A message as it comes in."""
    return AskedReader(type(message))(message.SerializeToString())


def prompt_of(config=CONFIG, block_size=2, tokenizer=False, adapter="", **fields):
    violations = Violations()
    request = asked(router_pb2.GenerateRequest(**fields))
    prompt = read_prompt(request, adapter, block_size, config, violations, tokenizer=tokenizer)
    return prompt, found(violations)


def test_a_prompt_carries_what_is_folded_into_its_hashes():
    blocks = [common_pb2.BlockMultimodalHashes(block_index=1, mm_hashes=[2**64 - 1, 3])]
    prompt, wrong = prompt_of(token_ids=[1, 2, 3, 4], cache_salt="s", block_mm_hashes=blocks, adapter="ad")
    assert not wrong
    assert prompt.tokens.tolist() == [1, 2, 3, 4]
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
