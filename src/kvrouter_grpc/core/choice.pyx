"""`Choice`: one row as a decision saw it."""

cimport cython
from libc.stdint cimport uint32_t

from kvrouter_grpc.core.cost cimport MOST_TERMS, cached_tokens, new_tokens
from kvrouter_grpc.core.overlap cimport Overlap
from kvrouter_grpc.core.policy cimport Policy
from kvrouter_grpc.core.question cimport Question, question_costs, question_target


@cython.final
@cython.freelist(16)
cdef class Choice:
    """One row as the decision saw it; the full description is in `choice.pyi`."""


cdef Choice choice_of(const Question* question, uint32_t i, uint32_t blocks, Policy policy, bint with_terms):
    """The i-th row that is asked, of a prompt of so many blocks."""
    cdef Choice choice = Choice.__new__(Choice)
    cdef const Overlap* overlap = &question.overlaps[i]
    cdef double terms[MOST_TERMS]
    cdef double cost = 0
    question_costs(question, i, i + 1, &cost, terms)
    choice.cost = cost
    choice.row = question.rows[i]
    choice.blocks = blocks
    choice.tiers = (overlap.tiers[0], overlap.tiers[1], overlap.tiers[2], overlap.tiers[3])
    choice.in_flight = overlap.in_flight
    choice.cached_tokens = cached_tokens(overlap, &question.ask, question.weights)
    choice.new_tokens = new_tokens(overlap, &question.ask, question.weights)
    choice.freshness = question_target(question, i).freshness
    if with_terms:
        choice.terms = tuple([terms[j] for j in range(len(policy.terms))])
    return choice
