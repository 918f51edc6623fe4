"""What must hold after every call. Walks everything and recomputes every derived number; for tests only."""

from libc.stdint cimport uint32_t, uint64_t

from kvrouter_grpc.core.edge cimport Cover, Edge, Run, cover_find, cover_has, cover_holes, edge_top
from kvrouter_grpc.core.hash_table cimport Entry, Table, table_find
from kvrouter_grpc.core.holes cimport Holes, _bits, holes_size, holes_test, holes_top
from kvrouter_grpc.core.memory cimport footprint
from kvrouter_grpc.core.run cimport run_edges, run_get
from kvrouter_grpc.core.slot cimport named_place, place_edge
from kvrouter_grpc.core.tree cimport Slot, Tree, edge_depth, tree_child


cdef extern from * nogil:
    int __builtin_popcountll(unsigned long long)


cdef inline int _expect(bint holds, str what) except -1:
    if not holds:
        raise AssertionError(what)
    return 0


cdef inline size_t _table_bytes(const Table* table) noexcept:
    return footprint(table.capacity * sizeof(Entry))


cdef inline int _check_table(const Table* table) except -1:
    cdef uint32_t i
    cdef uint32_t count = 0
    for i in range(table.capacity):
        if table.entries[i].value != 0:
            count += 1
            _expect(table_find(table, table.entries[i].key) != NULL, "a table entry cannot be found")
    _expect(count == table.count, "the count of a table is wrong")
    _expect(count < table.capacity or count == 0, "a table has no empty entry")
    return 0


cdef inline size_t _check_cover(Tree* tree, const Edge* edge, uint32_t i) except 0:
    cdef const Cover* cover = &edge.covers[i]
    cdef Holes* holes = cover_holes(edge, i)
    cdef uint32_t word
    cdef uint32_t count = 0
    _expect(cover.slot < tree.slot_count and tree.slots[cover.slot].used, "a cover of a slot that is not in use")
    _expect(i == 0 or edge.covers[i - 1].slot < cover.slot, "covers are not sorted")
    _expect(cover.held <= edge.length, "a cover is longer than its edge")
    if holes == NULL:
        _expect(cover.held != 0, "an empty cover")
        return 1
    _expect(holes.count != 0, "an empty bit set")
    for word in range(holes.words):
        count += <uint32_t>__builtin_popcountll(_bits(holes)[word])
    _expect(count == holes.count, "the count of a bit set is wrong")
    _expect(holes_top(holes) <= edge.start + edge.length, "a bit beyond the edge")
    for word in range(holes.first, edge.start + cover.held + 1):
        _expect(not holes_test(holes, word), "a bit at or before the first gap")
    return footprint(holes_size(holes))


cdef inline size_t _check_edge(Tree* tree, Edge* edge, uint64_t key, dict children) except 0:
    cdef size_t size = footprint(sizeof(Edge)) + footprint(edge.capacity * sizeof(Cover))
    cdef uint32_t i
    _expect(edge.length != 0 and edge.start + edge.length <= edge.run.length, "an edge beyond its run")
    _expect(run_get(&tree.runs, edge.run.identity) == edge.run, "an edge on an unknown run")
    _expect(edge.run.hashes[edge.start] == key, "a key that is not the first hash of its edge")
    _expect(tree_child(tree, key, edge.parent) == edge, "an edge that its parent does not find")
    _expect(edge.count <= edge.capacity, "more covers than room")
    if edge.parent == NULL:
        _expect(edge_depth(edge) == 0, "a root edge below the root")
    else:
        _expect(edge_depth(edge.parent) + edge.parent.length == edge_depth(edge), "a gap between edge and parent")
        _expect(
            edge.start != 0 or edge.run.seed == edge.parent.run.seed, "a run with another seed than the run above it"
        )
    _expect(edge.children == children.get(<uint64_t>edge, 0), "a wrong count of children")
    if edge.children == 0:
        _expect(edge_top(edge) == edge.length, "a leaf whose end nobody holds")
    if edge.holes != NULL:
        size += footprint(edge.capacity * sizeof(Holes*))
    for i in range(edge.count):
        if cover_holes(edge, i) != NULL:
            size += _check_cover(tree, edge, i)
        else:
            _check_cover(tree, edge, i)
    return size


cdef inline size_t _check_run(Tree* tree, Run* run) except 0:
    cdef Edge** edges = run_edges(run)
    cdef uint32_t offset = 0
    cdef uint32_t i
    for i in range(run.count):
        _expect(edges[i].run == run and edges[i].start == offset, "the edges of a run do not lie end to end")
        _expect(i == 0 or edges[i].parent == edges[i - 1], "an edge is not the child of the one before")
        # Without memory two edges may stay unmerged; only an unlimited tree promises more.
        _expect(i == 0 or tree.meter.limit != 0 or edges[i - 1].children > 1, "two edges that should be one")
        offset += edges[i].length
    _expect(run.count != 0 and offset == run.length, "the edges of a run do not show all of it")
    _expect(run.length <= run.capacity, "a run longer than its memory")
    return (
        footprint(sizeof(Run))
        + footprint(run.capacity * sizeof(uint64_t))
        + footprint(run.edge_capacity * sizeof(Edge*))
    )


cdef inline int _check_slot(Tree* tree, uint32_t index, uint64_t held) except -1:
    cdef Slot* slot = &tree.slots[index]
    cdef uint64_t aliases = 0
    cdef uint32_t block = 0
    cdef uint32_t i
    cdef int at
    cdef Edge* edge
    _check_table(&slot.names)
    _check_table(&slot.aliases)
    for i in range(slot.names.capacity):
        if slot.names.entries[i].value == 0:
            continue
        edge = place_edge(tree, named_place(&slot.names.entries[i]), &block)
        _expect(edge != NULL, "an engine hash names a place that is gone")
        at = cover_find(edge, index)
        _expect(at >= 0 and cover_has(edge, <uint32_t>at, block), "an engine hash names a block that is not held")
    for i in range(slot.aliases.capacity):
        aliases += slot.aliases.entries[i].value
    _expect(held + aliases == slot.names.count, "blocks are held that no engine hash names")
    return 0


cdef inline int tree_check(Tree* tree) except -1:
    """Raises AssertionError with the first thing that is wrong."""
    cdef size_t size = _table_bytes(&tree.children)
    cdef uint64_t runs = 0
    cdef uint32_t i
    cdef uint32_t j
    cdef Edge* edge
    cdef Holes* holes
    cdef dict children = {}
    cdef dict held = {}
    _check_table(&tree.children)
    _expect(tree.children.count == tree.edges, "the count of edges is wrong")
    for i in range(tree.children.capacity):
        edge = <Edge*>tree.children.entries[i].value
        if edge != NULL and edge.parent != NULL:
            children[<uint64_t>edge.parent] = children.get(<uint64_t>edge.parent, 0) + 1
    for i in range(tree.children.capacity):
        edge = <Edge*>tree.children.entries[i].value
        if edge == NULL:
            continue
        size += _check_edge(tree, edge, tree.children.entries[i].key, children)
        for j in range(edge.count):
            holes = cover_holes(edge, j)
            held[edge.covers[j].slot] = (
                held.get(edge.covers[j].slot, 0) + edge.covers[j].held + (0 if holes == NULL else holes.count)
            )
    for i in range(tree.runs.capacity):
        if run_get(&tree.runs, i) != NULL:
            runs += 1
            size += _check_run(tree, run_get(&tree.runs, i))
    _expect(runs == tree.runs.count, "the count of runs is wrong")
    size += footprint(tree.runs.capacity * sizeof(Run*)) + footprint(tree.slot_capacity * sizeof(Slot))
    for i in range(tree.slot_count):
        if tree.slots[i].used:
            _check_slot(tree, i, held.get(i, 0))
        size += _table_bytes(&tree.slots[i].names) + _table_bytes(&tree.slots[i].aliases)
    _expect(size == tree.meter.used, f"{tree.meter.used} bytes are counted, {size} are in use")
    return 0
