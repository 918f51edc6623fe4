"""Block and sequence hashes for other extension modules, without Python objects."""

from libc.stdint cimport uint32_t, uint64_t


cdef extern from "xxhash.h" nogil:
    enum:
        XXH3_SECRET_DEFAULT_SIZE
        XXH3_MIDSIZE_MAX
    uint64_t XXH3_64bits_withSeed(const void* data, size_t size, uint64_t seed)
    uint64_t XXH3_64bits_withSecretandSeed(
        const void* data, size_t size, const void* secret, size_t secret_size, uint64_t seed
    )
    void XXH3_generateSecret_fromSeed(void* secret, uint64_t seed)


cdef enum:
    BASE_SEED = 1337
    LARGEST_BLOCK = 1 << 20  # tokens


cdef inline void local_hashes(
    const void* tokens, size_t blocks, size_t block_size, uint64_t seed, uint64_t* out
) noexcept nogil:
    """Hashes `blocks` times `block_size` u32 tokens, each block by itself, into out[0:blocks]."""
    cdef const unsigned char* data = <const unsigned char*>tokens
    cdef size_t size = block_size * sizeof(uint32_t)
    cdef unsigned char secret[XXH3_SECRET_DEFAULT_SIZE]
    cdef size_t i
    if size <= XXH3_MIDSIZE_MAX:
        for i in range(blocks):
            out[i] = XXH3_64bits_withSeed(data + i * size, size, seed)
    else:
        # Long inputs are hashed with a secret made from the seed: make it once, not once per block.
        XXH3_generateSecret_fromSeed(secret, seed)
        for i in range(blocks):
            out[i] = XXH3_64bits_withSecretandSeed(data + i * size, size, secret, sizeof(secret), seed)


cdef inline void chain_hashes(uint64_t* hashes, size_t blocks, const uint64_t* parent) noexcept nogil:
    """Turns local hashes into sequence hashes in place; `parent` (NULL: none) is the sequence hash before."""
    cdef uint64_t pair[2]
    cdef size_t i
    if blocks == 0:
        return
    if parent == NULL:
        pair[0] = hashes[0]
    else:
        pair[0] = parent[0]
        pair[1] = hashes[0]
        pair[0] = hashes[0] = XXH3_64bits_withSeed(pair, sizeof(pair), BASE_SEED)
    for i in range(1, blocks):
        pair[1] = hashes[i]
        pair[0] = hashes[i] = XXH3_64bits_withSeed(pair, sizeof(pair), BASE_SEED)


cdef inline void _chained(
    const unsigned char* data, size_t blocks, size_t size, uint64_t seed, const uint64_t* parent, uint64_t* out
) noexcept nogil:
    # The chain waits for one hash after the other; the local hash of the next block fills that time.
    cdef uint64_t pair[2]
    cdef uint64_t before
    cdef size_t i
    if blocks == 0:
        return
    before = out[0] = XXH3_64bits_withSeed(data, size, seed)
    if parent != NULL:
        pair[0] = parent[0]
        pair[1] = before
        before = out[0] = XXH3_64bits_withSeed(pair, sizeof(pair), BASE_SEED)
    for i in range(1, blocks):
        pair[0] = before
        pair[1] = XXH3_64bits_withSeed(data + i * size, size, seed)
        before = out[i] = XXH3_64bits_withSeed(pair, sizeof(pair), BASE_SEED)


cdef inline void sequence_run(
    const void* tokens, size_t blocks, size_t block_size, uint64_t seed, const uint64_t* parent, uint64_t* out
) noexcept nogil:
    """`local_hashes` and `chain_hashes` in one pass."""
    cdef const unsigned char* data = <const unsigned char*>tokens
    if block_size == 16:
        _chained(data, blocks, 64, seed, parent, out)  # a constant size: the hash of the usual block is inlined
    elif block_size * sizeof(uint32_t) <= XXH3_MIDSIZE_MAX:
        _chained(data, blocks, block_size * sizeof(uint32_t), seed, parent, out)
    else:
        local_hashes(tokens, blocks, block_size, seed, out)
        chain_hashes(out, blocks, parent)


cdef int rehash_multimodal(
    const void* tokens, size_t blocks, size_t block_size, uint64_t seed, object mm_hashes, uint64_t* out
) except -1


cdef uint64_t as_u64(str name, value) except? 0
