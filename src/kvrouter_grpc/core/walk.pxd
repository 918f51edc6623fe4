"""Reading the tree: one step per edge of the path, not per block."""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from kvrouter_grpc.core.edge cimport Cover, Edge, cover_find, cover_span, edge_common
from kvrouter_grpc.core.tree cimport Tree, tree_child


cdef inline void tree_match(Tree* tree, const uint64_t* seqs, size_t count, uint32_t* out) noexcept nogil:
    """For every slot the length of the longest prefix of `seqs` all of whose blocks it holds.

    Args:
        tree: The tree.
        seqs: Chained sequence hashes of the prompt.
        count: How many.
        out: One entry for each slot id below `tree.slot_count`.
    """
    cdef size_t depth = 0
    cdef uint32_t common
    cdef uint32_t held
    cdef bint alive = True
    cdef Edge* edge = NULL
    cdef Cover* cover
    cdef Cover* end
    memset(out, 0, tree.slot_count * sizeof(uint32_t))
    while alive and depth < count:
        edge = tree_child(tree, seqs[depth], edge)
        if edge == NULL:
            return
        common = edge_common(edge, 0, seqs + depth, count - depth)
        alive = False
        cover = edge.covers
        end = cover + edge.count
        while cover != end:
            # Who has missed a block before this edge stays where it is.
            if out[cover.slot] == depth:
                held = cover.held if cover.held < common else common
                out[cover.slot] = <uint32_t>depth + held
                alive |= held == edge.length
            cover += 1
        depth += common


cdef inline size_t tree_extend(
    Tree* tree, uint32_t slot, const uint64_t* seqs, size_t count, size_t start
) noexcept nogil:
    """How many blocks of `seqs` the slot holds from position `start` on without a gap, whoever holds those before."""
    cdef size_t depth = 0
    cdef size_t end = start
    cdef uint32_t common
    cdef uint32_t span
    cdef uint32_t skip
    cdef int at
    cdef Edge* edge = NULL
    while depth < count:
        edge = tree_child(tree, seqs[depth], edge)
        if edge == NULL:
            break
        common = edge_common(edge, 0, seqs + depth, count - depth)
        if depth + common > end:
            at = cover_find(edge, slot)
            if at < 0:
                break
            skip = <uint32_t>(end - depth)
            span = cover_span(edge, <uint32_t>at, skip)
            if span > common - skip:
                span = common - skip
            end += span
            if skip + span < common:
                break
        depth += common
        if common < edge.length:
            break
    return end - start
