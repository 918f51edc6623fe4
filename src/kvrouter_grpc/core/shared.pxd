"""What of a prompt lies in storage that all workers of a model read: whichever of them told of it.

A block in the remote tier of one worker can be fetched by every other. So where a worker's own tiers end, its prefix goes
on for as long as some worker has put the next block there. This is worked out once per decision and is then one look-up
per target.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from kvrouter_grpc.core.edge cimport Edge, cover_below, cover_span_back
from kvrouter_grpc.core.target cimport NO_SLOT, TIERS, Ledger, Target
from kvrouter_grpc.core.walk cimport Step


cdef enum:
    REMOTE = TIERS - 1


cdef inline void shared_mark(
    const Target* targets, const Ledger* ledgers, uint32_t rows, uint64_t pool, uint8_t* marks, uint32_t slots
) noexcept nogil:
    """Marks the slots whose blocks every target of a pool can fetch.

    Args:
        targets: By row.
        ledgers: By row.
        rows: How many.
        pool: Whose. Targets with several KV cache groups take no part: what is usable of one is no prefix of another.
        marks: By slot.
        slots: How many.
    """
    cdef const Target* target
    cdef uint32_t row
    memset(marks, 0, slots)
    for row in range(rows):
        target = &targets[row]
        if target.in_use and target.slots[REMOTE] < slots and not target.grouped and target.freshness > 0:
            if ledgers[row].pool == pool:
                marks[target.slots[REMOTE]] = 1


cdef inline uint32_t _top(const Edge* edge, const uint8_t* marks, uint32_t end) noexcept nogil:
    # The block after the highest one below `end` that a marked slot holds; 0: there is none.
    cdef uint32_t top = 0
    cdef uint32_t i
    for i in range(edge.count):
        if marks[edge.covers[i].slot]:
            top = max(top, cover_below(edge, i, end))
    return top


cdef inline uint32_t _span_back(const Edge* edge, const uint8_t* marks, uint32_t end) noexcept nogil:
    # How many blocks right before `end` one marked slot holds without a gap, of the one that holds most.
    cdef uint32_t most = 0
    cdef uint32_t i
    for i in range(edge.count):
        if marks[edge.covers[i].slot]:
            most = max(most, cover_span_back(edge, i, end))
    return most


cdef inline uint32_t shared_reach(
    const Step* steps, size_t count, const uint8_t* marks, uint32_t* reach
) noexcept nogil:
    """Says for every block on the path of a prompt where the blocks that marked slots hold end, from this one on.

    From the last edge to the first, and in each from its end: a stretch that one slot holds is followed by what is
    known already.

    Args:
        steps: The path.
        count: How many steps.
        marks: By slot.
        reach: By block, with one more than there are; 0 for a block that none holds.

    Returns:
        Blocks on the path.
    """
    cdef uint32_t blocks = 0
    cdef uint32_t start
    cdef uint32_t end
    cdef uint32_t last
    cdef size_t i = count
    if count != 0:
        blocks = steps[count - 1].depth + steps[count - 1].common
    memset(reach, 0, (<size_t>blocks + 1) * sizeof(uint32_t))
    while i != 0:
        i -= 1
        end = _top(steps[i].edge, marks, steps[i].common)
        while end != 0:
            start = end - _span_back(steps[i].edge, marks, end)
            last = steps[i].depth + end
            if reach[last] != 0:
                last = reach[last]
            while end != start:
                end -= 1
                reach[steps[i].depth + end] = last
            end = _top(steps[i].edge, marks, start) if start != 0 else 0
    return blocks
