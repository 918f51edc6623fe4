from libc.stdint cimport uint32_t, uint64_t

from kvrouter_grpc.core.kv_fields cimport Event
from kvrouter_grpc.core.lanes cimport Lanes
from kvrouter_grpc.core.msgpack cimport Span
from kvrouter_grpc.core.orphans cimport Lot, Orphan
from kvrouter_grpc.core.radix_tree cimport RadixTree


cdef class Applied:
    cdef readonly uint64_t stored
    cdef readonly uint64_t removed
    cdef readonly uint32_t skipped
    cdef readonly bint cleared


cdef class KvFeed:
    cdef object learn
    cdef object place
    cdef object arrange
    cdef RadixTree tree  # None until the first blocks with tokens
    cdef Lanes lanes
    cdef bint rearranged  # the owner has to be told
    cdef bint postponed  # a store waits for the others of its step
    cdef Lot lot
    cdef bint closed

    cdef int take(self, Span payload, Applied applied) except -1
    cdef int _meet(self) except -1
    cdef void _foresee(self, const Event* event) noexcept
    cdef int _apply(self, Event* event, Applied applied) except -1
    cdef int _catch_up(self, uint64_t first, uint64_t end) except -1
    cdef int _stored(self, Event* event) except -1
    cdef void _forget(self, uint32_t group) noexcept
    cdef bint _learn(self, uint32_t index, uint32_t block_size) except? False
    cdef int _place(self, uint32_t lane) except -1
    cdef bint _store(self, const Event* event) except? False
    cdef int _store_known(self, const Event* event) except -1
    cdef int _adopt(self, Event* event) except -1
    cdef bint _store_orphan(self, Orphan* orphan) except? False
    cdef int _removed(self, Event* event) except -1
    cdef int _remove(self, uint32_t lane, const uint64_t* names, uint32_t count) except -1
