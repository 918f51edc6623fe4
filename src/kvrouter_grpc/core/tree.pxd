"""The shape of the tree: children, branching, splitting, merging, pruning.

There are no per-node maps: one table for the whole tree leads from the first sequence hash of an edge to the edge.
Shape says nothing about who holds what; an edge lives as long as a slot holds a block of it or it has children.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

from kvrouter_grpc.core.edge cimport (
    Cover,
    Edge,
    Run,
    cover_absorb,
    cover_find,
    cover_holes,
    cover_settle,
    cover_tidy,
    covers_free,
    edge_top,
)
from kvrouter_grpc.core.hash_table cimport (
    Entry,
    Table,
    table_delete,
    table_find,
    table_next,
    table_put,
    table_reserve,
    table_shrink,
)
from kvrouter_grpc.core.holes cimport Holes, holes_any, holes_fit, holes_free, holes_move, holes_set_range
from kvrouter_grpc.core.memory cimport COUNTED, LIVE, Meter, release, resize
from kvrouter_grpc.core.run cimport (
    LONGEST_RUN,
    Runs,
    run_add_edge_before,
    run_append,
    run_edge_after,
    run_free,
    run_new,
    run_remove_edge,
    run_reserve_edge,
    run_truncate,
)


cdef enum:
    DEEPEST = 1 << 30  # blocks; keeps every depth within 32 bits


cdef struct Slot:
    Table names  # engine hash -> place (see slot.pxd)
    Table aliases  # place -> how many engine hashes name it beyond the first
    uint64_t stored  # blocks, since the slot was added
    bint used


cdef struct Tree:
    Meter meter
    Table children  # first sequence hash -> edge
    Runs runs
    Slot* slots
    uint32_t slot_count  # ids in use lie below
    uint32_t slot_capacity
    uint64_t salt
    uint64_t edges
    uint64_t splits
    uint64_t merges
    uint64_t duplicates
    uint64_t conflicts
    uint64_t unknown_removes


cdef inline uint32_t edge_depth(const Edge* edge) noexcept nogil:
    """Blocks between the root and the edge's first block."""
    return edge.run.depth + edge.start


cdef inline Entry* _child_entry(Tree* tree, uint64_t first, const Edge* parent) noexcept nogil:
    # The parent is compared too, so that colliding hashes at two places of the tree stay two edges.
    cdef Entry* entry = table_find(&tree.children, first)
    while entry != NULL and (<Edge*>entry.value).parent != parent:
        entry = table_next(&tree.children, entry)
    return entry


cdef inline Edge* tree_child(Tree* tree, uint64_t first, const Edge* parent) noexcept nogil:
    """The edge below `parent` (NULL: the root) that begins with this sequence hash, or NULL."""
    cdef Entry* entry = _child_entry(tree, first, parent)
    return NULL if entry == NULL else <Edge*>entry.value


# --- growing -----------------------------------------------------------------------------------------------------


cdef inline Edge* _edge_new(Tree* tree, Run* run, Edge* parent, uint32_t start, uint32_t length) noexcept nogil:
    cdef Edge* edge = <Edge*>resize(&tree.meter, NULL, 0, sizeof(Edge))
    if edge == NULL:
        return NULL
    memset(edge, 0, sizeof(Edge))
    edge.run = run
    edge.parent = parent
    edge.start = start
    edge.length = length
    tree.edges += 1
    if COUNTED:
        LIVE.edges += 1
    return edge


cdef inline void _edge_free(Tree* tree, Edge* edge) noexcept nogil:
    covers_free(&tree.meter, edge)
    release(&tree.meter, edge, sizeof(Edge))
    tree.edges -= 1
    if COUNTED:
        LIVE.edges -= 1


cdef inline Edge* tree_branch(
    Tree* tree, Edge* parent, uint64_t seed, const uint64_t* seqs, size_t count
) noexcept nogil:
    """A new edge below `parent` on a run of its own; NULL: no memory, nothing changed."""
    cdef uint32_t length = <uint32_t>count if count < LONGEST_RUN else LONGEST_RUN
    cdef uint32_t depth = 0 if parent == NULL else edge_depth(parent) + parent.length
    cdef Edge* edge
    cdef Run* run
    if table_reserve(&tree.meter, &tree.children, 1):
        return NULL
    run = run_new(&tree.meter, &tree.runs, depth, seed if parent == NULL else parent.run.seed, seqs, length)
    edge = NULL if run == NULL else _edge_new(tree, run, parent, 0, length)
    if edge == NULL:
        if run != NULL:
            run_free(&tree.meter, &tree.runs, run)
        table_shrink(&tree.meter, &tree.children)
        return NULL
    run.only = edge
    run.count = 1
    table_put(&tree.children, seqs[0], <uint64_t>edge)
    if parent != NULL:
        parent.children += 1
    return edge


cdef inline bint tree_can_lengthen(const Edge* edge, size_t count) noexcept nogil:
    """Whether blocks that follow this edge may be added to it: a leaf always ends its run."""
    return edge.children == 0 and edge.run.length + count <= LONGEST_RUN


cdef inline int tree_lengthen(Tree* tree, Edge* edge, const uint64_t* seqs, size_t count) noexcept nogil:
    """Adds blocks to a leaf in place; -1: no memory, nothing changed."""
    if run_append(&tree.meter, edge.run, seqs, <uint32_t>count):
        return -1
    edge.length += <uint32_t>count
    return 0


# --- splitting ---------------------------------------------------------------------------------------------------


cdef inline int _split_covers(Meter* meter, Edge* edge, uint32_t at, Edge* head) noexcept nogil:
    # Moves what is held of the first `at` blocks to `head` and shortens the edge by them; all or nothing.
    cdef uint32_t begin = edge.start
    cdef uint32_t middle = edge.start + at
    cdef uint32_t i
    cdef uint32_t held
    cdef Holes* holes
    if edge.count != 0:
        head.covers = <Cover*>resize(meter, NULL, 0, edge.count * sizeof(Cover))
        if head.covers == NULL:
            return -1
        memcpy(head.covers, edge.covers, edge.count * sizeof(Cover))
        head.count = head.capacity = edge.count
    if edge.holes != NULL:
        head.holes = <Holes**>resize(meter, NULL, 0, edge.count * sizeof(Holes*))
        if head.holes == NULL:
            covers_free(meter, head)
            return -1
        memset(head.holes, 0, edge.count * sizeof(Holes*))
        for i in range(edge.count):
            if edge.holes[i] != NULL and holes_any(edge.holes[i], begin, middle):
                head.holes[i] = holes_fit(meter, NULL, begin, middle)
                if head.holes[i] == NULL:
                    covers_free(meter, head)
                    return -1
    # Nothing can fail from here on.
    for i in range(edge.count):
        held = edge.covers[i].held
        head.covers[i].held = held if held < at else at
        edge.covers[i].held = held - at if held > at else 0
        holes = cover_holes(edge, i)
        if holes != NULL and head.holes[i] != NULL:
            holes_move(head.holes[i], holes, begin, middle)
    edge.start = middle
    edge.length -= at
    for i in reversed(range(head.count)):
        cover_absorb(edge, i)
        cover_settle(meter, edge, i)
        cover_settle(meter, head, i)
    return 0


cdef inline Edge* tree_split(Tree* tree, Edge* edge, uint32_t at) noexcept nogil:
    """Cuts an edge after its first `at` blocks and returns the new head; NULL: no memory, nothing changed.

    The edge itself becomes the tail, so its children keep their parent, and no block is rewritten.
    """
    cdef Run* run = edge.run
    cdef uint64_t first = run.hashes[edge.start]
    cdef Edge* head
    if table_reserve(&tree.meter, &tree.children, 1) or run_reserve_edge(&tree.meter, run):
        return NULL
    head = _edge_new(tree, run, edge.parent, edge.start, at)
    if head == NULL:
        return NULL
    if _split_covers(&tree.meter, edge, at, head):
        _edge_free(tree, head)
        return NULL
    run_add_edge_before(run, edge, head)
    _child_entry(tree, first, edge.parent).value = <uint64_t>head
    edge.parent = head
    head.children = 1
    table_put(&tree.children, run.hashes[edge.start], <uint64_t>edge)
    tree.splits += 1
    return head


# --- merging -----------------------------------------------------------------------------------------------------


cdef inline int _merge_cover(
    Meter* meter, Edge* merged, uint32_t slot, const Edge* head, int in_head, const Edge* tail, int in_tail
) noexcept nogil:
    # Appends the cover of one slot, which has a cover in `head`, in `tail` (index -1: not there) or in both.
    cdef uint32_t middle = tail.start
    cdef uint32_t above = head.covers[in_head].held if in_head >= 0 else 0
    cdef uint32_t below = tail.covers[in_tail].held if in_tail >= 0 else 0
    cdef Holes* head_holes = cover_holes(head, <uint32_t>in_head) if in_head >= 0 else NULL
    cdef Holes* tail_holes = cover_holes(tail, <uint32_t>in_tail) if in_tail >= 0 else NULL
    cdef bint joined = above == head.length
    cdef Holes* holes = NULL
    cdef uint32_t at = merged.count
    if head_holes != NULL or tail_holes != NULL or (below != 0 and not joined):
        holes = holes_fit(meter, NULL, merged.start, merged.start + merged.length)
        if holes == NULL:
            return -1
        if merged.holes == NULL:
            merged.holes = <Holes**>resize(meter, NULL, 0, merged.capacity * sizeof(Holes*))
            if merged.holes == NULL:
                holes_free(meter, holes)
                return -1
            memset(merged.holes, 0, merged.capacity * sizeof(Holes*))
        merged.holes[at] = holes
        if below != 0 and not joined:
            holes_set_range(holes, middle, middle + below)
    merged.covers[at].slot = slot
    merged.covers[at].held = above + below if joined else above
    merged.count += 1
    return 0


cdef inline int _merge_covers(Meter* meter, Edge* merged, Edge* head, Edge* tail) noexcept nogil:
    # Fills `merged`, whose start and length are set, with what is held of both; all or nothing.
    cdef uint32_t end = merged.start + merged.length
    cdef uint32_t i = 0
    cdef uint32_t j = 0
    cdef uint32_t at
    cdef uint32_t slot
    cdef int in_head
    cdef int in_tail
    cdef Holes* source
    merged.capacity = head.count + tail.count
    if merged.capacity == 0:
        return 0
    merged.covers = <Cover*>resize(meter, NULL, 0, merged.capacity * sizeof(Cover))
    if merged.covers == NULL:
        merged.capacity = 0
        return -1
    while i < head.count or j < tail.count:
        in_head = in_tail = -1
        if i < head.count and (j == tail.count or head.covers[i].slot <= tail.covers[j].slot):
            in_head = <int>i
        if j < tail.count and (i == head.count or tail.covers[j].slot <= head.covers[i].slot):
            in_tail = <int>j
        slot = head.covers[i].slot if in_head >= 0 else tail.covers[j].slot
        if _merge_cover(meter, merged, slot, head, in_head, tail, in_tail):
            covers_free(meter, merged)
            return -1
        i += in_head >= 0
        j += in_tail >= 0
    # Nothing can fail from here on: bits may move now.
    i = j = 0
    for at in range(merged.count):
        slot = merged.covers[at].slot
        if i < head.count and head.covers[i].slot == slot:
            source = cover_holes(head, i)
            if source != NULL:
                holes_move(merged.holes[at], source, head.start, tail.start)
            i += 1
        if j < tail.count and tail.covers[j].slot == slot:
            source = cover_holes(tail, j)
            if source != NULL:
                holes_move(merged.holes[at], source, tail.start, end)
            j += 1
        cover_tidy(meter, merged, at)
    return 0


cdef inline void tree_merge(Tree* tree, Edge* head) noexcept nogil:
    """Joins an edge with its only child if that goes on on the same run. Without memory they stay two."""
    cdef Run* run = head.run
    cdef Edge* tail
    cdef Edge merged
    if head.children != 1:
        return
    tail = run_edge_after(run, head)
    if tail == NULL:
        return
    memset(&merged, 0, sizeof(Edge))
    merged.start = head.start
    merged.length = head.length + tail.length
    if _merge_covers(&tree.meter, &merged, head, tail):
        return
    table_delete(&tree.children, _child_entry(tree, run.hashes[tail.start], head))
    _child_entry(tree, run.hashes[head.start], head.parent).value = <uint64_t>tail
    run_remove_edge(&tree.meter, run, head)
    covers_free(&tree.meter, tail)
    tail.covers = merged.covers
    tail.holes = merged.holes
    tail.count = merged.count
    tail.capacity = merged.capacity
    tail.start = merged.start
    tail.length = merged.length
    tail.parent = head.parent
    _edge_free(tree, head)
    tree.merges += 1


# --- pruning -----------------------------------------------------------------------------------------------------


cdef inline void tree_prune(Tree* tree, Edge* edge) noexcept nogil:
    """Cuts what nobody holds off a leaf, frees it when nothing is left, and goes on with its parent."""
    cdef Edge* parent
    cdef Run* run
    cdef uint32_t top
    while edge != NULL and edge.children == 0:
        run = edge.run
        top = edge_top(edge)
        if top != 0:
            if top < edge.length:
                edge.length = top
                run_truncate(&tree.meter, run, edge.start + top)
            return
        parent = edge.parent
        table_delete(&tree.children, _child_entry(tree, run.hashes[edge.start], parent))
        table_shrink(&tree.meter, &tree.children)
        if edge.start == 0:
            run_free(&tree.meter, &tree.runs, run)
        else:
            run_remove_edge(&tree.meter, run, edge)
            run_truncate(&tree.meter, run, edge.start)
        _edge_free(tree, edge)
        if parent != NULL:
            parent.children -= 1
        edge = parent
    if edge != NULL:
        tree_merge(tree, edge)


cdef inline void tree_settle(Tree* tree, Edge* edge, uint32_t slot) noexcept nogil:
    """Tidies up after a slot let go of blocks of an edge; the edge may be gone afterwards."""
    cdef int at = cover_find(edge, slot)
    if at >= 0:
        cover_settle(&tree.meter, edge, <uint32_t>at)
    tree_prune(tree, edge)
