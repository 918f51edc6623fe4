"""For the decider: the rows of a `TargetTable` and the trees they refer to."""

from libc.stdint cimport uint32_t, uint64_t

from kvrouter_grpc.core.radix_tree cimport RadixTree
from kvrouter_grpc.core.target cimport Groups, Ledger, Target


cdef class TargetTable:
    cdef Target* rows
    cdef Ledger* ledgers  # parallel to `rows`
    cdef uint32_t capacity  # of rows; those in use are the slots in use of `pins`
    cdef uint64_t births
    cdef uint64_t bookings  # in force
    cdef uint32_t on_path  # rows that need the path of a prompt: lower tiers or several KV cache groups
    cdef dict found  # target -> row
    cdef readonly uint64_t version
    cdef readonly RadixTree index
    cdef RadixTree pins
    cdef int _grow(self, uint32_t row) except -1
    cdef Target* _row(self, row) except NULL
    cdef bint _is_within(self, uint32_t row, double blocks, double prefill_tokens, double prefill_batches) noexcept
    cdef void _set_groups(self, uint32_t row, Groups* groups) noexcept
    cdef Target* _booked(self, uint64_t ticket, uint32_t* row) noexcept
