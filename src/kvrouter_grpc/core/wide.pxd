"""Blocks that span several blocks of the tree, as those of some groups of hybrid models do.

Such a block is held as a path: its last block has the engine's name, those before it go by their sequence hashes,
which nobody else uses as names. All of them are stored and removed together.
"""

from libc.stdint cimport uint32_t, uint64_t

from kvrouter_grpc.core.edge cimport Edge
from kvrouter_grpc.core.hash_table cimport Entry, table_find
from kvrouter_grpc.core.slot cimport named_place, place_edge, slot_remove, slot_store
from kvrouter_grpc.core.stack cimport Stack, stack_push
from kvrouter_grpc.core.tree cimport Tree


cdef inline void wide_names(
    const uint64_t* names, const uint64_t* seqs, size_t count, uint32_t width, uint64_t* out
) noexcept nogil:
    """Names of the `count * width` blocks of a path of wide blocks."""
    cdef size_t i
    cdef uint32_t j
    for i in range(count):
        for j in range(width - 1):
            out[i * width + j] = seqs[i * width + j]
        out[(i + 1) * width - 1] = names[i]


cdef inline Edge* _begin(Edge* edge, uint32_t* block, uint32_t width, uint64_t* seqs) noexcept nogil:
    # Goes back from the last to the first block of a wide block, whose sequence hashes it writes down. NULL: the block
    # is not deep enough in the tree to be the last of a wide one.
    cdef uint32_t left = width
    while True:
        left -= 1
        seqs[left] = edge.run.hashes[edge.start + block[0]]
        if left == 0:
            return edge
        if block[0] == 0:
            edge = edge.parent
            if edge == NULL:
                return NULL
            block[0] = edge.length
        block[0] -= 1


cdef inline int wide_store(
    Tree* tree, uint32_t slot, Edge* edge, uint32_t block, uint32_t width, uint64_t name, Stack* scratch
) noexcept nogil:
    """Stores the wide block that ends with a block of the tree, if there is one; -1: no memory."""
    cdef uint64_t offset = 0
    cdef uint64_t* seqs
    scratch.used = 0
    seqs = <uint64_t*>stack_push(scratch, 2 * <size_t>width * sizeof(uint64_t), &offset)
    if seqs == NULL:
        return -1
    edge = _begin(edge, &block, width, seqs)
    if edge == NULL:
        return 0
    wide_names(&name, seqs, 1, width, seqs + width)
    return slot_store(tree, slot, edge, block, edge.run.seed, seqs + width, seqs, width)


cdef inline int wide_remove(
    Tree* tree, uint32_t slot, uint32_t width, const uint64_t* names, uint32_t count, Stack* scratch
) noexcept nogil:
    """Takes one reference from each wide block; -1: no memory, the front is removed."""
    cdef uint64_t offset = 0
    cdef uint64_t* seqs
    cdef uint32_t block = 0
    cdef uint32_t i
    cdef Entry* entry
    scratch.used = 0
    seqs = <uint64_t*>stack_push(scratch, width * sizeof(uint64_t), &offset)
    if seqs == NULL:
        return -1
    for i in range(count):
        entry = table_find(&tree.slots[slot].names, names[i])
        if entry == NULL or _begin(place_edge(tree, named_place(entry), &block), &block, width, seqs) == NULL:
            tree.unknown_removes += 1
            continue
        seqs[width - 1] = names[i]
        if slot_remove(tree, slot, seqs, width) < 0:
            return -1
    return 0
