"""For the decider and for recordings: from a question to the row that is chosen, and rows as Python objects."""

from libc.stdint cimport int64_t, uint32_t

from kvrouter_grpc.core.mode cimport Caller, mode_scores
from kvrouter_grpc.core.pick cimport Dice, pick_lowest, pick_softmax
from kvrouter_grpc.core.policy cimport Policy
from kvrouter_grpc.core.question cimport Question
from kvrouter_grpc.core.target cimport Ledger


cdef class Choice:
    cdef readonly uint32_t row
    cdef readonly uint32_t blocks
    cdef readonly tuple tiers
    cdef readonly uint32_t in_flight
    cdef readonly int64_t cached_tokens
    cdef readonly int64_t new_tokens
    cdef readonly double freshness
    cdef readonly double cost
    cdef readonly tuple terms
    cdef readonly object recording


cdef Choice choice_of(const Question* question, uint32_t i, uint32_t blocks, Policy policy, bint with_terms)


cdef inline const uint32_t* tie_rows(const Question* question, Policy policy) noexcept:
    """The rows by whose requests ties are broken; NULL where a policy leaves all of them to chance."""
    return question.rows if policy.fewest_requests else NULL


cdef inline uint32_t choose(
    Question* question, const Caller* caller, Policy policy, const Ledger* ledgers, Dice* dice, double* scores
) noexcept:
    """Index of the row that a policy chooses; `scores` has room for all of them, and is of no use afterwards."""
    mode_scores(question, policy.mode, &policy.knobs, caller, ledgers, dice, scores)
    if policy.temperature > 0:
        return pick_softmax(scores, question.count, policy.temperature, dice)
    return pick_lowest(scores, question.count, tie_rows(question, policy), question.targets, dice)
