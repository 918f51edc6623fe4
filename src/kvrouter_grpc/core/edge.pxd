"""The nouns of the tree: a run of sequence hashes, and an edge, which is a view on a stretch of one run.

    run     owns its hashes; blocks are referred to as (run id, offset), which no split or merge changes
    edge    blocks [start, start + length) of its run, the edge above it, and per slot how much of it is held
    cover   what one slot holds of one edge: the first `held` blocks, and beyond the first gap a bit set (`Holes`)

The edges of a run lie end to end, each the child of the one before; the last ends where the run ends.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memmove, memset

from kvrouter_grpc.core.holes cimport (
    Holes,
    holes_below,
    holes_clear,
    holes_fit,
    holes_free,
    holes_set,
    holes_set_range,
    holes_span,
    holes_span_back,
    holes_test,
    holes_top,
)
from kvrouter_grpc.core.memory cimport Meter, release, resize


cdef struct Edge:
    Run* run
    Edge* parent  # NULL: the root
    Cover* covers  # sorted by slot
    Holes** holes  # parallel to covers; NULL while no slot has a gap in this edge
    uint32_t start
    uint32_t length  # never 0
    uint32_t children
    uint32_t count  # covers
    uint32_t capacity  # of covers and holes


cdef struct Cover:
    uint32_t slot
    uint32_t held


cdef struct Run:
    uint64_t* hashes
    Edge** edges  # in order; NULL while `only` is the one edge
    Edge* only
    uint64_t seed  # of the prompt's first block: what is stored below inherits it
    uint32_t identity
    uint32_t length
    uint32_t capacity  # of hashes
    uint32_t depth  # blocks above offset 0
    uint32_t count  # edges
    uint32_t edge_capacity


cdef enum:
    # 24 bytes are what the smallest chunk of an allocator holds anyway.
    FIRST_COVERS = 3


# --- comparing ---------------------------------------------------------------------------------------------------


cdef inline uint32_t edge_common(const Edge* edge, uint32_t at, const uint64_t* seqs, size_t count) noexcept nogil:
    """How many leading `seqs` equal the blocks of the edge from `at` on.

    Sequence hashes are chained: where two agree, so does everything before them. So one comparison settles a
    whole edge, and a binary search finds where two paths part.
    """
    cdef const uint64_t* hashes = edge.run.hashes + edge.start + at
    cdef uint32_t low = 0
    cdef uint32_t middle
    cdef uint32_t high = edge.length - at
    if count < high:
        high = <uint32_t>count
    if high == 0 or hashes[high - 1] == seqs[high - 1]:
        return high
    high -= 1
    while low < high:
        middle = low + (high - low) // 2
        if hashes[middle] == seqs[middle]:
            low = middle + 1
        else:
            high = middle
    return low


# --- what a slot holds of an edge --------------------------------------------------------------------------------


cdef inline uint32_t _lower_bound(const Edge* edge, uint32_t slot) noexcept nogil:
    cdef uint32_t low = 0
    cdef uint32_t high = edge.count
    cdef uint32_t middle
    while low < high:
        middle = low + (high - low) // 2
        if edge.covers[middle].slot < slot:
            low = middle + 1
        else:
            high = middle
    return low


cdef inline int cover_find(const Edge* edge, uint32_t slot) noexcept nogil:
    """The index of a slot's cover, or -1. Valid until a cover of this edge is added or dropped."""
    cdef uint32_t at = _lower_bound(edge, slot)
    return <int>at if at < edge.count and edge.covers[at].slot == slot else -1


cdef inline int _grow_covers(Meter* meter, Edge* edge) noexcept nogil:
    cdef uint32_t capacity = edge.capacity * 2 if edge.capacity else FIRST_COVERS
    cdef Holes** holes
    cdef Cover* covers
    if edge.holes != NULL:
        # Two blocks grow one after the other: copy this one, so that a failure of the second leaves both sizes equal.
        holes = <Holes**>resize(meter, NULL, 0, capacity * sizeof(Holes*))
        if holes == NULL:
            return -1
    else:
        holes = NULL
    covers = <Cover*>resize(meter, edge.covers, edge.capacity * sizeof(Cover), capacity * sizeof(Cover))
    if covers == NULL:
        if holes != NULL:
            release(meter, holes, capacity * sizeof(Holes*))
        return -1
    edge.covers = covers
    if holes != NULL:
        memset(holes, 0, capacity * sizeof(Holes*))
        memmove(holes, edge.holes, edge.count * sizeof(Holes*))
        release(meter, edge.holes, edge.capacity * sizeof(Holes*))
        edge.holes = holes
    edge.capacity = capacity
    return 0


cdef inline int cover_ensure(Meter* meter, Edge* edge, uint32_t slot) noexcept nogil:
    """The index of a slot's cover, made empty if there is none; -1: no memory."""
    cdef uint32_t at = _lower_bound(edge, slot)
    if at < edge.count and edge.covers[at].slot == slot:
        return <int>at
    if edge.count == edge.capacity and _grow_covers(meter, edge):
        return -1
    memmove(edge.covers + at + 1, edge.covers + at, (edge.count - at) * sizeof(Cover))
    edge.covers[at].slot = slot
    edge.covers[at].held = 0
    if edge.holes != NULL:
        memmove(edge.holes + at + 1, edge.holes + at, (edge.count - at) * sizeof(Holes*))
        edge.holes[at] = NULL
    edge.count += 1
    return <int>at


cdef inline void covers_free(Meter* meter, Edge* edge) noexcept nogil:
    cdef uint32_t i
    if edge.holes != NULL:
        for i in range(edge.count):
            holes_free(meter, edge.holes[i])
        release(meter, edge.holes, edge.capacity * sizeof(Holes*))
        edge.holes = NULL
    release(meter, edge.covers, edge.capacity * sizeof(Cover))
    edge.covers = NULL
    edge.count = edge.capacity = 0


cdef inline void cover_drop(Meter* meter, Edge* edge, uint32_t at) noexcept nogil:
    if edge.count == 1:
        covers_free(meter, edge)
        return
    if edge.holes != NULL:
        holes_free(meter, edge.holes[at])
        memmove(edge.holes + at, edge.holes + at + 1, (edge.count - at - 1) * sizeof(Holes*))
        edge.holes[edge.count - 1] = NULL
    memmove(edge.covers + at, edge.covers + at + 1, (edge.count - at - 1) * sizeof(Cover))
    edge.count -= 1


cdef inline Holes* cover_holes(const Edge* edge, uint32_t at) noexcept nogil:
    return NULL if edge.holes == NULL else edge.holes[at]


cdef inline int cover_room(Meter* meter, Edge* edge, uint32_t at) noexcept nogil:
    """Makes room for gaps anywhere in the edge, so that hold and release cannot fail; -1: no memory."""
    cdef Holes* fitted
    if edge.holes == NULL:
        edge.holes = <Holes**>resize(meter, NULL, 0, edge.capacity * sizeof(Holes*))
        if edge.holes == NULL:
            return -1
        memset(edge.holes, 0, edge.capacity * sizeof(Holes*))
    fitted = holes_fit(meter, edge.holes[at], edge.start, edge.start + edge.length)
    if fitted == NULL:
        return -1
    edge.holes[at] = fitted
    return 0


cdef inline void cover_tidy(Meter* meter, Edge* edge, uint32_t at) noexcept nogil:
    """Frees a bit set without bits, and the table of bit sets when that was the last."""
    cdef uint32_t i
    if edge.holes == NULL or edge.holes[at] == NULL or edge.holes[at].count != 0:
        return
    holes_free(meter, edge.holes[at])
    edge.holes[at] = NULL
    for i in range(edge.count):
        if edge.holes[i] != NULL:
            return
    release(meter, edge.holes, edge.capacity * sizeof(Holes*))
    edge.holes = NULL


cdef inline bint cover_has(const Edge* edge, uint32_t at, uint32_t block) noexcept nogil:
    """Whether the slot holds block `block` of the edge."""
    cdef Holes* holes
    if block < edge.covers[at].held:
        return True
    holes = cover_holes(edge, at)
    return holes != NULL and holes.count != 0 and holes_test(holes, edge.start + block)


cdef inline uint32_t cover_span(const Edge* edge, uint32_t at, uint32_t block) noexcept nogil:
    """How many blocks the slot holds from `block` on without a gap."""
    cdef Holes* holes
    if block < edge.covers[at].held:
        return edge.covers[at].held - block
    holes = cover_holes(edge, at)
    return 0 if holes == NULL or holes.count == 0 else holes_span(holes, edge.start + block)


cdef inline uint32_t cover_span_back(const Edge* edge, uint32_t at, uint32_t block) noexcept nogil:
    """How many blocks right before `block` the slot holds without a gap."""
    cdef Holes* holes
    if block <= edge.covers[at].held:
        return block
    holes = cover_holes(edge, at)
    return 0 if holes == NULL or holes.count == 0 else holes_span_back(holes, edge.start + block)


cdef inline uint32_t cover_below(const Edge* edge, uint32_t at, uint32_t block) noexcept nogil:
    """The block after the highest one below `block` that the slot holds; 0: it holds none there."""
    cdef Holes* holes
    cdef uint32_t top
    if block <= edge.covers[at].held:
        return block
    holes = cover_holes(edge, at)
    top = 0 if holes == NULL or holes.count == 0 else holes_below(holes, edge.start + block)
    return top - edge.start if top != 0 else edge.covers[at].held


cdef inline bint cover_is_empty(const Edge* edge, uint32_t at) noexcept nogil:
    cdef Holes* holes = cover_holes(edge, at)
    return edge.covers[at].held == 0 and (holes == NULL or holes.count == 0)


cdef inline void cover_settle(Meter* meter, Edge* edge, uint32_t at) noexcept nogil:
    """Drops a cover, or its bit set, once it is empty."""
    cover_tidy(meter, edge, at)
    if cover_is_empty(edge, at):
        cover_drop(meter, edge, at)


cdef inline uint32_t cover_top(const Edge* edge, uint32_t at) noexcept nogil:
    """The block after the highest one the slot holds."""
    cdef Holes* holes = cover_holes(edge, at)
    return edge.covers[at].held if holes == NULL or holes.count == 0 else holes_top(holes) - edge.start


cdef inline uint32_t edge_top(const Edge* edge) noexcept nogil:
    """The block after the highest one that anybody holds."""
    cdef uint32_t top = 0
    cdef uint32_t i
    cdef uint32_t one
    for i in range(edge.count):
        one = cover_top(edge, i)
        if one > top:
            top = one
            if top == edge.length:
                break
    return top


cdef inline void cover_absorb(Edge* edge, uint32_t at) noexcept nogil:
    """Extends `held` over the bits that now follow it without a gap."""
    cdef Holes* holes = cover_holes(edge, at)
    while holes != NULL and holes.count != 0 and holes_test(holes, edge.start + edge.covers[at].held):
        holes_clear(holes, edge.start + edge.covers[at].held)
        edge.covers[at].held += 1


cdef inline void cover_hold(Edge* edge, uint32_t at, uint32_t block) noexcept nogil:
    """Marks a block that is not held; in room made before, unless it follows `held`."""
    if block == edge.covers[at].held:
        edge.covers[at].held += 1
        cover_absorb(edge, at)
    else:
        holes_set(edge.holes[at], edge.start + block)


cdef inline void cover_release(Edge* edge, uint32_t at, uint32_t block) noexcept nogil:
    """Unmarks a block that is held; in room made before, unless it ends `held`."""
    cdef uint32_t held = edge.covers[at].held
    if block >= held:
        holes_clear(edge.holes[at], edge.start + block)
        return
    if block + 1 < held:
        holes_set_range(edge.holes[at], edge.start + block + 1, edge.start + held)
    edge.covers[at].held = block
