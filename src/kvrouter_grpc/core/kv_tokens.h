/* Token ids as MessagePack numbers, four at a time.
 *
 * A number is 1, 2, 3 or 5 bytes long, which its first byte tells: one below 128 is the number itself, 0xCC, 0xCD and 0xCE
 * stand before 1, 2 and 4 bytes. Where a number begins is known only from the one before it, so that reading one by one
 * takes as long as the chain of those look-ups. Here every one of 16 bytes is asked at once where the next number begins
 * if one begins there; to follow the answers of that vector over four numbers takes three shuffles.
 */
#ifndef KVROUTER_KV_TOKENS_H
#define KVROUTER_KV_TOKENS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <tmmintrin.h>

/* The number of `size` bytes that begins at `data`, of which 8 bytes can be read. */
static inline uint32_t kv_number(const uint8_t *data, unsigned size) {
    static const uint32_t masks[] = {0, 0x7F, 0xFF, 0xFFFF, 0, 0xFFFFFFFF};
    uint64_t word;
    memcpy(&word, data, 8);
    return (uint32_t)(__builtin_bswap64(word) >> (64 - 8 * size)) & masks[size];
}

__attribute__((target("ssse3")))
static size_t kv_read_fours(const uint8_t **cursor, const uint8_t *end, uint32_t *out, size_t count) {
    const __m128i behind = _mm_setr_epi8(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
    const uint8_t *at = *cursor;
    size_t done = 0;
    for (; count - done >= 4 && end - at >= 24; done += 4) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)at);
        const __m128i one = _mm_cmpeq_epi8(bytes, _mm_set1_epi8((char)0xCC));
        const __m128i two = _mm_cmpeq_epi8(bytes, _mm_set1_epi8((char)0xCD));
        const __m128i four = _mm_cmpeq_epi8(bytes, _mm_set1_epi8((char)0xCE));
        const __m128i more = _mm_add_epi8(_mm_add_epi8(one, _mm_add_epi8(two, two)), _mm_and_si128(four, _mm_set1_epi8(-4)));
        /* By place: where the next number begins, and the one after it. Lane 0 follows them on from here. */
        const __m128i next = _mm_sub_epi8(behind, more);
        const __m128i second = _mm_shuffle_epi8(next, next);
        const __m128i third = _mm_shuffle_epi8(next, second);
        const __m128i fourth = _mm_shuffle_epi8(second, second);
        const uint32_t ends = (uint32_t)_mm_cvtsi128_si32(
            _mm_unpacklo_epi16(_mm_unpacklo_epi8(next, second), _mm_unpacklo_epi8(third, fourth)));
        const unsigned a = ends & 0xFF, b = ends >> 8 & 0xFF, c = ends >> 16 & 0xFF, d = ends >> 24;
        const uint32_t odd = (uint32_t)_mm_movemask_epi8(bytes) &
            ~(uint32_t)_mm_movemask_epi8(_mm_or_si128(_mm_or_si128(one, two), four));
        if (odd & (1u | 1u << a | 1u << b | 1u << c)) break; /* a number of another kind, or none */
        out[done] = kv_number(at, a);
        out[done + 1] = kv_number(at + a, b - a);
        out[done + 2] = kv_number(at + b, c - b);
        out[done + 3] = kv_number(at + c, d - c);
        at += d;
    }
    *cursor = at;
    return done;
}

/* Reads numbers while they come by fours, each below 2^32, in its shortest form or a longer unsigned one; how many. */
static inline size_t kv_fours(const uint8_t **cursor, const uint8_t *end, uint32_t *out, size_t count) {
    return __builtin_cpu_supports("ssse3") ? kv_read_fours(cursor, end, out, count) : 0;
}

#else

static inline size_t kv_fours(const uint8_t **cursor, const uint8_t *end, uint32_t *out, size_t count) {
    (void)cursor, (void)end, (void)out, (void)count;
    return 0;
}

#endif
#endif
