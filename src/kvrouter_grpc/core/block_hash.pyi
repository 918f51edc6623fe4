from array import array
from collections.abc import Mapping, Sequence

from typing_extensions import Buffer

def seed_for(lora_name: str, cache_salt: str) -> int:
    """The seed that keeps the blocks of one adapter and one tenant apart from all others.

    Args:
        lora_name: Adapter name, "" for the base model.
        cache_salt: Tenant salt, "" for none.

    Returns:
        A u64; 1337 when both are empty.
    """

def hash_bytes(data: Buffer, seed: int = 0) -> int:
    """XXH3-64 of any C-contiguous bytes, a u64; for identifiers such as those of images and workers."""

def hash_blocks(
    tokens: Buffer,
    block_size: int,
    seed: int = 1337,
    mm_hashes: Mapping[int, Sequence[int]] | None = None,
) -> array[int]:
    """Local hashes of the full blocks of a prompt; the partial tail is dropped.

    Args:
        tokens: Token ids, a C-contiguous buffer of u32.
        block_size: Tokens per block, 1..2**20.
        seed: What `seed_for` returned.
        mm_hashes: Block index to the u64 hashes of the multimodal objects in that block, in any order. Indices
            beyond the last full block are ignored.

    Returns:
        `array("Q")` of len(tokens) // block_size hashes.

    Raises:
        ValueError: A buffer of another type, or a number out of its range.
    """

def hash_sequence(
    tokens: Buffer,
    block_size: int,
    seed: int = 1337,
    mm_hashes: Mapping[int, Sequence[int]] | None = None,
) -> array[int]:
    """Sequence hashes of the full blocks: `sequence_hashes(hash_blocks(...))` in one pass."""

def sequence_hashes(local_hashes: Buffer) -> array[int]:
    """Chains local hashes (a C-contiguous buffer of u64) into sequence hashes, `array("Q")` of the same length."""
