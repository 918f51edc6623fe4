/* The least that hashing a prompt can cost: the same XXH3 calls over the same bytes, in a plain loop. */
#include <stdint.h>
#include <stddef.h>
#include <time.h>
#define XXH_INLINE_ALL
#include "xxhash.h"

#define BLOCK 16

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Every block hashed, every hash chained to the one before, in one pass: the processor hashes ahead while the chain waits
   for its multiplications. Flattened (no calls) and of constant size, XXH3 has no branches left. */
__attribute__((flatten)) static void hash_once(const uint32_t *tokens, size_t blocks, uint64_t seed, uint64_t *out) {
    uint64_t pair[2];
    pair[0] = out[0] = XXH3_64bits_withSeed(tokens, BLOCK * sizeof(uint32_t), seed);
    for (size_t i = 1; i < blocks; i++) {
        pair[1] = XXH3_64bits_withSeed(tokens + i * BLOCK, BLOCK * sizeof(uint32_t), seed);
        pair[0] = out[i] = XXH3_64bits_withSeed(pair, sizeof pair, seed);
    }
}

/* Nanoseconds of CPU per prompt with blocks of BLOCK tokens, the best of `batches` times `repeats`. */
double limit_hash(const uint32_t *tokens, size_t blocks, uint64_t seed, size_t batches, size_t repeats, uint64_t *out) {
    uint64_t best = UINT64_MAX;
    for (size_t b = 0; b < batches; b++) {
        uint64_t start = now_ns();
        for (size_t r = 0; r < repeats; r++) {
            hash_once(tokens, blocks, seed, out);
            __asm__ volatile("" : : "r"(out) : "memory");
        }
        uint64_t taken = now_ns() - start;
        best = taken < best ? taken : best;
    }
    return (double)best / (double)repeats;
}
