"""How much of a prompt a target has cached, tier by tier: what its engine would find.

A model whose layers all attend to the whole prompt has one KV cache group, and its engine uses the longest prefix that
it holds. A hybrid model has several groups. Those of sliding windows and of states (Mamba) keep only what lies before
the last position, so a prefix is usable if each group holds its window before the cut: vLLM's rule, by which the cut
also falls on a boundary of every group's blocks. The longest such prefix is found by lowering the cut until no group
objects.
"""

from libc.stdint cimport int64_t, uint32_t

from kvrouter_grpc.core.target cimport MOST_GROUPS, TIERS, Groups, Target, groups_list
from kvrouter_grpc.core.walk cimport Step, path_cut, path_extend


# What a walk of the index found of a prompt.
cdef struct Found:
    const uint32_t* held  # blocks of the prefix, by slot
    uint32_t slots  # entries of `held`
    const Step* steps  # the path; only needed by targets with lower tiers or several groups
    size_t path
    const uint32_t* shared  # see `shared_reach`; NULL: no storage is shared
    uint32_t shared_blocks  # entries of `shared`


cdef struct Overlap:
    uint32_t[TIERS] tiers  # blocks, each tier going on where the one before ends
    uint32_t in_flight  # leading blocks that requests in flight pin: they will be cached before this one is computed


cdef inline int64_t overlap_total(const Overlap* overlap) noexcept nogil:
    return <int64_t>overlap.tiers[0] + overlap.tiers[1] + overlap.tiers[2] + overlap.tiers[3]


cdef inline uint32_t _cut(
    const Groups* groups, const Found* found, uint32_t tier, uint32_t floor, uint32_t cut
) noexcept nogil:
    # Lowers the cut, no further than `floor`, until every group with a window holds it whole in this tier.
    cdef uint32_t i = 0
    cdef uint32_t content = 0
    cdef uint32_t fits
    cdef uint32_t slot
    cut -= cut % groups.step
    while cut > floor and content < groups.count:
        slot = groups_list(groups)[i].slots[tier]
        if groups_list(groups)[i].window != 0:
            fits = 0
            if slot < found.slots:
                fits = <uint32_t>path_cut(
                    found.steps, found.path, slot, groups_list(groups)[i].window, groups.step, cut
                )
            if fits < cut:
                cut = fits
                content = 0
        content += 1
        i = i + 1 if i + 1 < groups.count else 0
    return cut


cdef inline void _overlap_of_groups(
    const Groups* groups, const Found* found, uint32_t most, Overlap* overlap
) noexcept nogil:
    cdef uint32_t[MOST_GROUPS] reach  # per group of full attention, how far it holds the prefix
    cdef uint32_t total = 0
    cdef uint32_t cut
    cdef uint32_t tier
    cdef uint32_t slot
    cdef uint32_t i
    for i in range(groups.count):
        reach[i] = 0
    for tier in range(<uint32_t>TIERS):
        if not groups.tiers >> tier & 1:
            continue
        cut = most
        for i in range(groups.count):
            if groups_list(groups)[i].window != 0:
                continue
            slot = groups_list(groups)[i].slots[tier]
            if slot < found.slots:
                if tier == 0:
                    reach[i] = found.held[slot]
                else:
                    reach[i] += <uint32_t>path_extend(found.steps, found.path, slot, reach[i])
            if reach[i] < cut:
                cut = reach[i]
        cut = _cut(groups, found, tier, total, cut)
        if cut > total:
            overlap.tiers[tier] = cut - total
            total = cut


cdef inline void overlap_of(
    const Target* target, const Groups* groups, const Found* found, uint32_t most, Overlap* overlap
) noexcept nogil:
    """Fills the tiers of an overlap.

    Args:
        target: Whose.
        groups: What it says of its KV cache groups; NULL: it has one, and that holds whole prefixes.
        found: Of the prompt in the index.
        most: Blocks that an engine would use at most. Only groups with windows need to know: what they hold before
            one position says nothing about another.
        overlap: The answer.
    """
    cdef size_t depth
    cdef uint32_t tier
    overlap.tiers[0] = overlap.tiers[1] = overlap.tiers[2] = overlap.tiers[3] = 0
    if groups != NULL:
        _overlap_of_groups(groups, found, most, overlap)
        return
    if target.slots[0] < found.slots:
        overlap.tiers[0] = found.held[target.slots[0]]
    if target.lower_tiers != 0:
        depth = overlap.tiers[0]
        for tier in range(1, <uint32_t>TIERS):
            if target.slots[tier] < found.slots:
                overlap.tiers[tier] = <uint32_t>path_extend(found.steps, found.path, target.slots[tier], depth)
                depth += overlap.tiers[tier]
    if found.shared != NULL:
        _overlap_of_all(found, overlap)


cdef inline void _overlap_of_all(const Found* found, Overlap* overlap) noexcept nogil:
    # Whoever put blocks into the remote tier, they are the target's as well.
    cdef uint32_t depth = overlap.tiers[0] + overlap.tiers[1] + overlap.tiers[2]
    overlap.tiers[3] = 0
    if depth < found.shared_blocks and found.shared[depth] != 0:
        overlap.tiers[3] = found.shared[depth] - depth
