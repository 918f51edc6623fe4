from libc.stdint cimport int32_t, uint32_t, uint64_t

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
    cdef RadixTree tree  # None until the first blocks with tokens
    cdef uint32_t block_size  # 0 until then
    cdef int32_t[4] slots  # by tier; -1: none yet
    cdef public uint64_t other_groups  # bit set of the KV cache groups that hold no prefixes
    cdef Lot lot
    cdef bint closed

    cdef int take(self, Span payload, Applied applied) except -1
    cdef int _apply(self, Event* event, Applied applied) except -1
    cdef int _stored(self, Event* event) except -1
    cdef bint _learn(self, uint32_t block_size) except? False
    cdef int _place(self, uint32_t tier) except -1
    cdef bint _store(self, Event* event) except? False
    cdef Edge* _find(self, uint32_t tier, uint64_t name, uint32_t* block) noexcept
    cdef int _store_known(self, Event* event) except -1
    cdef Orphan* _gather(self, const uint64_t* names, uint32_t count, Orphan* pending) noexcept
    cdef int _adopt(self, Event* event) except -1
    cdef bint _store_orphan(self, Orphan* orphan) except? False
    cdef int _removed(self, Event* event) except -1
    cdef int _remove(self, uint32_t tier, const uint64_t* names, uint32_t count) except -1
