"""For other extension modules: the tree behind a `RadixTree`, to be read with `walk.pxd`."""

from libc.stdint cimport uint32_t, uint64_t

from kvrouter_grpc.core.edge cimport Edge
from kvrouter_grpc.core.tree cimport Tree


cdef class RadixTree:
    cdef Tree tree
    cdef readonly uint32_t block_size
    cdef uint32_t _slot(self, slot) except? 0
    cdef Edge* _find(self, uint32_t slot, uint64_t name, uint32_t* block) noexcept nogil
