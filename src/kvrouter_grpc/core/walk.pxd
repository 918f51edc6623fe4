"""Reading the tree: one step per edge of the path, not per block."""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from kvrouter_grpc.core.edge cimport Cover, Edge, cover_below, cover_find, cover_span, cover_span_back, edge_common
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
    if tree.slot_count == 0:
        return
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


cdef inline bint _go_on(Edge* edge, size_t depth, uint32_t common, uint32_t slot, size_t* end) noexcept nogil:
    # Moves `end` over what the slot holds from there on of an edge at `depth`, `common` of whose blocks agree with the
    # prompt; whether it reaches the end of those.
    cdef uint32_t span
    cdef uint32_t skip
    cdef int at
    if depth + common <= end[0]:
        return True
    at = cover_find(edge, slot)
    if at < 0:
        return False
    skip = <uint32_t>(end[0] - depth)
    span = cover_span(edge, <uint32_t>at, skip)
    if span > common - skip:
        span = common - skip
    end[0] += span
    return skip + span == common


cdef inline size_t tree_extend(
    Tree* tree, uint32_t slot, const uint64_t* seqs, size_t count, size_t start
) noexcept nogil:
    """How many blocks of `seqs` the slot holds from position `start` on without a gap, whoever holds those before."""
    cdef size_t depth = 0
    cdef size_t end = start
    cdef uint32_t common
    cdef Edge* edge = NULL
    while depth < count:
        edge = tree_child(tree, seqs[depth], edge)
        if edge == NULL:
            break
        common = edge_common(edge, 0, seqs + depth, count - depth)
        if not _go_on(edge, depth, common, slot, &end):
            break
        depth += common
        if common < edge.length:
            break
    return end - start


# An edge on the path of a prompt.
cdef struct Step:
    Edge* edge
    uint32_t depth  # blocks before it
    uint32_t common  # of its blocks that agree with the prompt


cdef inline size_t tree_path(Tree* tree, const uint64_t* seqs, size_t count, Step* steps) noexcept nogil:
    """The edges on the path of a prompt, for `path_extend`; valid until the tree changes.

    Args:
        tree: The tree.
        seqs: Chained sequence hashes of the prompt.
        count: How many.
        steps: Room for `count` of them.

    Returns:
        How many there are.
    """
    cdef size_t depth = 0
    cdef size_t found = 0
    cdef Edge* edge = NULL
    while depth < count:
        edge = tree_child(tree, seqs[depth], edge)
        if edge == NULL:
            break
        steps[found].edge = edge
        steps[found].depth = <uint32_t>depth
        steps[found].common = edge_common(edge, 0, seqs + depth, count - depth)
        depth += steps[found].common
        found += 1
        if steps[found - 1].common < edge.length:
            break
    return found


cdef inline size_t path_extend(const Step* steps, size_t count, uint32_t slot, size_t start) noexcept nogil:
    """`tree_extend` along a path that was found before: for many slots, the walk is paid once."""
    cdef size_t low = 0
    cdef size_t high = count
    cdef size_t middle
    cdef size_t end = start
    while low < high:
        middle = low + (high - low) // 2
        if steps[middle].depth + <size_t>steps[middle].common <= start:
            low = middle + 1
        else:
            high = middle
    while low < count and _go_on(steps[low].edge, steps[low].depth, steps[low].common, slot, &end):
        low += 1
    return end - start


cdef inline size_t _step_before(const Step* steps, size_t count, size_t end) noexcept nogil:
    # The step that shows the block before `end`, which is on the path and not 0.
    cdef size_t low = 0
    cdef size_t high = count
    cdef size_t middle
    while high - low > 1:
        middle = low + (high - low) // 2
        if steps[middle].depth < end:
            low = middle
        else:
            high = middle
    return low


cdef inline size_t _run_back(
    const Step* steps, size_t count, uint32_t slot, size_t end, size_t enough
) noexcept nogil:
    # How many blocks right before `end` the slot holds without a gap; it may stop at `enough`.
    cdef size_t i = _step_before(steps, count, end)
    cdef size_t run = 0
    cdef uint32_t before
    cdef uint32_t span
    cdef int at
    while True:
        before = <uint32_t>(end - run - steps[i].depth)
        at = cover_find(steps[i].edge, slot)
        if at < 0:
            return run
        span = cover_span_back(steps[i].edge, <uint32_t>at, before)
        run += span
        if run >= enough or span < before or i == 0:
            return run
        i -= 1


cdef inline size_t _held_below(const Step* steps, size_t count, uint32_t slot, size_t end) noexcept nogil:
    # The position after the last block before `end` that the slot holds; 0: it holds none.
    cdef size_t i = _step_before(steps, count, end) + 1
    cdef size_t before = end
    cdef uint32_t below
    cdef int at
    while i != 0:
        i -= 1
        at = cover_find(steps[i].edge, slot)
        if at >= 0:
            below = cover_below(steps[i].edge, <uint32_t>at, <uint32_t>(before - steps[i].depth))
            if below != 0:
                return steps[i].depth + below
        before = steps[i].depth
    return 0


cdef inline size_t path_cut(
    const Step* steps, size_t count, uint32_t slot, size_t window, size_t step, size_t end
) noexcept nogil:
    """The last position, `end` at most, before which the slot holds a whole window of the path.

    Args:
        steps: The path of a prompt.
        count: How many steps.
        slot: Whose blocks.
        window: Blocks that have to be there; of a shorter prefix all.
        step: The position is a multiple of this.
        end: The most.

    Returns:
        The position, 0 when there is none: before it nothing has to be there.
    """
    cdef size_t cut = 0 if count == 0 else steps[count - 1].depth + <size_t>steps[count - 1].common
    cdef size_t run
    if cut > end:
        cut = end
    cut -= cut % step
    while cut != 0:
        if window > cut:
            window = cut
        run = _run_back(steps, count, slot, cut, window)
        if run >= window:
            break
        cut = cut - run - 1 if run != 0 else _held_below(steps, count, slot, cut)
        cut -= cut % step
    return cut
