"""What one slot holds: engine hashes, the places they name, and how often each was stored.

A place is a block of the tree, (run id, offset), and it outlives splits and merges. Two rules make the books exact:
an engine hash counts its stores (engines store one hash once per physical block and remove it as often), and a
place counts the engine hashes that name it (`aliases`). A slot holds a block while any of them is left.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from kvrouter_grpc.core.edge cimport (
    Edge,
    Run,
    cover_drop,
    cover_ensure,
    cover_find,
    cover_has,
    cover_hold,
    cover_release,
    cover_room,
    cover_settle,
    cover_tidy,
    edge_common,
)
from kvrouter_grpc.core.hash_table cimport (
    Entry,
    table_delete,
    table_fill,
    table_find,
    table_free,
    table_prefetch,
    table_put,
    table_reserve,
    table_seek,
    table_shrink,
)
from kvrouter_grpc.core.memory cimport release, resize
from kvrouter_grpc.core.run cimport OFFSET_BITS, run_edge_at, run_get
from kvrouter_grpc.core.tree cimport (
    Slot,
    Tree,
    tree_branch,
    tree_can_lengthen,
    tree_child,
    tree_lengthen,
    tree_prune,
    tree_settle,
    tree_split,
)


cdef enum:
    # The value of a name: place << REFERENCE_BITS | whether it is doubted (doubt.pxd) | references. The count stops at its
    # highest value, far above the number of physical blocks that could share a hash.
    REFERENCE_BITS = 18
    DOUBTED = 1 << 17
    MOST_REFERENCES = (1 << 17) - 1
    AHEAD = 16  # entries fetched early, so that their cache misses overlap


# Places that a store took an engine hash away from. They are settled when the store is done.
cdef struct Moves:
    uint64_t* places
    size_t count
    size_t capacity
    Edge* failed  # where the store stopped for want of memory


cdef inline uint64_t place_of(const Edge* edge, uint32_t block) noexcept nogil:
    return <uint64_t>edge.run.identity << OFFSET_BITS | (edge.start + block)


cdef inline uint64_t named_place(const Entry* entry) noexcept nogil:
    """The place an entry of `names` leads to."""
    return entry.value >> REFERENCE_BITS


cdef inline Edge* place_edge(Tree* tree, uint64_t place, uint32_t* block) noexcept nogil:
    """The edge that shows a place, and the block's number in it; NULL when the place is gone."""
    cdef Run* run = run_get(&tree.runs, <uint32_t>(place >> OFFSET_BITS))
    cdef uint32_t offset = <uint32_t>(place & ((<uint64_t>1 << OFFSET_BITS) - 1))
    cdef Edge* edge
    if run == NULL or offset >= run.length:
        return NULL
    edge = run_edge_at(run, offset)
    block[0] = offset - edge.start
    return edge


cdef inline bint _drop_alias(Tree* tree, Slot* slot, uint64_t place) noexcept nogil:
    # Whether another engine hash still names the place; one fewer does now.
    cdef Entry* entry = table_find(&slot.aliases, place)
    if entry == NULL:
        return False
    entry.value -= 1
    if entry.value == 0:
        table_delete(&slot.aliases, entry)
        table_shrink(&tree.meter, &slot.aliases)
    return True


cdef inline int _add_alias(Tree* tree, Slot* slot, uint64_t place) noexcept nogil:
    cdef Entry* entry = table_find(&slot.aliases, place)
    if entry != NULL:
        entry.value += 1
        return 0
    if table_reserve(&tree.meter, &slot.aliases, 1):
        return -1
    table_put(&slot.aliases, place, 1)
    return 0


cdef inline void slot_foresee(const Slot* slot, const uint64_t* names, size_t count) noexcept nogil:
    """Fetches the entries of the names that are stored or removed first; those behind are fetched on the way."""
    cdef size_t i
    for i in range(AHEAD if AHEAD < count else count):
        table_prefetch(&slot.names, names[i])


# --- storing -----------------------------------------------------------------------------------------------------


cdef inline int _gain(Tree* tree, Slot* slot, Edge* edge, uint32_t at, uint32_t block) noexcept nogil:
    # One more engine hash names a block.
    if cover_has(edge, at, block):
        return _add_alias(tree, slot, place_of(edge, block))
    if block != edge.covers[at].held and cover_room(&tree.meter, edge, at):
        return -1
    cover_hold(edge, at, block)
    return 0


cdef inline int _move(
    Tree* tree, uint32_t slot_id, Entry* entry, Edge* edge, uint32_t at, uint32_t block, Moves* moves
) noexcept nogil:
    # An engine hash that already names another block: the newest wins. Covers are only emptied here, not dropped,
    # and nothing is pruned, so indices and edges stay valid until the store is done.
    cdef Slot* slot = &tree.slots[slot_id]
    cdef uint64_t old_place = named_place(entry)
    cdef uint32_t old_block = 0
    cdef Edge* old_edge = place_edge(tree, old_place, &old_block)
    cdef uint32_t old_at = <uint32_t>cover_find(old_edge, slot_id)
    cdef size_t capacity
    cdef uint64_t* places
    if moves.count == moves.capacity:
        capacity = moves.capacity * 2 + 16
        places = <uint64_t*>resize(
            &tree.meter, moves.places, moves.capacity * sizeof(uint64_t), capacity * sizeof(uint64_t)
        )
        if places == NULL:
            return -1
        moves.places = places
        moves.capacity = capacity
    if cover_room(&tree.meter, old_edge, old_at):
        return -1
    if _gain(tree, slot, edge, at, block):
        cover_tidy(&tree.meter, old_edge, old_at)
        return -1
    if not _drop_alias(tree, slot, old_place):
        cover_release(old_edge, old_at, old_block)
    moves.places[moves.count] = old_place
    moves.count += 1
    entry.value = place_of(edge, block) << REFERENCE_BITS | 1
    tree.conflicts += 1
    return 0


cdef inline int _name(
    Tree* tree, uint32_t slot_id, uint64_t name, Edge* edge, uint32_t at, uint32_t block, Moves* moves
) noexcept nogil:
    # The slot stored this engine hash, which names this block; its cover has the index `at`, and there is room for a
    # name. -1: no memory.
    cdef Slot* slot = &tree.slots[slot_id]
    cdef uint64_t place = place_of(edge, block)
    cdef Entry* entry = table_seek(&slot.names, name)
    slot.stored += 1
    if entry.value == 0:
        if _gain(tree, slot, edge, at, block):
            return -1
        table_fill(&slot.names, entry, name, place << REFERENCE_BITS | 1)
        return 0
    if named_place(entry) != place:
        return _move(tree, slot_id, entry, edge, at, block, moves)
    if entry.value & DOUBTED:
        entry.value = place << REFERENCE_BITS | 1  # how often it was stored before is not known
    elif entry.value & MOST_REFERENCES != MOST_REFERENCES:
        entry.value += 1
    tree.duplicates += 1
    return 0


cdef inline void _settle_moves(Tree* tree, uint32_t slot_id, Moves* moves) noexcept nogil:
    cdef uint32_t block = 0
    cdef int at
    cdef Edge* edge
    cdef size_t i
    # All covers first: cutting one edge may end the place of another move, and its cover could not be found then.
    for i in range(moves.count):
        edge = place_edge(tree, moves.places[i], &block)
        at = cover_find(edge, slot_id)
        if at >= 0:
            cover_settle(&tree.meter, edge, <uint32_t>at)
    if moves.failed != NULL:
        tree_settle(tree, moves.failed, slot_id)
    for i in range(moves.count):
        edge = place_edge(tree, moves.places[i], &block)
        if edge != NULL:
            tree_prune(tree, edge)
    release(&tree.meter, moves.places, moves.capacity * sizeof(uint64_t))


cdef inline int _store(
    Tree* tree,
    uint32_t slot_id,
    Edge* edge,
    uint32_t block,
    uint64_t seed,
    const uint64_t* names,
    const uint64_t* seqs,
    size_t count,
    Moves* moves,
) noexcept nogil:
    cdef Slot* slot = &tree.slots[slot_id]
    cdef size_t done = 0
    cdef uint32_t i
    cdef uint32_t common
    cdef int at
    cdef int failed = 0
    cdef Edge* child
    while done < count:
        if edge == NULL or block == edge.length:
            # Most stores go on at the end of a leaf, which has no children to look for.
            child = NULL if edge != NULL and edge.children == 0 else tree_child(tree, seqs[done], edge)
            if child == NULL and edge != NULL and tree_can_lengthen(edge, count - done):
                if tree_lengthen(tree, edge, seqs + done, count - done):
                    return -1
            else:
                if child == NULL:
                    child = tree_branch(tree, edge, seed, seqs + done, count - done)
                    if child == NULL:
                        moves.failed = edge  # a split made for this branch is undone
                        return -1
                edge = child
                block = 0
        common = edge_common(edge, block, seqs + done, count - done)
        if common == 0:
            edge = tree_split(tree, edge, block)
            if edge == NULL:
                return -1
            continue
        at = cover_ensure(&tree.meter, edge, slot_id)
        for i in range(common):
            if done + i + AHEAD < count:
                table_prefetch(&slot.names, names[done + i + AHEAD])
            if at < 0 or _name(tree, slot_id, names[done + i], edge, <uint32_t>at, block + i, moves):
                failed = -1
                break
        if failed:
            moves.failed = edge
            return -1
        cover_tidy(&tree.meter, edge, <uint32_t>at)
        block += common
        done += common
    return 0


cdef inline int slot_store(
    Tree* tree,
    uint32_t slot_id,
    Edge* edge,
    uint32_t block,
    uint64_t seed,
    const uint64_t* names,
    const uint64_t* seqs,
    size_t count,
) noexcept nogil:
    """Stores a path of `count` blocks that begins at `block` of `edge` (NULL: at the root).

    Returns:
        0, or -1 without memory: then the blocks at the front of the path may be stored, and all books agree.
    """
    cdef Moves moves
    cdef int failed
    moves.places = NULL
    moves.failed = NULL
    moves.count = moves.capacity = 0
    if table_reserve(&tree.meter, &tree.slots[slot_id].names, count):
        return -1
    failed = _store(tree, slot_id, edge, block, seed, names, seqs, count, &moves)
    _settle_moves(tree, slot_id, &moves)
    table_shrink(&tree.meter, &tree.slots[slot_id].names)
    return failed


cdef inline int64_t slot_copy(
    Tree* tree, uint32_t slot_id, uint32_t source_id, const uint64_t* names, size_t count
) noexcept nogil:
    """Stores those engine hashes that another slot knows, at the same places; how many, or -1: no memory."""
    cdef Slot* slot = &tree.slots[slot_id]
    cdef int64_t known = 0
    cdef uint32_t block = 0
    cdef int failed = 0
    cdef int at
    cdef size_t i
    cdef Entry* entry
    cdef Edge* edge
    cdef Moves moves
    moves.places = NULL
    moves.failed = NULL
    moves.count = moves.capacity = 0
    if table_reserve(&tree.meter, &slot.names, count):
        return -1
    for i in range(count):
        entry = table_find(&tree.slots[source_id].names, names[i])
        if entry == NULL:
            continue
        edge = place_edge(tree, named_place(entry), &block)
        at = cover_ensure(&tree.meter, edge, slot_id)
        if at < 0 or _name(tree, slot_id, names[i], edge, <uint32_t>at, block, &moves):
            moves.failed = edge
            failed = -1
            break
        cover_tidy(&tree.meter, edge, <uint32_t>at)
        known += 1
    _settle_moves(tree, slot_id, &moves)
    table_shrink(&tree.meter, &slot.names)
    return failed if failed else known


# --- removing ----------------------------------------------------------------------------------------------------


# The edge that removals are at: engines remove the blocks of one prompt one after the other, so it is looked up and
# tidied up once for all of them.
cdef struct Site:
    Edge* edge  # NULL: nowhere yet
    uint32_t at  # index of the slot's cover; emptied at most, so it stays valid
    bint cut  # the edge's last block was let go


cdef inline void _leave(Tree* tree, Site* site) noexcept nogil:
    if site.edge != NULL:
        cover_settle(&tree.meter, site.edge, site.at)
        if site.cut:
            tree_prune(tree, site.edge)
    site.edge = NULL


cdef inline int _release(Tree* tree, uint32_t slot_id, uint64_t place, Site* site) noexcept nogil:
    # The last engine hash of a block is gone. -1: no memory, nothing changed.
    cdef uint32_t block = 0
    cdef Run* run = run_get(&tree.runs, <uint32_t>(place >> OFFSET_BITS))
    cdef uint32_t offset = <uint32_t>(place & ((<uint64_t>1 << OFFSET_BITS) - 1))
    cdef Edge* edge = site.edge
    if edge == NULL or edge.run != run or offset - edge.start >= edge.length:
        _leave(tree, site)
        edge = place_edge(tree, place, &block)
        site.edge = edge
        site.at = <uint32_t>cover_find(edge, slot_id)
        site.cut = False
    block = offset - edge.start
    if block + 1 < edge.covers[site.at].held and cover_room(&tree.meter, edge, site.at):
        return -1
    site.cut |= block + 1 == edge.length
    cover_release(edge, site.at, block)
    return 0


cdef inline int64_t slot_remove(Tree* tree, uint32_t slot_id, const uint64_t* names, size_t count) noexcept nogil:
    """Takes one reference from each engine hash; how many were unknown, or -1: no memory (the front is removed)."""
    cdef Slot* slot = &tree.slots[slot_id]
    cdef int64_t unknown = 0
    cdef int failed = 0
    cdef Entry* entry
    cdef size_t i
    cdef Site site
    site.edge = NULL
    site.at = 0
    site.cut = False
    for i in range(count):
        if i + AHEAD < count:
            table_prefetch(&slot.names, names[i + AHEAD])
        entry = table_find(&slot.names, names[i])
        if entry == NULL:
            unknown += 1
        elif entry.value & MOST_REFERENCES > 1:
            entry.value -= 1
        else:
            if not _drop_alias(tree, slot, named_place(entry)):
                failed = _release(tree, slot_id, named_place(entry), &site)
                if failed:
                    break
            table_delete(&slot.names, entry)
    _leave(tree, &site)
    table_shrink(&tree.meter, &slot.names)
    tree.unknown_removes += <uint64_t>unknown
    return failed if failed else unknown


cdef inline void slot_clear(Tree* tree, uint32_t slot_id) noexcept nogil:
    """Drops all that a slot holds, in time proportional to it."""
    cdef Slot* slot = &tree.slots[slot_id]
    cdef uint32_t block = 0
    cdef uint32_t i
    cdef int at
    cdef Edge* edge
    for i in range(slot.names.capacity):
        if slot.names.entries[i].value == 0:
            continue
        # The first name of an edge drops the slot's whole cover; for the others nothing is left to do.
        edge = place_edge(tree, named_place(&slot.names.entries[i]), &block)
        at = -1 if edge == NULL else cover_find(edge, slot_id)
        if at >= 0:
            cover_drop(&tree.meter, edge, <uint32_t>at)
            tree_prune(tree, edge)
    table_free(&tree.meter, &slot.names)
    table_free(&tree.meter, &slot.aliases)
