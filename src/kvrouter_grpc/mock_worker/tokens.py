"""The mock's model: how text becomes tokens, and which token follows which."""

from array import array
from collections.abc import Sequence
from zlib import crc32

from kvrouter_grpc.mock_worker.config import BYTE_TOKENS, FIRST_BYTE_TOKEN, FIRST_WORD_TOKEN, MockWorkerConfig

EOS_TOKEN = 2

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads neighbouring numbers (Fibonacci hashing)
_MASK = 0xFFFFFFFFFFFFFFFF


def encode_text(text: str) -> list[int]:
    """One token per UTF-8 byte."""
    return [FIRST_BYTE_TOKEN + byte for byte in text.encode()]


def token_text(token: int) -> str:
    """The text of one token: its byte, or a word that names it. Special tokens are empty."""
    if token >= FIRST_WORD_TOKEN:
        return f" w{token}"
    return chr(token - FIRST_BYTE_TOKEN) if FIRST_BYTE_TOKEN <= token < FIRST_BYTE_TOKEN + BYTE_TOKENS else ""


class Walk:
    """The answer to one prompt, token by token.

    The next token is a hash of all tokens before it, so the same prompt has the same answer on every worker with the
    same seed, and a prompt continued by the first part of its answer is answered with the rest.
    """

    __slots__ = ("_eos_below", "_mix", "_span", "_state")

    def __init__(self, config: MockWorkerConfig, prompt: Sequence[int], *, adapter: str = "", variant: int = 0) -> None:
        """Stand at the end of `prompt`.

        Args:
            config: Vocabulary, seed and whether answers end by themselves.
            prompt: Token ids, each below 2^32.
            adapter: LoRA name; adapters answer differently.
            variant: Sets the choices of one request apart, and sampling seeds.
        """
        self._state = crc32(array("I", prompt).tobytes(), crc32(adapter.encode()))
        self._mix = ((config.seed << 20) ^ variant) * _GOLDEN & _MASK
        self._span = config.vocab_size - FIRST_WORD_TOKEN
        self._eos_below = _MASK // config.natural_eos_after if config.natural_eos else 0

    def next(self) -> int:
        """The next token, which is then part of what the following ones depend on."""
        draw = (self._state ^ self._mix) * _GOLDEN & _MASK
        draw ^= draw >> 29
        token = EOS_TOKEN if draw < self._eos_below else FIRST_WORD_TOKEN + (draw >> 7) % self._span
        self._state = crc32(token.to_bytes(4, "little"), self._state)
        return token
