"""Doubt: events of a slot were lost, so of the blocks that it holds some may be gone.

From then on the engine vouches for what it still has: for a block by storing it, for all blocks above it by storing one
below them, for it computes nothing behind a prefix that it does not hold. Engines evict what was not used for the longest
time; so once they have stored as many blocks as they have room for, what they vouched for is what is left, and the rest
can be dropped (`routing/renewal.py`).
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from kvrouter_grpc.core.edge cimport Edge
from kvrouter_grpc.core.hash_table cimport Entry
from kvrouter_grpc.core.run cimport OFFSET_BITS, run_edges, run_get
from kvrouter_grpc.core.slot cimport DOUBTED, REFERENCE_BITS, named_place, slot_remove
from kvrouter_grpc.core.tree cimport Slot, Tree


cdef inline uint32_t slot_doubt(Tree* tree, uint32_t slot_id) noexcept nogil:
    """Doubts all that a slot holds; how many engine hashes that are."""
    cdef Slot* slot = &tree.slots[slot_id]
    cdef uint32_t i
    for i in range(slot.names.capacity):
        if slot.names.entries[i].value != 0:
            slot.names.entries[i].value |= DOUBTED
    return slot.names.count


cdef inline void _vouch(const Tree* tree, uint64_t place, uint32_t* vouched) noexcept nogil:
    # For a block and those above it. `vouched`: by run, how many of its first blocks are vouched for.
    cdef uint32_t run = <uint32_t>(place >> OFFSET_BITS)
    cdef uint32_t blocks = <uint32_t>(place & ((<uint64_t>1 << OFFSET_BITS) - 1)) + 1
    cdef uint32_t before
    cdef Edge* parent
    while blocks > vouched[run]:
        before = vouched[run]
        vouched[run] = blocks
        parent = run_edges(run_get(&tree.runs, run))[0].parent
        if before != 0 or parent == NULL:
            break  # what is above it is vouched for already, or is nothing
        run = parent.run.identity
        blocks = parent.start + parent.length


cdef inline int64_t slot_drop_doubted(Tree* tree, uint32_t slot_id, bint prefixes, size_t most) noexcept nogil:
    """Drops blocks that nobody has vouched for, at most so many; how many, or -1: no memory.

    Args:
        prefixes: Whether a block vouches for those above it.
    """
    cdef Slot* slot = &tree.slots[slot_id]
    cdef uint64_t place
    cdef int64_t count = 0
    cdef uint32_t i
    cdef Entry* entry
    cdef uint32_t* vouched = <uint32_t*>calloc(tree.runs.capacity + 1, sizeof(uint32_t))
    cdef uint64_t* names = <uint64_t*>calloc(most, sizeof(uint64_t))
    if vouched == NULL or names == NULL:
        count = -1
    else:
        for i in range(slot.names.capacity):
            entry = &slot.names.entries[i]
            if prefixes and entry.value != 0 and not entry.value & DOUBTED:
                _vouch(tree, named_place(entry), vouched)
        for i in range(slot.names.capacity):
            entry = &slot.names.entries[i]
            if not entry.value & DOUBTED:
                continue
            place = named_place(entry)
            if (place & ((<uint64_t>1 << OFFSET_BITS) - 1)) < vouched[place >> OFFSET_BITS]:
                entry.value = place << REFERENCE_BITS | 1
            elif <size_t>count < most:
                entry.value = place << REFERENCE_BITS | DOUBTED | 1
                names[count] = entry.key
                count += 1
        if slot_remove(tree, slot_id, names, <size_t>count) < 0:
            count = -1
    free(vouched)
    free(names)
    return count
