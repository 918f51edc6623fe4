"""A target as the decision sees it: one cache line with where its blocks are and how busy it is."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t


cdef enum:
    TIERS = 4  # device, host, disk, remote: a match goes on in the next where the one before ends
    MOST_GROUPS = 64  # KV cache groups; models have fewer than ten
    NO_SLOT = 0xFFFFFFFF
    PART_BITS = 16  # of a block: decayed blocks are summed in these, so that what is taken back leaves nothing


cdef struct Target:
    uint32_t slots[TIERS]  # of the index; NO_SLOT: nothing was ever seen in that tier
    double freshness  # trust in what those slots say, 0..1
    int64_t queued_prefill_tokens
    int64_t private_parts  # pinned blocks that no others share, in parts; what has decayed is taken off
    uint32_t pinned_blocks  # distinct blocks that requests in flight share
    uint32_t active_requests
    uint32_t waiting_requests  # of those, without a first token
    uint32_t total_blocks  # capacity; 0: not known
    uint8_t in_use  # whether the row has a target
    uint8_t lower_tiers  # how many of slots[1:] are set
    uint8_t grouped  # several KV cache groups say what is usable: `slots` are not read
    uint8_t on_cpu  # a slower kind of target


# One KV cache group of a target with several.
cdef struct Group:
    uint32_t[TIERS] slots  # of the index
    uint32_t window  # blocks that have to be there before the cut; 0: all


# All of them; the list follows this header.
cdef struct Groups:
    uint32_t count
    uint32_t step  # a cut is a multiple of this many blocks
    uint32_t tiers  # bit set of those in which any group has blocks
    uint32_t padding


cdef inline Group* groups_list(const Groups* groups) noexcept nogil:
    return <Group*>(groups + 1)


# What is told of a target beside what decides: not read while costs are worked out, but for the groups of a hybrid.
cdef struct Ledger:
    Groups* groups  # NULL: the target has one
    uint64_t birth  # tells the targets apart that had this row one after the other
    uint64_t identity  # the same for this target in every router
    uint64_t pool  # targets of one pool can use the same blocks: they serve one model
    int64_t batch_tokens  # that its engine computes in one step
    uint32_t foreign_requests  # the share of traffic from elsewhere in the target's load
    uint32_t foreign_waiting
    int64_t foreign_prefill_tokens
    int64_t foreign_parts


cdef inline int64_t active_blocks(const Target* target) noexcept nogil:
    """Distinct blocks that requests in flight pin; a shared prefix counts once."""
    return target.pinned_blocks + ((target.private_parts + (1 << (PART_BITS - 1))) >> PART_BITS)
