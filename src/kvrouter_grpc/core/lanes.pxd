"""The lanes of one engine: where each of its KV cache groups keeps its blocks in each tier; see cache_group.pxd."""

from libc.stdint cimport int32_t, uint32_t, uint64_t

from kvrouter_grpc.core.cache_group cimport UNPLACED, CacheGroup, group_init
from kvrouter_grpc.core.edge cimport Edge
from kvrouter_grpc.core.hash_table cimport Entry, table_find, table_prefetch
from kvrouter_grpc.core.kv_fields cimport Event
from kvrouter_grpc.core.kv_words cimport KV_TIERS
from kvrouter_grpc.core.memory cimport Meter, release, resize
from kvrouter_grpc.core.slot cimport named_place, place_edge, slot_clear, slot_foresee, slot_remove
from kvrouter_grpc.core.stack cimport Stack
from kvrouter_grpc.core.tree cimport Slot, Tree
from kvrouter_grpc.core.wide cimport wide_remove


cdef struct Lanes:
    CacheGroup* groups  # by their index
    uint32_t group_count  # more than one: the model is a hybrid


cdef inline int lanes_grow(Lanes* lanes, Meter* meter, uint32_t group_count) noexcept nogil:
    """Makes room for this many groups at least; -1: no memory."""
    cdef CacheGroup* groups
    if group_count <= lanes.group_count:
        return 0
    groups = <CacheGroup*>resize(
        meter, lanes.groups, lanes.group_count * sizeof(CacheGroup), group_count * sizeof(CacheGroup)
    )
    if groups == NULL:
        return -1
    lanes.groups = groups
    while lanes.group_count < group_count:
        group_init(&lanes.groups[lanes.group_count])
        lanes.group_count += 1
    return 0


cdef inline void lanes_free(Lanes* lanes, Meter* meter) noexcept nogil:
    release(meter, lanes.groups, lanes.group_count * sizeof(CacheGroup))
    lanes.groups = NULL
    lanes.group_count = 0


cdef inline int32_t lanes_slot(const Lanes* lanes, uint32_t lane) noexcept nogil:
    """The slot of a lane; UNPLACED: it has none yet."""
    return lanes.groups[lane // KV_TIERS].slots[lane % KV_TIERS]


cdef inline void lanes_forget(const Lanes* lanes, Tree* tree, uint32_t group) noexcept nogil:
    """Drops all that a group holds."""
    cdef uint32_t tier
    for tier in range(<uint32_t>KV_TIERS):
        if lanes.groups[group].slots[tier] != UNPLACED:
            slot_clear(tree, <uint32_t>lanes.groups[group].slots[tier])


cdef inline void lanes_foresee(
    const Lanes* lanes, const Tree* tree, const Event* event, const uint64_t* names
) noexcept nogil:
    """Starts to fetch what an event looks up first: indices are larger than the processor's caches."""
    cdef const Slot* slot
    if event.count == 0 or event.group >= lanes.group_count:
        return
    if lanes.groups[event.group].slots[event.tier] == UNPLACED:
        return
    slot = &tree.slots[lanes.groups[event.group].slots[event.tier]]
    if event.has_parent:
        table_prefetch(&slot.names, event.parent)
    slot_foresee(slot, names, event.count)


cdef inline Edge* lanes_find(
    const Lanes* lanes, Tree* tree, uint32_t lane, uint64_t name, uint32_t* block
) noexcept nogil:
    """Where a block of this name lies; NULL: nobody knows it.

    The lane itself is asked first, then all, nearest tier of the first group first.
    """
    cdef Entry* entry
    cdef uint32_t other = lane
    cdef int32_t slot
    cdef uint32_t i
    for i in range(lanes.group_count * KV_TIERS + 1):
        slot = lanes_slot(lanes, other)
        if slot != UNPLACED:
            entry = table_find(&tree.slots[slot].names, name)
            if entry != NULL:
                return place_edge(tree, named_place(entry), block)
        other = i
    return NULL


cdef inline bint lanes_holds(const Lanes* lanes, Tree* tree, uint32_t lane, uint64_t name) noexcept nogil:
    """Whether the lane itself holds a block of this name."""
    cdef int32_t slot = lanes_slot(lanes, lane)
    return slot != UNPLACED and table_find(&tree.slots[slot].names, name) != NULL


cdef inline int lanes_remove(
    const Lanes* lanes, Tree* tree, uint32_t lane, const uint64_t* names, uint32_t count, Stack* work
) noexcept nogil:
    """Takes blocks out of a lane, those of them that it has; -1: no memory."""
    cdef int32_t slot = lanes_slot(lanes, lane)
    cdef uint32_t width = lanes.groups[lane // KV_TIERS].width
    if slot == UNPLACED or count == 0:
        return 0
    if width > 1:
        return -1 if wide_remove(tree, <uint32_t>slot, width, names, count, work) < 0 else 0
    return -1 if slot_remove(tree, <uint32_t>slot, names, count) < 0 else 0
