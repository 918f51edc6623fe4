"""Taking back whole paths: what `slot_remove` does, for blocks that were stored together and go together."""

from libc.stdint cimport uint32_t, uint64_t

from kvrouter_grpc.core.edge cimport Edge, cover_find, cover_release, cover_room
from kvrouter_grpc.core.hash_table cimport Entry, table_delete, table_find, table_prefetch, table_shrink
from kvrouter_grpc.core.run cimport OFFSET_BITS
from kvrouter_grpc.core.slot cimport AHEAD, MOST_REFERENCES, _drop_alias, named_place, place_edge
from kvrouter_grpc.core.tree cimport Slot, Tree, tree_settle


cdef inline bint _is_on(const Edge* edge, uint64_t place) noexcept nogil:
    # Whether the edge shows this place.
    cdef uint32_t offset = <uint32_t>(place & ((<uint64_t>1 << OFFSET_BITS) - 1))
    return edge.run.identity == place >> OFFSET_BITS and edge.start <= offset < edge.start + edge.length


cdef inline int _forget_in(Tree* tree, uint32_t slot_id, Entry* entry, Edge** edge, uint32_t* at) noexcept nogil:
    # As `slot_remove` does it for one block, but the edge, and the index of the slot's cover in it, are kept for the next block: they are
    # settled when another edge comes. -1: no memory, nothing changed.
    cdef Slot* slot = &tree.slots[slot_id]
    cdef uint64_t place = named_place(entry)
    cdef uint32_t block = 0
    if not _drop_alias(tree, slot, place):
        if edge[0] == NULL or not _is_on(edge[0], place):
            if edge[0] != NULL:
                tree_settle(tree, edge[0], slot_id)
            edge[0] = place_edge(tree, place, &block)
            at[0] = <uint32_t>cover_find(edge[0], slot_id)
        block = <uint32_t>(place & ((<uint64_t>1 << OFFSET_BITS) - 1)) - edge[0].start
        if block + 1 < edge[0].covers[at[0]].held and cover_room(&tree.meter, edge[0], at[0]):
            return -1
        cover_release(edge[0], at[0], block)
    table_delete(&slot.names, entry)
    return 0


cdef inline int slot_remove_path(Tree* tree, uint32_t slot_id, const uint64_t* names, size_t count) noexcept nogil:
    """Takes one reference from each engine hash of a path, the last one first; unknown ones are ignored.

    For paths that were stored as a whole: no gap is left on the way, and an edge is settled once, not once per block.

    Returns:
        0, or -1 without memory: then the end of the path is removed, and all books agree. Only gaps take memory.
    """
    cdef Slot* slot = &tree.slots[slot_id]
    cdef uint32_t at = 0
    cdef int failed = 0
    cdef size_t i
    cdef Entry* entry
    cdef Edge* edge = NULL
    for i in reversed(range(count)):
        if i >= AHEAD:
            table_prefetch(&slot.names, names[i - AHEAD])
        entry = table_find(&slot.names, names[i])
        if entry == NULL:
            continue
        if entry.value & MOST_REFERENCES > 1:
            entry.value -= 1
        elif _forget_in(tree, slot_id, entry, &edge, &at):
            failed = -1
            break
    if edge != NULL:
        tree_settle(tree, edge, slot_id)
    table_shrink(&tree.meter, &slot.names)
    return failed


cdef inline size_t path_unshared(const Slot* slot, const uint64_t* names, size_t count) noexcept nogil:
    """How many blocks at the end of a path nobody else refers to.

    Of paths that all begin at the root, a block has at least as many references as those behind it: the first one
    with a single reference is found by halves.
    """
    cdef size_t low = 0
    cdef size_t high = count
    cdef size_t middle
    cdef const Entry* entry
    while low < high:
        middle = low + (high - low) // 2
        entry = table_find(&slot.names, names[middle])
        if entry != NULL and entry.value & MOST_REFERENCES > 1:
            low = middle + 1
        else:
            high = middle
    return count - low
