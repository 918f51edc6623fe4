"""Bit sets for what a slot holds of an edge beyond its first gap. Bits are numbered by run offset.

Engines evict tails first, so these are rare; offsets of the run (not of the edge) let splits and merges copy words.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from kvrouter_grpc.core.memory cimport Meter, release, resize


cdef extern from * nogil:
    int __builtin_popcountll(unsigned long long)
    int __builtin_ctzll(unsigned long long)
    int __builtin_clzll(unsigned long long)


cdef struct Holes:
    uint32_t first  # run offset of bit 0, a multiple of 64
    uint32_t words  # they follow this header
    uint32_t count  # bits that are set
    uint32_t padding


cdef inline uint64_t* _bits(const Holes* holes) noexcept nogil:
    return <uint64_t*>(holes + 1)


cdef inline size_t holes_size(const Holes* holes) noexcept nogil:
    return sizeof(Holes) + holes.words * sizeof(uint64_t)


cdef inline Holes* holes_fit(Meter* meter, Holes* holes, uint32_t low, uint32_t high) noexcept nogil:
    """A set (new when `holes` is NULL) with room for offsets [low, high); NULL: no memory, the old one is whole."""
    cdef uint32_t first = low & ~<uint32_t>63 if holes == NULL else holes.first
    cdef uint32_t old = 0 if holes == NULL else holes.words
    cdef uint32_t words = (high - first + 63) >> 6
    cdef Holes* fitted
    if words <= old:
        return holes
    fitted = <Holes*>resize(
        meter,
        holes,
        0 if holes == NULL else holes_size(holes),
        sizeof(Holes) + words * sizeof(uint64_t),
    )
    if fitted == NULL:
        return NULL
    if holes == NULL:
        fitted.first = first
        fitted.count = 0
        fitted.padding = 0
    fitted.words = words
    memset(_bits(fitted) + old, 0, (words - old) * sizeof(uint64_t))
    return fitted


cdef inline void holes_free(Meter* meter, Holes* holes) noexcept nogil:
    if holes != NULL:
        release(meter, holes, holes_size(holes))


cdef inline bint holes_test(const Holes* holes, uint32_t offset) noexcept nogil:
    cdef uint32_t bit = offset - holes.first
    return (bit >> 6) < holes.words and (_bits(holes)[bit >> 6] >> (bit & 63)) & 1


cdef inline void holes_set(Holes* holes, uint32_t offset) noexcept nogil:
    """Sets a bit that is clear, in room made by `holes_fit`."""
    cdef uint32_t bit = offset - holes.first
    _bits(holes)[bit >> 6] |= <uint64_t>1 << (bit & 63)
    holes.count += 1


cdef inline void holes_clear(Holes* holes, uint32_t offset) noexcept nogil:
    """Clears a bit that is set."""
    cdef uint32_t bit = offset - holes.first
    _bits(holes)[bit >> 6] &= ~(<uint64_t>1 << (bit & 63))
    holes.count -= 1


cdef inline uint64_t _window(const Holes* holes, uint32_t word, uint32_t low, uint32_t high) noexcept nogil:
    # The mask of those bits of one word whose offsets lie in [low, high).
    cdef uint32_t base = holes.first + (word << 6)
    cdef uint64_t mask = ~<uint64_t>0
    if high <= base or low >= base + 64:
        return 0
    if low > base:
        mask &= ~<uint64_t>0 << (low - base)
    if high < base + 64:
        mask &= ~<uint64_t>0 >> (base + 64 - high)
    return mask


cdef inline void holes_set_range(Holes* holes, uint32_t low, uint32_t high) noexcept nogil:
    """Sets the bits of [low, high), all of them clear, in room made by `holes_fit`."""
    cdef uint32_t word
    if low >= high:
        return
    for word in range((low - holes.first) >> 6, ((high - 1 - holes.first) >> 6) + 1):
        _bits(holes)[word] |= _window(holes, word, low, high)
    holes.count += high - low


cdef inline void holes_move(Holes* target, Holes* source, uint32_t low, uint32_t high) noexcept nogil:
    """Moves the bits of [low, high) from one set to another that has room for them; target NULL: drops them."""
    cdef int64_t shift = 0 if target == NULL else (<int64_t>source.first - <int64_t>target.first) // 64
    cdef uint32_t word
    cdef uint64_t moved
    cdef uint32_t count
    for word in range(source.words):
        moved = _bits(source)[word] & _window(source, word, low, high)
        if moved == 0:
            continue
        count = <uint32_t>__builtin_popcountll(moved)
        _bits(source)[word] &= ~moved
        source.count -= count
        if target != NULL:
            # Both begin at multiples of 64, so a word stays a word.
            _bits(target)[word + shift] |= moved
            target.count += count


cdef inline bint holes_any(const Holes* holes, uint32_t low, uint32_t high) noexcept nogil:
    cdef uint32_t word
    for word in range(holes.words):
        if _bits(holes)[word] & _window(holes, word, low, high):
            return True
    return False


cdef inline uint32_t holes_span(const Holes* holes, uint32_t offset) noexcept nogil:
    """How many bits from `offset` on are set without a gap."""
    cdef uint32_t bit = offset - holes.first
    cdef uint32_t begin = bit
    cdef uint64_t clear
    while (bit >> 6) < holes.words:
        clear = ~_bits(holes)[bit >> 6] >> (bit & 63)
        if clear != 0:
            return bit + <uint32_t>__builtin_ctzll(clear) - begin
        bit = (bit | 63) + 1
    return bit - begin


cdef inline uint32_t holes_span_back(const Holes* holes, uint32_t offset) noexcept nogil:
    """How many bits right before `offset` are set without a gap."""
    cdef uint32_t bit = offset - holes.first
    cdef uint32_t begin = bit
    cdef uint32_t last
    cdef uint64_t clear
    if bit > holes.words << 6:
        return 0
    while bit != 0:
        last = bit - 1
        clear = ~_bits(holes)[last >> 6] << (63 - (last & 63))
        if clear != 0:
            return begin - bit + <uint32_t>__builtin_clzll(clear)
        bit = last & ~<uint32_t>63
    return begin


cdef inline uint32_t holes_below(const Holes* holes, uint32_t offset) noexcept nogil:
    """The offset after the highest set bit below `offset`; 0 when none is set there."""
    cdef uint32_t bit = offset - holes.first
    cdef uint32_t last
    cdef uint64_t bits
    if bit > holes.words << 6:
        bit = holes.words << 6
    while bit != 0:
        last = bit - 1
        bits = _bits(holes)[last >> 6] << (63 - (last & 63))
        if bits != 0:
            return holes.first + bit - <uint32_t>__builtin_clzll(bits)
        bit = last & ~<uint32_t>63
    return 0


cdef inline uint32_t holes_top(const Holes* holes) noexcept nogil:
    """The offset after the highest set bit; 0 when none is set."""
    return holes_below(holes, holes.first + (holes.words << 6))
