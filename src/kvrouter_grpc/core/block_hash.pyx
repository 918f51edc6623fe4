"""Block and sequence hashes of token ids (XXH3-64).

    local      l_i = XXH3(tokens of block i, LE u32 | its multimodal hashes, ascending, LE u64; seed)
    sequence   s_0 = l_0,  s_i = XXH3(LE64 s_(i-1) | LE64 l_i; 1337)
    seed       = 1337 + XXH3(lora_name; 0) if any + XXH3(cache_salt; 1) if any, modulo 2**64

These are the public block hashes of NVIDIA Dynamo's KV router (`lib/kv-router/src/protocols.rs`,
`lib/kv-hashing/src/salt.rs`), so that indexes and tools of both can be compared. Because s_i is chained, two equal
sequence hashes mean two equal prefixes: the radix tree rests on that.
"""

import sys
from array import array

from cpython cimport array as c_array
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

if sys.byteorder != "little":  # the hash is defined over little-endian bytes and the buffers are hashed in place
    raise ImportError("kvrouter_grpc.core needs a little-endian machine")

cdef c_array.array U64 = array("Q")


def seed_for(str lora_name not None, str cache_salt not None):
    """The seed that keeps the blocks of one adapter and one tenant apart from all others; see `block_hash.pyi`."""
    cdef uint64_t seed = BASE_SEED
    cdef bytes encoded
    if lora_name:
        encoded = lora_name.encode()
        seed += XXH3_64bits_withSeed(<const char*>encoded, <size_t>len(encoded), 0)
    if cache_salt:
        encoded = cache_salt.encode()
        seed += XXH3_64bits_withSeed(<const char*>encoded, <size_t>len(encoded), 1)
    return seed


def hash_bytes(data not None, seed=0):
    """XXH3-64 of any bytes; see `block_hash.pyi`."""
    cdef const unsigned char[::1] view
    cdef size_t size
    if type(data) is bytes:  # asked for once per event message: a view would cost more than the hash
        return XXH3_64bits_withSeed(PyBytes_AS_STRING(data), <size_t>PyBytes_GET_SIZE(data), as_u64("seed", seed))
    view = data
    size = <size_t>view.shape[0]
    return XXH3_64bits_withSeed(&view[0] if size else NULL, size, as_u64("seed", seed))


def hash_blocks(const uint32_t[::1] tokens not None, block_size, seed=BASE_SEED, mm_hashes=None):
    """Local hashes of the full blocks; see `block_hash.pyi`."""
    return _hash(tokens, block_size, seed, mm_hashes, False)


def hash_sequence(const uint32_t[::1] tokens not None, block_size, seed=BASE_SEED, mm_hashes=None):
    """Sequence hashes of the full blocks; see `block_hash.pyi`."""
    return _hash(tokens, block_size, seed, mm_hashes, True)


def sequence_hashes(const uint64_t[::1] local_hashes not None):
    """Chains local hashes; see `block_hash.pyi`."""
    cdef size_t blocks = <size_t>local_hashes.shape[0]
    cdef c_array.array out = c_array.clone(U64, <Py_ssize_t>blocks, False)
    if blocks:
        memcpy(out.data.as_ulonglongs, &local_hashes[0], blocks * sizeof(uint64_t))
        chain_hashes(<uint64_t*>out.data.as_ulonglongs, blocks, NULL)
    return out


cdef c_array.array _hash(const uint32_t[::1] tokens, block_size, seed, mm_hashes, bint chained):
    cdef size_t size = _block_size(block_size)
    cdef uint64_t start = as_u64("seed", seed)
    cdef size_t blocks = <size_t>tokens.shape[0] // size
    cdef c_array.array out = c_array.clone(U64, <Py_ssize_t>blocks, False)
    cdef uint64_t* hashes = <uint64_t*>out.data.as_ulonglongs
    if blocks:
        local_hashes(&tokens[0], blocks, size, start, hashes)
        if mm_hashes:
            rehash_multimodal(&tokens[0], blocks, size, start, mm_hashes, hashes)
        if chained:
            chain_hashes(hashes, blocks, NULL)
    return out


cdef int rehash_multimodal(
    const void* tokens, size_t blocks, size_t block_size, uint64_t seed, object mm_hashes, uint64_t* out
) except -1:
    """Replaces the local hashes of those blocks that show multimodal content. Blocks beyond the last are ignored."""
    cdef size_t size = block_size * sizeof(uint32_t)
    cdef unsigned char* data
    cdef c_array.array suffix
    cdef size_t extra
    for block, values in mm_hashes.items():
        if not isinstance(block, int) or block < 0:
            raise ValueError(f"mm_hashes: block index {block!r} is not a non-negative integer")
        if <object>blocks <= block or not values:
            continue
        try:
            suffix = array("Q", sorted(values))
        except (OverflowError, TypeError) as error:
            raise ValueError(f"mm_hashes[{block}]: every hash must be an integer in 0..2**64-1") from error
        extra = <size_t>len(suffix) * sizeof(uint64_t)
        data = <unsigned char*>malloc(size + extra)
        if data == NULL:
            raise MemoryError
        memcpy(data, <const unsigned char*>tokens + <size_t>block * size, size)
        memcpy(data + size, suffix.data.as_ulonglongs, extra)
        out[<size_t>block] = XXH3_64bits_withSeed(data, size + extra, seed)
        free(data)
    return 0


cdef size_t _block_size(value) except 0:
    if not isinstance(value, int) or not 1 <= value <= LARGEST_BLOCK:
        raise ValueError(f"block_size must be an integer in 1..{LARGEST_BLOCK}, not {value!r}")
    return value


cdef uint64_t as_u64(str name, value) except? 0:
    if not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise ValueError(f"{name} must be an integer in 0..2**64-1, not {value!r}")
    return value
