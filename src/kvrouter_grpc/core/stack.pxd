"""Memory that grows at its end and is used again: what a message says lies there until the next one comes."""

from libc.stdint cimport uint64_t
from libc.stdlib cimport free, realloc


cdef struct Stack:
    char* data
    size_t used  # bytes
    size_t capacity


cdef enum:
    KEPT = 1 << 20  # bytes that stay for the next message


cdef inline void* stack_push(Stack* stack, size_t size, uint64_t* offset) noexcept nogil:
    """Room for `size` bytes, to be known by its offset (later pushes may move it); NULL: no memory."""
    cdef size_t needed = stack.used + size
    cdef size_t capacity = stack.capacity
    cdef char* grown
    if needed > capacity or stack.data == NULL:
        capacity = capacity + capacity // 2 + 1024
        if capacity < needed:
            capacity = needed
        grown = <char*>realloc(stack.data, capacity)
        if grown == NULL:
            return NULL
        stack.data = grown
        stack.capacity = capacity
    offset[0] = stack.used
    stack.used = needed
    return stack.data + offset[0]


cdef inline void stack_reset(Stack* stack) noexcept nogil:
    """Forgets what lies there, and gives back what only a giant message needs."""
    stack.used = 0
    if stack.capacity > KEPT:
        free(stack.data)
        stack.data = NULL
        stack.capacity = 0
