"""An open-addressing table u64 -> u64: linear probing, no tombstones, capacities that are not powers of two.

A value of 0 marks an empty entry, so callers store values other than 0. The same key may be put more than once:
`table_find` and `table_next` then walk all of its entries.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from kvrouter_grpc.core.memory cimport Meter, release, resize


cdef extern from "xxhash.h" nogil:
    uint64_t XXH3_mul128_fold64(uint64_t a, uint64_t b)


cdef extern from * nogil:
    """
    /* Brings a line into the processor's caches. GCC takes a function that does nothing but prefetch for one without an
     * effect, and leaves out its calls: the empty statement is an effect, and costs nothing. */
    static inline void kvrouter_fetch(const void* address) {
        __builtin_prefetch(address);
        __asm__ volatile("");
    }
    """
    void fetch "kvrouter_fetch"(const void* address)


cdef struct Entry:
    uint64_t key
    uint64_t value


cdef struct Table:
    Entry* entries
    uint64_t salt  # secret: whoever chooses the keys must not be able to choose the collisions
    uint32_t capacity
    uint32_t count


cdef enum:
    SMALLEST_CAPACITY = 8
    LINE = 64  # bytes of a line of the processor's caches


cdef inline void table_init(Table* table, uint64_t salt) noexcept nogil:
    table.entries = NULL
    table.salt = salt
    table.capacity = 0
    table.count = 0


cdef inline void table_free(Meter* meter, Table* table) noexcept nogil:
    release(meter, table.entries, table.capacity * sizeof(Entry))
    table_init(table, table.salt)


cdef inline uint32_t _home(const Table* table, uint64_t key) noexcept nogil:
    cdef uint64_t mixed = XXH3_mul128_fold64(key ^ table.salt, table.salt | 1)
    return <uint32_t>(((mixed >> 32) * table.capacity) >> 32)


cdef inline void table_prefetch(const Table* table, uint64_t key) noexcept nogil:
    # The line where the search begins and the one behind it, where most searches end.
    cdef const char* line
    if table.capacity != 0:
        line = <const char*>&table.entries[_home(table, key)]
        fetch(line)
        fetch(line + LINE)


cdef inline Entry* _probe(const Table* table, uint32_t at, uint64_t key) noexcept nogil:
    cdef Entry* entry
    while True:
        entry = &table.entries[at]
        if entry.value == 0:
            return NULL
        if entry.key == key:
            return entry
        at += 1
        if at == table.capacity:
            at = 0


cdef inline Entry* table_find(const Table* table, uint64_t key) noexcept nogil:
    """The first entry of a key, or NULL. Valid until the next put, delete, reserve or shrink."""
    if table.count == 0:
        return NULL
    return _probe(table, _home(table, key), key)


cdef inline Entry* table_next(const Table* table, const Entry* entry) noexcept nogil:
    """The next entry with the key of `entry`, or NULL."""
    cdef uint32_t at = <uint32_t>(entry - table.entries) + 1
    return _probe(table, 0 if at == table.capacity else at, entry.key)


cdef inline Entry* table_seek(const Table* table, uint64_t key) noexcept nogil:
    """The first entry of a key, or the vacant one (value 0) for `table_fill`; in a table with room for one more."""
    cdef uint32_t at = _home(table, key)
    while table.entries[at].value != 0 and table.entries[at].key != key:
        at += 1
        if at == table.capacity:
            at = 0
    return &table.entries[at]


cdef inline void table_fill(Table* table, Entry* vacant, uint64_t key, uint64_t value) noexcept nogil:
    """Puts a key that the table lacks where `table_seek` looked for it last."""
    vacant.key = key
    vacant.value = value
    table.count += 1


cdef inline Entry* _place(Table* table, uint64_t key, uint64_t value) noexcept nogil:
    cdef uint32_t at = _home(table, key)
    while table.entries[at].value != 0:
        at += 1
        if at == table.capacity:
            at = 0
    table.entries[at].key = key
    table.entries[at].value = value
    return &table.entries[at]


cdef inline int _rehash(Meter* meter, Table* table, uint64_t capacity) noexcept nogil:
    cdef Table fresh
    cdef uint32_t i
    if capacity >> 32:
        return -1
    table_init(&fresh, table.salt)
    fresh.entries = <Entry*>resize(meter, NULL, 0, capacity * sizeof(Entry))
    if fresh.entries == NULL:
        return -1
    memset(fresh.entries, 0, capacity * sizeof(Entry))
    fresh.capacity = <uint32_t>capacity
    fresh.count = table.count
    for i in range(table.capacity):
        if table.entries[i].value != 0:
            _place(&fresh, table.entries[i].key, table.entries[i].value)
    release(meter, table.entries, table.capacity * sizeof(Entry))
    table[0] = fresh
    return 0


cdef inline int table_reserve(Meter* meter, Table* table, uint64_t extra) noexcept nogil:
    """Makes room for `extra` puts; -1: no memory."""
    # Full to 13/16, growing by 3/8: between 20 and 27 bytes per entry. Doubling would cost up to 40.
    cdef uint64_t count = table.count + extra
    cdef uint64_t capacity = table.capacity
    if count * 16 <= capacity * 13:
        return 0
    capacity += (capacity >> 2) + (capacity >> 3)
    if count * 16 > capacity * 13:
        capacity = count * 16 // 13 + 1
    return _rehash(meter, table, capacity if capacity > SMALLEST_CAPACITY else SMALLEST_CAPACITY)


cdef inline Entry* table_put(Table* table, uint64_t key, uint64_t value) noexcept nogil:
    """Adds an entry, in room reserved before; equal keys stay side by side."""
    table.count += 1
    return _place(table, key, value)


cdef inline void table_delete(Table* table, Entry* entry) noexcept nogil:
    """Removes one entry and closes the hole: each follower whose way home leads over it moves up."""
    cdef uint32_t hole = <uint32_t>(entry - table.entries)
    cdef uint32_t at = hole
    cdef uint32_t home
    while True:
        at += 1
        if at == table.capacity:
            at = 0
        if table.entries[at].value == 0:
            break
        home = _home(table, table.entries[at].key)
        # The way from `home` to `at`, cyclic, leads over `hole` unless home lies in (hole, at].
        if (home <= hole or home > at) if hole < at else (home <= hole and home > at):
            table.entries[hole] = table.entries[at]
            hole = at
    table.entries[hole].value = 0
    table.count -= 1


cdef inline void table_shrink(Meter* meter, Table* table) noexcept nogil:
    """Gives memory back after removals. A table that cannot be copied now just stays large."""
    if table.count == 0:
        table_free(meter, table)
    elif table.capacity > 4 * SMALLEST_CAPACITY and table.count < table.capacity // 8 * 3:
        _rehash(meter, table, table.count * <uint64_t>8 // 5 + SMALLEST_CAPACITY)
