"""For the decider: where decisions are remembered."""

from libc.stdint cimport uint64_t

from kvrouter_grpc.core.recording cimport Recording


cdef class DecisionLog:
    cdef readonly uint64_t size
    cdef readonly uint64_t count
    cdef readonly uint64_t oldest
    cdef readonly size_t bytes
    cdef readonly bint hashes
    cdef list ring
    cdef void _drop(self)
    cdef void put(self, Recording recording)
