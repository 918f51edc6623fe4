from libc.stdint cimport int32_t, uint32_t, uint64_t

from kvrouter_grpc.core.cache_group cimport CacheGroup
from kvrouter_grpc.core.edge cimport Edge
from kvrouter_grpc.core.kv_fields cimport Event
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
    cdef CacheGroup* groups  # by their index
    cdef uint32_t group_count  # more than one: the model is a hybrid
    cdef bint rearranged  # the owner has to be told
    cdef bint postponed  # a store waits for the others of its step
    cdef Lot lot
    cdef bint closed

    cdef int take(self, Span payload, Applied applied) except -1
    cdef int _meet(self) except -1
    cdef int _make_groups(self, uint32_t count) except -1
    cdef void _foresee(self, const Event* event) noexcept
    cdef int _apply(self, Event* event, Applied applied) except -1
    cdef int _catch_up(self, uint64_t first, uint64_t end) except -1
    cdef int _stored(self, Event* event) except -1
    cdef void _forget(self, CacheGroup* group) noexcept
    cdef bint _learn(self, CacheGroup* group, uint32_t block_size) except? False
    cdef int _place(self, uint32_t lane) except -1
    cdef int32_t _slot(self, uint32_t lane) noexcept
    cdef bint _store(self, const Event* event) except? False
    cdef Edge* _find(self, uint32_t lane, uint64_t name, uint32_t* block) noexcept
    cdef int _store_known(self, const Event* event) except -1
    cdef Orphan* _gather(self, const uint64_t* names, uint32_t count, Orphan* pending) noexcept
    cdef int _adopt(self, Event* event) except -1
    cdef bint _store_orphan(self, Orphan* orphan) except? False
    cdef int _removed(self, Event* event) except -1
    cdef int _remove(self, uint32_t lane, const uint64_t* names, uint32_t count) except -1
