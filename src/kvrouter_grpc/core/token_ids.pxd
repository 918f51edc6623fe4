"""Token ids where they lie, for other extension modules."""

from libc.stdint cimport uint32_t


cdef class TokenIds:
    cdef bytes owner  # keeps the memory
    cdef const unsigned char* data  # little-endian u32, at any address
    cdef Py_ssize_t count
    cdef Py_ssize_t stride
    cpdef bint fit(self, Py_ssize_t most, uint32_t end) noexcept


cdef TokenIds token_ids_in(bytes owner, const unsigned char* data, Py_ssize_t count)
