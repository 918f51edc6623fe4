"""For the decider and the log: a decision with everything that it read."""

from libc.stdint cimport uint32_t, uint64_t

from kvrouter_grpc.core.cost cimport Ask
from kvrouter_grpc.core.mode cimport Caller
from kvrouter_grpc.core.overlap cimport Overlap
from kvrouter_grpc.core.pick cimport Dice
from kvrouter_grpc.core.policy cimport Policy
from kvrouter_grpc.core.question cimport Question
from kvrouter_grpc.core.target cimport Ledger, Target


cdef class Recording:
    cdef readonly Policy policy
    cdef readonly object occasion
    cdef readonly str request_id
    cdef readonly object sequence
    cdef readonly double at
    cdef readonly uint32_t count
    cdef readonly uint32_t picked
    cdef readonly uint32_t blocks
    cdef Ask ask
    cdef Caller caller
    cdef Dice dice  # before the choice
    cdef void* memory  # one allocation for all arrays
    cdef size_t bytes
    cdef Target* targets
    cdef double* preferences  # NULL: none; so the next
    cdef uint64_t* identities
    cdef Overlap* overlaps
    cdef uint32_t* rows
    cdef int _room(self, uint32_t count, bint preferences, bint identities) except -1
    cdef int _ask_again(self, Policy policy, Question* question, uint32_t* rows) noexcept


cdef Recording record(
    const Question* question, const Caller* caller, const Ledger* ledgers, Dice dice, uint32_t picked, uint32_t blocks
)
