"""Stored blocks of one target whose parent is not known yet.

A parent goes missing when its own store was lost. Rooting the children would be a false match, dropping them would lose
them and all that follows: so their events wait here as they came, bounded, oldest out first.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

from kvrouter_grpc.core.hash_table cimport (
    Entry,
    Table,
    table_delete,
    table_find,
    table_free,
    table_init,
    table_put,
    table_reserve,
    table_shrink,
)
from kvrouter_grpc.core.memory cimport Meter, release, resize
from kvrouter_grpc.core.msgpack cimport Span


cdef enum:
    # A full cache of one rank is of this order; more would be a leak, not a gap.
    MOST_ORPHANS = 1 << 16  # blocks
    MOST_ORPHAN_BYTES = 64 << 20
    REMOVED_SHIFT = 32


# One event; its engine hashes and its bytes follow this header.
cdef struct Orphan:
    Orphan* older
    Orphan* newer
    Orphan* next  # the next of the same parent, in a ring; when adopted: the next to be stored
    uint64_t parent
    uint64_t size  # of the event's bytes
    uint32_t count
    uint32_t lane  # KV cache group and tier: engine hashes of two lanes are two blocks


cdef struct Lot:
    Meter meter
    Table byparent  # parent -> the newest orphan below it, whose `next` is the oldest
    Table* parked  # by lane: engine hash -> removals noted << 32 | copies parked
    uint32_t lanes
    Orphan* oldest
    Orphan* newest
    uint64_t blocks
    uint64_t bytes
    uint64_t adopted  # blocks whose parent appeared
    uint64_t dropped  # blocks given up for lack of room


cdef inline void lot_init(Lot* lot, uint64_t salt) noexcept nogil:
    memset(lot, 0, sizeof(Lot))
    table_init(&lot.byparent, salt)


cdef inline int _lane_reserve(Lot* lot, uint32_t lane) noexcept nogil:
    # Makes sure that there is a table for a lane; -1: no memory.
    cdef Table* parked
    if lane < lot.lanes:
        return 0
    parked = <Table*>resize(&lot.meter, lot.parked, lot.lanes * sizeof(Table), (lane + 1) * sizeof(Table))
    if parked == NULL:
        return -1
    lot.parked = parked
    while lot.lanes <= lane:
        table_init(&lot.parked[lot.lanes], lot.byparent.salt)
        lot.lanes += 1
    return 0


cdef inline uint64_t* orphan_names(Orphan* orphan) noexcept nogil:
    return <uint64_t*>(orphan + 1)


cdef inline Span orphan_event(Orphan* orphan) noexcept nogil:
    cdef Span span
    span.data = <const unsigned char*>(orphan_names(orphan) + orphan.count)
    span.size = orphan.size
    return span


cdef inline size_t _orphan_size(uint32_t count, uint64_t size) noexcept nogil:
    return sizeof(Orphan) + count * sizeof(uint64_t) + size


cdef inline void orphan_free(Lot* lot, Orphan* orphan) noexcept nogil:
    release(&lot.meter, orphan, _orphan_size(orphan.count, orphan.size))


cdef inline bint lot_release(Lot* lot, uint32_t lane, uint64_t name) noexcept nogil:
    """One copy of a hash is parked no longer; whether a removal was noted for it, which is forgotten with it."""
    cdef Table* parked = &lot.parked[lane]
    cdef Entry* entry = table_find(parked, name)
    cdef bint removed = entry.value >> REMOVED_SHIFT != 0
    entry.value -= 1
    if removed:
        entry.value -= <uint64_t>1 << REMOVED_SHIFT
    if entry.value == 0:
        table_delete(parked, entry)
        table_shrink(&lot.meter, parked)
    return removed


cdef inline void _unlink(Lot* lot, Orphan* orphan) noexcept nogil:
    if orphan.older == NULL:
        lot.oldest = orphan.newer
    else:
        orphan.older.newer = orphan.newer
    if orphan.newer == NULL:
        lot.newest = orphan.older
    else:
        orphan.newer.older = orphan.older
    lot.blocks -= orphan.count
    lot.bytes -= _orphan_size(orphan.count, orphan.size)


cdef inline Orphan* lot_adopt(Lot* lot, uint64_t parent) noexcept nogil:
    """Hands out the oldest event that continues from `parent`; NULL: there is none.

    The caller stores it, calls `lot_release` for each of its hashes, and frees it; or links it again.
    """
    cdef Entry* entry = table_find(&lot.byparent, parent)
    cdef Orphan* newest
    cdef Orphan* orphan
    if entry == NULL:
        return NULL
    newest = <Orphan*>entry.value
    orphan = newest.next
    if orphan == newest:
        table_delete(&lot.byparent, entry)
        table_shrink(&lot.meter, &lot.byparent)
    else:
        newest.next = orphan.next
    _unlink(lot, orphan)
    return orphan


cdef inline void _drop_oldest(Lot* lot) noexcept nogil:
    # The oldest of all is the oldest below its parent.
    cdef Orphan* orphan = lot_adopt(lot, lot.oldest.parent)
    cdef uint32_t i
    for i in range(orphan.count):
        lot_release(lot, orphan.lane, orphan_names(orphan)[i])
    lot.dropped += orphan.count
    orphan_free(lot, orphan)


cdef inline int lot_link(Lot* lot, Orphan* orphan) noexcept nogil:
    """Puts an orphan, as the newest, below its parent; -1: no memory, nothing changed."""
    cdef Entry* entry = table_find(&lot.byparent, orphan.parent)
    if entry == NULL:
        if table_reserve(&lot.meter, &lot.byparent, 1):
            return -1
        orphan.next = orphan
        table_put(&lot.byparent, orphan.parent, <uint64_t>orphan)
    else:
        orphan.next = (<Orphan*>entry.value).next
        (<Orphan*>entry.value).next = orphan
        entry.value = <uint64_t>orphan
    orphan.newer = NULL
    orphan.older = lot.newest
    if lot.newest == NULL:
        lot.oldest = orphan
    else:
        lot.newest.newer = orphan
    lot.newest = orphan
    lot.blocks += orphan.count
    lot.bytes += _orphan_size(orphan.count, orphan.size)
    return 0


cdef inline int lot_park(
    Lot* lot, uint64_t parent, uint32_t lane, const uint64_t* names, uint32_t count, Span event
) noexcept nogil:
    """Keeps a stored event until its parent appears; -1: no memory, nothing changed."""
    cdef Orphan* orphan
    cdef Entry* entry
    cdef uint32_t i
    if _lane_reserve(lot, lane) or table_reserve(&lot.meter, &lot.parked[lane], count):
        return -1
    orphan = <Orphan*>resize(&lot.meter, NULL, 0, _orphan_size(count, event.size))
    if orphan == NULL:
        return -1
    orphan.parent = parent
    orphan.count = count
    orphan.lane = lane
    orphan.size = event.size
    memcpy(orphan_names(orphan), names, count * sizeof(uint64_t))
    memcpy(<void*>orphan_event(orphan).data, event.data, event.size)
    if lot_link(lot, orphan):
        orphan_free(lot, orphan)
        return -1
    for i in range(count):
        entry = table_find(&lot.parked[lane], names[i])
        if entry == NULL:
            table_put(&lot.parked[lane], names[i], 1)
        else:
            entry.value += 1
    while lot.blocks > MOST_ORPHANS or lot.bytes > MOST_ORPHAN_BYTES:
        _drop_oldest(lot)
    return 0


cdef inline bint lot_remove(Lot* lot, uint32_t lane, uint64_t name) noexcept nogil:
    """Notes that a parked block was removed; False when no copy is left that it could mean."""
    cdef Entry* entry = table_find(&lot.parked[lane], name) if lane < lot.lanes else NULL
    if entry == NULL or entry.value >> REMOVED_SHIFT >= <uint32_t>entry.value:
        return False
    entry.value += <uint64_t>1 << REMOVED_SHIFT
    return True


cdef inline void lot_clear(Lot* lot) noexcept nogil:
    """Forgets everything: the rank's cache is gone."""
    cdef Orphan* orphan = lot.oldest
    cdef Orphan* newer
    cdef uint32_t lane
    while orphan != NULL:
        newer = orphan.newer
        orphan_free(lot, orphan)
        orphan = newer
    table_free(&lot.meter, &lot.byparent)
    for lane in range(lot.lanes):
        table_free(&lot.meter, &lot.parked[lane])
    release(&lot.meter, lot.parked, lot.lanes * sizeof(Table))
    lot.parked = NULL
    lot.lanes = 0
    lot.oldest = lot.newest = NULL
    lot.blocks = lot.bytes = 0


cdef inline Orphan* lot_gather(Lot* lot, const uint64_t* names, uint32_t count, Orphan* pending) noexcept nogil:
    """Takes out what continues from these blocks, in front of what is pending already."""
    cdef Orphan* orphan
    cdef uint32_t i
    for i in range(count):
        orphan = lot_adopt(lot, names[i])
        while orphan != NULL:
            orphan.next = pending
            pending = orphan
            orphan = lot_adopt(lot, names[i])
    return pending
