"""What is known of the KV cache groups of one engine's model, from its own stores.

Most models have one group; hybrid ones have several, numbered from 0, each with blocks of its own. A *lane* is a group
in a tier: `group * KV_TIERS + tier`.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from kvrouter_grpc.core.kv_fields cimport Batch, Event
from kvrouter_grpc.core.kv_words cimport (
    EVENT_STORED,
    KV_TIERS,
    SPEC_NOTHING,
    SPEC_OTHER,
    SPEC_PREFIX,
    SPEC_STATE,
    SPEC_UNTOLD,
    SPEC_WINDOW,
)


cdef enum:
    UNPLACED = -1


cdef struct CacheGroup:
    uint32_t window  # tokens, of sliding windows
    uint32_t block_size  # tokens; 0: none of its blocks are indexed yet
    uint32_t width  # blocks of the tree that one of its blocks spans
    int32_t[KV_TIERS] slots  # by tier
    uint8_t spec


cdef inline void group_init(CacheGroup* group) noexcept nogil:
    cdef int tier
    group.window = group.block_size = group.width = 0
    group.spec = SPEC_UNTOLD
    for tier in range(KV_TIERS):
        group.slots[tier] = UNPLACED


cdef inline bint group_is_judged(const CacheGroup* group) noexcept nogil:
    """Whether it is known what the group's blocks say about prefixes."""
    return SPEC_PREFIX <= group.spec <= SPEC_STATE


cdef inline bint group_tell(CacheGroup* group, const Event* event) noexcept nogil:
    """Notes what a store says of its group; whether that is new."""
    cdef uint8_t spec = event.spec
    cdef uint32_t window = event.window if spec == SPEC_WINDOW else 0
    if spec == SPEC_UNTOLD:
        spec = group.spec
        window = group.window
        if spec == SPEC_UNTOLD:  # before 0.22 vLLM did not tell; the first group is the one that counts
            spec = SPEC_PREFIX if event.group == 0 else SPEC_OTHER
    if spec == SPEC_WINDOW and window == 0:
        spec = SPEC_OTHER
    if spec == group.spec and window == group.window:
        return False
    group.spec = spec
    group.window = window
    return True


cdef inline uint32_t groups_told(const Batch* batch, uint32_t known) noexcept nogil:
    """How many groups there are at least, after this message."""
    cdef const Event* event = <const Event*>batch.events.data
    cdef size_t i
    for i in range(batch.events.used // sizeof(Event)):
        if event[i].kind == EVENT_STORED and event[i].group >= known:
            known = event[i].group + 1
    return known


cdef inline uint32_t _gcd(uint32_t one, uint32_t other) noexcept nogil:
    cdef uint32_t rest
    while other != 0:
        rest = one % other
        one = other
        other = rest
    return one


cdef inline uint32_t unit_told(const Batch* batch) noexcept nogil:
    """The largest block size that divides those of all stores with tokens; 0: there are none."""
    cdef const Event* event = <const Event*>batch.events.data
    cdef uint32_t unit = 0
    cdef size_t i
    for i in range(batch.events.used // sizeof(Event)):
        if event[i].kind == EVENT_STORED and event[i].has_tokens and event[i].spec != SPEC_NOTHING:
            unit = _gcd(unit, event[i].block_size)
    return unit
