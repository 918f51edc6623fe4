"""A target as the decision sees it: one cache line with where its blocks are and how busy it is."""

from libc.stdint cimport int64_t, uint32_t, uint64_t


cdef enum:
    TIERS = 4  # device, host, disk, remote: a match goes on in the next where the one before ends
    NO_SLOT = 0xFFFFFFFF


cdef struct Target:
    uint32_t slots[TIERS]  # of the index; NO_SLOT: nothing was ever seen in that tier
    double freshness  # trust in what those slots say, 0..1
    int64_t queued_prefill_tokens
    int64_t private_blocks  # pinned by requests that share none
    uint64_t birth  # tells the targets apart that had this row one after the other; 0: the row is free
    uint32_t pinned_blocks  # distinct blocks that requests in flight share
    uint32_t active_requests
    uint32_t total_blocks  # capacity; 0: not known
    uint32_t lower_tiers  # how many of slots[1:] are set


cdef inline int64_t active_blocks(const Target* target) noexcept nogil:
    """Distinct blocks that requests in flight pin; a shared prefix counts once."""
    return target.pinned_blocks + target.private_blocks
