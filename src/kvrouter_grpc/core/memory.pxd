"""Counted memory: every byte the tree owns is asked for, and given back, through one function.

Debug and sanitized builds also count what lives in all trees of the process, see `memory.pyx`.
"""

from libc.stdint cimport int64_t
from libc.stdlib cimport free, realloc


cdef extern from *:
    """
    #ifdef KVROUTER_COUNTED
    #define KV_COUNTED 1
    #else
    #define KV_COUNTED 0
    #endif
    """
    enum:
        COUNTED "KV_COUNTED"


cdef struct Meter:
    size_t used  # bytes, with the allocator's own overhead
    size_t limit  # 0: none


# What lives in the whole process; kept by builds that are COUNTED only.
cdef struct Live:
    int64_t edges
    int64_t runs
    int64_t allocations
    int64_t bytes


cdef Live LIVE


cdef inline size_t footprint(size_t size) noexcept nogil:
    # What a general-purpose 64-bit allocator takes for `size` bytes: a header, rounded up, never below the
    # smallest chunk. Counting `size` alone would flatter small objects.
    if size == 0:
        return 0
    size = (size + 8 + 15) & ~<size_t>15
    return size if size > 32 else 32


cdef inline void _count(size_t old, size_t new) noexcept nogil:
    LIVE.allocations += (new != 0) - (old != 0)
    LIVE.bytes += <int64_t>new - <int64_t>old


cdef inline void* resize(Meter* meter, void* memory, size_t old, size_t new) noexcept nogil:
    """Grows, shrinks or frees (`new` = 0) a block; NULL: no memory, and the old block is still whole."""
    cdef size_t used = meter.used - footprint(old) + footprint(new)
    if new == 0:
        free(memory)
        meter.used = used
        if COUNTED:
            _count(old, 0)
        return NULL
    if new > old and meter.limit != 0 and used > meter.limit:
        return NULL
    memory = realloc(memory, new)
    if memory != NULL:
        meter.used = used
        if COUNTED:
            _count(old, new)
    return memory


cdef inline void release(Meter* meter, void* memory, size_t size) noexcept nogil:
    resize(meter, memory, size, 0)
