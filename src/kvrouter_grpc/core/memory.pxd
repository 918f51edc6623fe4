"""Counted memory: every byte the tree owns is asked for, and given back, through one function."""

from libc.stdlib cimport free, realloc


cdef struct Meter:
    size_t used  # bytes, with the allocator's own overhead
    size_t limit  # 0: none


cdef inline size_t footprint(size_t size) noexcept nogil:
    # What a general-purpose 64-bit allocator takes for `size` bytes: a header, rounded up, never below the
    # smallest chunk. Counting `size` alone would flatter small objects.
    if size == 0:
        return 0
    size = (size + 8 + 15) & ~<size_t>15
    return size if size > 32 else 32


cdef inline void* resize(Meter* meter, void* memory, size_t old, size_t new) noexcept nogil:
    """Grows, shrinks or frees (`new` = 0) a block; NULL: no memory, and the old block is still whole."""
    cdef size_t used = meter.used - footprint(old) + footprint(new)
    if new == 0:
        free(memory)
        meter.used = used
        return NULL
    if new > old and meter.limit != 0 and used > meter.limit:
        return NULL
    memory = realloc(memory, new)
    if memory != NULL:
        meter.used = used
    return memory


cdef inline void release(Meter* meter, void* memory, size_t size) noexcept nogil:
    resize(meter, memory, size, 0)
