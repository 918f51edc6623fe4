"""Reading MessagePack in place: a cursor that never leaves its bytes, one item at a time.

An *item* is a number, a text, or the head of a collection whose elements follow. Nothing recurses: what is nested is
skipped by counting the values still to come, so depth costs nothing. Format: the MessagePack specification,
https://github.com/msgpack/msgpack/blob/master/spec.md.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy


cdef extern from * nogil:
    uint16_t __builtin_bswap16(uint16_t)
    uint32_t __builtin_bswap32(uint32_t)
    uint64_t __builtin_bswap64(uint64_t)


cdef enum Kind:
    BROKEN  # the bytes end too early, or are no MessagePack
    NIL
    BOOLEAN
    UNSIGNED
    NEGATIVE
    REAL
    TEXT
    BINARY
    EXTENSION
    ARRAY
    MAP


cdef struct Cursor:
    const uint8_t* at
    const uint8_t* end
    bint broken  # stays: everything read from then on is BROKEN


cdef struct Span:
    const uint8_t* data
    size_t size


cdef struct Item:
    Kind kind
    uint64_t value  # integers: the 64 bits; collections: elements, or pairs; texts and bytes: their size
    double real
    const uint8_t* data  # of texts and bytes


cdef inline Cursor cursor_over(Span span) noexcept nogil:
    cdef Cursor cursor
    cursor.at = span.data
    cursor.end = span.data + span.size
    cursor.broken = False
    return cursor


cdef inline size_t cursor_left(const Cursor* cursor) noexcept nogil:
    return <size_t>(cursor.end - cursor.at)


cdef inline uint64_t big_endian(const uint8_t* data, uint32_t size) noexcept nogil:
    """A number of 1, 2, 4 or 8 bytes."""
    cdef uint16_t two
    cdef uint32_t four
    cdef uint64_t eight
    if size == 1:
        return data[0]
    if size == 2:
        memcpy(&two, data, 2)
        return __builtin_bswap16(two)
    if size == 4:
        memcpy(&four, data, 4)
        return __builtin_bswap32(four)
    memcpy(&eight, data, 8)
    return __builtin_bswap64(eight)


cdef inline Kind _broken(Cursor* cursor, Item* item) noexcept nogil:
    cursor.at = cursor.end
    cursor.broken = True
    item.kind = BROKEN
    return BROKEN


cdef inline Kind _number(Cursor* cursor, Item* item, Kind kind, uint32_t size) noexcept nogil:
    # Reads the big-endian number behind the first byte: the value of an integer, the size of all else.
    if cursor_left(cursor) < size:
        return _broken(cursor, item)
    item.kind = kind
    item.value = big_endian(cursor.at, size)
    cursor.at += size
    return kind


cdef inline Kind _signed(Cursor* cursor, Item* item, uint32_t size) noexcept nogil:
    cdef uint32_t shift = 64 - 8 * size
    if _number(cursor, item, UNSIGNED, size) == BROKEN:
        return BROKEN
    item.value = <uint64_t>(<int64_t>(item.value << shift) >> shift)
    if item.value >> 63:
        item.kind = NEGATIVE
    return item.kind


cdef inline Kind _real(Cursor* cursor, Item* item, uint32_t size) noexcept nogil:
    cdef uint32_t bits
    cdef float single
    if _number(cursor, item, REAL, size) == BROKEN:
        return BROKEN
    if size == 4:
        bits = <uint32_t>item.value
        memcpy(&single, &bits, 4)
        item.real = single
    else:
        memcpy(&item.real, &item.value, 8)
    return REAL


cdef inline Kind _bytes(Cursor* cursor, Item* item, Kind kind, uint32_t size, uint32_t type_size) noexcept nogil:
    # `size` bytes of length, then the type of an extension, then the bytes.
    if size != 0 and _number(cursor, item, kind, size) == BROKEN:
        return BROKEN
    if cursor_left(cursor) < item.value + type_size:
        return _broken(cursor, item)
    item.kind = kind
    item.data = cursor.at + type_size
    cursor.at = item.data + item.value
    return kind


cdef inline Kind item_next(Cursor* cursor, Item* item) noexcept nogil:
    """Reads one item; of a collection its head."""
    cdef uint8_t first
    if cursor.at == cursor.end:
        return _broken(cursor, item)
    first = cursor.at[0]
    cursor.at += 1
    if first < 0x80 or first >= 0xE0:
        item.kind = UNSIGNED if first < 0x80 else NEGATIVE
        item.value = first if first < 0x80 else <uint64_t><int64_t>(<int64_t>first - 256)
        return item.kind
    if first < 0xA0:
        item.kind = MAP if first < 0x90 else ARRAY
        item.value = first & 0x0F
        return item.kind
    if first < 0xC0:
        item.value = first & 0x1F
        return _bytes(cursor, item, TEXT, 0, 0)
    if first == 0xC0:
        item.kind = NIL
        return NIL
    if first == 0xC2 or first == 0xC3:
        item.kind = BOOLEAN
        return BOOLEAN
    if 0xC4 <= first <= 0xC6:
        return _bytes(cursor, item, BINARY, 1 << (first - 0xC4), 0)
    if 0xC7 <= first <= 0xC9:
        return _bytes(cursor, item, EXTENSION, 1 << (first - 0xC7), 1)
    if first == 0xCA or first == 0xCB:
        return _real(cursor, item, 4 << (first - 0xCA))
    if 0xCC <= first <= 0xCF:
        return _number(cursor, item, UNSIGNED, 1 << (first - 0xCC))
    if 0xD0 <= first <= 0xD3:
        return _signed(cursor, item, 1 << (first - 0xD0))
    if 0xD4 <= first <= 0xD8:
        item.value = 1 << (first - 0xD4)
        return _bytes(cursor, item, EXTENSION, 0, 1)
    if 0xD9 <= first <= 0xDB:
        return _bytes(cursor, item, TEXT, 1 << (first - 0xD9), 0)
    if first == 0xDC or first == 0xDD:
        return _number(cursor, item, ARRAY, 2 << (first - 0xDC))
    if first == 0xDE or first == 0xDF:
        return _number(cursor, item, MAP, 2 << (first - 0xDE))
    return _broken(cursor, item)


cdef inline void skip_values(Cursor* cursor, uint64_t count) noexcept nogil:
    """Skips `count` values with all that is nested in them."""
    cdef Item item
    # A value takes a byte at least, so a claim of more than that is broken, and the sum cannot overflow.
    while count != 0 and not cursor.broken:
        if count > cursor_left(cursor):
            _broken(cursor, &item)
            return
        count -= 1
        item_next(cursor, &item)
        if item.kind == ARRAY:
            count += item.value
        elif item.kind == MAP:
            count += 2 * item.value


cdef inline void item_skip(Cursor* cursor, const Item* item) noexcept nogil:
    """Skips the elements of an item that was read; there are none unless it is a collection."""
    if item.kind == ARRAY:
        skip_values(cursor, item.value)
    elif item.kind == MAP:
        skip_values(cursor, 2 * item.value)


cdef inline Span item_span(const Item* item) noexcept nogil:
    """The bytes of a text."""
    cdef Span span
    span.data = item.data
    span.size = item.value
    return span


cdef inline int64_t text_length(Span text) noexcept nogil:
    """Characters of a text; -1 when it is not UTF-8 (RFC 3629: no surrogates, nothing overlong)."""
    cdef size_t at = 0
    cdef int64_t length = 0
    cdef uint32_t more
    cdef uint8_t low
    cdef uint8_t high
    cdef uint8_t first
    while at < text.size:
        first = text.data[at]
        at += 1
        length += 1
        if first < 0x80:
            continue
        low, high = 0x80, 0xBF  # bounds of the second byte
        if 0xC2 <= first <= 0xDF:
            more = 1
        elif 0xE0 <= first <= 0xEF:
            more = 2
            if first == 0xE0:
                low = 0xA0
            elif first == 0xED:
                high = 0x9F
        elif 0xF0 <= first <= 0xF4:
            more = 3
            if first == 0xF0:
                low = 0x90
            elif first == 0xF4:
                high = 0x8F
        else:
            return -1
        while more != 0:
            if at == text.size or not low <= text.data[at] <= high:
                return -1
            low, high = 0x80, 0xBF
            at += 1
            more -= 1
    return length
