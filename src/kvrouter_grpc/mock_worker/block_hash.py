"""The hash chain that names KV blocks, computed as vLLM computes it."""

import hashlib
import pickle
from dataclasses import dataclass

# Protocol 5 is part of the format: the digest is taken over the pickled bytes.
_PICKLE_PROTOCOL = 5


@dataclass(frozen=True, slots=True)
class CacheScope:
    """What, besides the tokens before and in it, decides whether a block may be shared between two requests."""

    lora_id: int | None = None
    lora_name: str | None = None
    lora_path: str = ""
    cache_salt: str | None = None

    def hashed_keys(self, index: int) -> tuple[tuple[str, ...], ...] | None:
        """What goes into the hash of block `index`: tagged, the salt only in block 0 (the chain carries it on)."""
        keys: list[tuple[str, ...]] = []
        if self.lora_name is not None:
            keys.append(("lora", self.lora_name, self.lora_path))
        if self.cache_salt is not None and index == 0:
            keys.append(("cache_salt", self.cache_salt))
        return tuple(keys) or None

    def event_keys(self, index: int) -> list[str] | None:
        """The same keys as events carry them: untagged."""
        keys = [] if self.lora_name is None else [self.lora_name]
        if self.cache_salt is not None and index == 0:
            keys.append(self.cache_salt)
        return keys or None


def root_hash(seed: str) -> bytes:
    """The parent of every first block. vLLM since 0.29 uses the seed "vllm-none-hash"; before, it is random."""
    return _digest(seed)


def block_hash(parent: bytes, tokens: tuple[int, ...], keys: tuple[tuple[str, ...], ...] | None) -> bytes:
    """`sha256(pickle((parent, tokens, keys)))`, vLLM's default algorithm "sha256"."""
    return _digest((parent, tokens, keys))


def _digest(value: object) -> bytes:
    return hashlib.sha256(pickle.dumps(value, protocol=_PICKLE_PROTOCOL)).digest()
