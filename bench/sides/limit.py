"""Side: the physical limit of hashing, in C (`limit.c`)."""

import ctypes
from array import array

from bench import work
from bench.side import serve
from bench.sides.native import library

SEED = 1337

_limit_hash = library("limit").limit_hash
_limit_hash.restype = ctypes.c_double
_limit_hash.argtypes = [
    ctypes.c_void_p,  # tokens
    ctypes.c_size_t,  # blocks
    ctypes.c_uint64,  # seed
    *[ctypes.c_size_t] * 2,  # batches, repeats
    ctypes.c_void_p,  # out
]


def hash_prompt(tokens: int, batches: int, repeats: int) -> float:
    """Microseconds per prompt: every block hashed, every hash chained to the one before."""
    return _hash(tokens, batches, repeats)[0]


def hashes(tokens: int) -> list[int]:
    """What is computed: the sequence hashes, to see that it is the same work."""
    return _hash(tokens, 1, 1)[1].tolist()


def _hash(tokens: int, batches: int, repeats: int) -> "tuple[float, array[int]]":
    prompt = work.prompt(tokens)
    blocks = tokens // work.BLOCK
    out = array("Q", bytes(8 * blocks))
    where = prompt.buffer_info()[0]
    taken: float = _limit_hash(where, blocks, SEED, batches, repeats, out.buffer_info()[0])
    return taken / 1000, out


if __name__ == "__main__":
    serve([hash_prompt, hashes])
