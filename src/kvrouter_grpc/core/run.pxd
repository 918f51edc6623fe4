"""Runs: making, growing, shortening and finding them by id, and finding the edge that shows one of their blocks."""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memmove, memset

from kvrouter_grpc.core.edge cimport Edge, Run
from kvrouter_grpc.core.memory cimport COUNTED, LIVE, Meter, release, resize


cdef enum:
    # A place is packed into 64 bits: run id, offset, references (see slot.pxd).
    RUN_ID_BITS = 26
    OFFSET_BITS = 20
    LONGEST_RUN = 1 << 20  # blocks


cdef struct Runs:
    Run** byid  # a free id holds the next free one, as an odd number
    uint32_t capacity
    uint32_t count
    uint64_t free  # the first free id; capacity: none


cdef inline Run* run_get(const Runs* runs, uint32_t identity) noexcept nogil:
    """The run with this id, or NULL."""
    cdef Run* run
    if identity >= runs.capacity:
        return NULL
    run = runs.byid[identity]
    return NULL if <uint64_t>run & 1 else run


cdef inline int _grow_ids(Meter* meter, Runs* runs) noexcept nogil:
    cdef uint64_t capacity = runs.capacity + runs.capacity // 2 + 8
    cdef uint64_t i
    cdef Run** byid
    if capacity > <uint64_t>1 << RUN_ID_BITS:
        capacity = <uint64_t>1 << RUN_ID_BITS
    if capacity == runs.capacity:
        return -1
    byid = <Run**>resize(meter, runs.byid, runs.capacity * sizeof(Run*), capacity * sizeof(Run*))
    if byid == NULL:
        return -1
    for i in range(runs.capacity, capacity):
        byid[i] = <Run*>((i + 1) << 1 | 1)
    runs.byid = byid
    runs.capacity = <uint32_t>capacity
    return 0


cdef inline void _drop_ids(Meter* meter, Runs* runs) noexcept nogil:
    if runs.count == 0:
        release(meter, runs.byid, runs.capacity * sizeof(Run*))
        memset(runs, 0, sizeof(Runs))


cdef inline Run* run_new(
    Meter* meter, Runs* runs, uint32_t depth, uint64_t seed, const uint64_t* hashes, uint32_t length
) noexcept nogil:
    """A run with its own copy of `hashes` and no edge yet; NULL: no memory."""
    cdef Run* run
    if runs.free == runs.capacity and _grow_ids(meter, runs):
        return NULL
    run = <Run*>resize(meter, NULL, 0, sizeof(Run))
    if run == NULL:
        _drop_ids(meter, runs)
        return NULL
    memset(run, 0, sizeof(Run))
    run.hashes = <uint64_t*>resize(meter, NULL, 0, length * sizeof(uint64_t))
    if run.hashes == NULL:
        release(meter, run, sizeof(Run))
        _drop_ids(meter, runs)
        return NULL
    memcpy(run.hashes, hashes, length * sizeof(uint64_t))
    run.length = run.capacity = length
    run.depth = depth
    run.seed = seed
    run.identity = <uint32_t>runs.free
    runs.free = <uint64_t>runs.byid[run.identity] >> 1
    runs.byid[run.identity] = run
    runs.count += 1
    if COUNTED:
        LIVE.runs += 1
    return run


cdef inline void run_free(Meter* meter, Runs* runs, Run* run) noexcept nogil:
    """Frees a run that no edge shows any more."""
    runs.byid[run.identity] = <Run*>(runs.free << 1 | 1)
    runs.free = run.identity
    runs.count -= 1
    if COUNTED:
        LIVE.runs -= 1
    release(meter, run.hashes, run.capacity * sizeof(uint64_t))
    release(meter, run.edges, run.edge_capacity * sizeof(Edge*))
    release(meter, run, sizeof(Run))
    _drop_ids(meter, runs)


cdef inline int run_append(Meter* meter, Run* run, const uint64_t* hashes, uint32_t count) noexcept nogil:
    """Lengthens a run, in amortised constant time per block; -1: no memory."""
    cdef uint32_t capacity = run.length + count
    cdef uint64_t* grown
    if capacity > run.capacity:
        if run.capacity + run.capacity // 2 > capacity:
            capacity = run.capacity + run.capacity // 2
        grown = <uint64_t*>resize(
            meter, run.hashes, run.capacity * sizeof(uint64_t), capacity * sizeof(uint64_t)
        )
        if grown == NULL:
            return -1
        run.hashes = grown
        run.capacity = capacity
    memcpy(run.hashes + run.length, hashes, count * sizeof(uint64_t))
    run.length += count
    return 0


cdef inline void run_truncate(Meter* meter, Run* run, uint32_t length) noexcept nogil:
    """Shortens a run (not to 0) and gives memory back once half of it is unused."""
    cdef uint64_t* shrunk
    run.length = length
    if run.capacity >= 8 and length <= run.capacity // 2:
        shrunk = <uint64_t*>resize(
            meter, run.hashes, run.capacity * sizeof(uint64_t), length * sizeof(uint64_t)
        )
        if shrunk != NULL:
            run.hashes = shrunk
            run.capacity = length


# --- the edges of a run ------------------------------------------------------------------------------------------


cdef inline Edge** run_edges(Run* run) noexcept nogil:
    return &run.only if run.edges == NULL else run.edges


cdef inline uint32_t _edge_index(Run* run, uint32_t offset) noexcept nogil:
    # The last edge that starts at or before `offset`.
    cdef Edge** edges = run_edges(run)
    cdef uint32_t low = 0
    cdef uint32_t high = run.count
    cdef uint32_t middle
    while high - low > 1:
        middle = low + (high - low) // 2
        if edges[middle].start <= offset:
            low = middle
        else:
            high = middle
    return low


cdef inline Edge* run_edge_at(Run* run, uint32_t offset) noexcept nogil:
    """The edge that shows the block at `offset`, which is below the run's length."""
    return run_edges(run)[_edge_index(run, offset)]


cdef inline Edge* run_edge_after(Run* run, const Edge* edge) noexcept nogil:
    """The edge that goes on where this one ends on the same run, or NULL."""
    cdef uint32_t index = _edge_index(run, edge.start) + 1
    return run_edges(run)[index] if index < run.count else NULL


cdef inline int run_reserve_edge(Meter* meter, Run* run) noexcept nogil:
    """Makes room for one more edge; -1: no memory."""
    cdef uint32_t capacity
    cdef Edge** edges
    if run.count == 0 or run.count < run.edge_capacity:
        return 0
    capacity = run.edge_capacity * 2 if run.edge_capacity else 4
    edges = <Edge**>resize(meter, run.edges, run.edge_capacity * sizeof(Edge*), capacity * sizeof(Edge*))
    if edges == NULL:
        return -1
    if run.edges == NULL:
        edges[0] = run.only
    run.edges = edges
    run.edge_capacity = capacity
    return 0


cdef inline void run_add_edge_before(Run* run, const Edge* edge, Edge* added) noexcept nogil:
    """Puts an edge before another one of the run, in room made before."""
    cdef uint32_t at = _edge_index(run, edge.start)
    memmove(run.edges + at + 1, run.edges + at, (run.count - at) * sizeof(Edge*))
    run.edges[at] = added
    run.count += 1


cdef inline void run_remove_edge(Meter* meter, Run* run, const Edge* edge) noexcept nogil:
    cdef Edge** edges = run_edges(run)
    cdef uint32_t at = _edge_index(run, edge.start)
    memmove(edges + at, edges + at + 1, (run.count - at - 1) * sizeof(Edge*))
    run.count -= 1
    if run.count == 1 and run.edges != NULL:
        run.only = run.edges[0]
        release(meter, run.edges, run.edge_capacity * sizeof(Edge*))
        run.edges = NULL
        run.edge_capacity = 0
