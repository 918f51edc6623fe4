"""Everything that the cost of a row is worked out from, in one place."""

from libc.math cimport INFINITY, isnan
from libc.stdint cimport INT64_MAX, int64_t, uint32_t
from libc.string cimport memcpy, memset

from kvrouter_grpc.core.cost cimport (
    DYNAMO,
    DYNAMO_EXAMPLE,
    MOST_TERMS,
    PREFILL_FIRST,
    REPLICATION,
    Ask,
    Weights,
    cost_terms,
    new_work,
)
from kvrouter_grpc.core.overlap cimport Overlap, overlap_total
from kvrouter_grpc.core.target cimport Target


cdef struct Question:
    const Weights* weights
    Ask ask
    const uint32_t* rows  # that are asked
    const double* preferences  # parallel to `rows`, or NULL
    const Overlap* overlaps  # parallel to `rows`: what each has of the prompt
    uint32_t count
    uint32_t deepest  # blocks that the row has which has most of the prompt
    const Target* targets  # by row
    double least_private  # of the costs of all rows, without what is paid for the sake of others


cdef inline const Target* question_target(const Question* question, uint32_t i) noexcept nogil:
    return &question.targets[question.rows[i]]


cdef inline double question_costs(
    const Question* question, uint32_t first, uint32_t end, double* costs, double* last_terms
) noexcept nogil:
    """The costs of the rows that are asked from `first` to before `end`.

    One function for one row and for all, so that there is one copy of the formulas, compiled into the loop.

    Args:
        question: What is asked.
        first: The first of the rows.
        end: Where they end; behind `first`.
        costs: Of each of them.
        last_terms: The `MOST_TERMS` terms of the last one's cost; may be NULL.

    Returns:
        The least of them without what is paid for the sake of others.
    """
    cdef double terms[MOST_TERMS]
    cdef double least = INFINITY
    cdef double cost
    cdef uint32_t i
    memset(terms, 0, sizeof(terms))
    for i in range(first, end):
        cost_terms(
            question_target(question, i),
            &question.overlaps[i],
            &question.ask,
            question.weights,
            question.preferences[i] if question.preferences != NULL else 0,
            terms,
        )
        cost = terms[0] + terms[1] + terms[2] + terms[3] + terms[4]
        # What is no number is worse than any number, and compares with others.
        costs[i - first] = cost = INFINITY if isnan(cost) else cost
        least = min(least, cost - terms[REPLICATION])
    if last_terms != NULL:
        memcpy(last_terms, terms, sizeof(terms))
    return least


cdef inline void question_compare(Question* question) noexcept nogil:
    """Works out what the formula asks of all rows together."""
    cdef const Overlap* overlap
    cdef int64_t blocks
    cdef double work
    cdef uint32_t i
    question.deepest = 0
    if question.weights.formula == PREFILL_FIRST:
        question.ask.least_new = <double>question.ask.tokens
        for i in range(question.count):
            overlap = &question.overlaps[i]
            blocks = min(max(overlap_total(overlap), <int64_t>overlap.in_flight), question.ask.usable_blocks)
            question.deepest = max(question.deepest, <uint32_t>blocks)
            # No block saves more than all of its tokens, so few rows have to be worked out.
            if <double>(question.ask.tokens - blocks * question.ask.block_size) < question.ask.least_new:
                work = new_work(question_target(question, i), overlap, &question.ask, question.weights)
                question.ask.least_new = min(question.ask.least_new, work)
    elif question.weights.formula == DYNAMO and question.weights.overlap_score_credit_decay != 0:
        question.ask.shortest_queue = INT64_MAX
        for i in range(question.count):
            question.ask.shortest_queue = min(
                question.ask.shortest_queue, question_target(question, i).queued_prefill_tokens
            )
    elif question.weights.formula == DYNAMO_EXAMPLE:
        for i in range(question.count):
            question.ask.most_waiting = max(question.ask.most_waiting, question_target(question, i).waiting_requests)


cdef inline double question_loss(const Question* question, uint32_t chosen) noexcept nogil:
    """Tokens by which the chosen row is worse for this request than the best; -1 when it computes a prefix anew.

    What is paid for the sake of others does not count. All rows have been scored by their costs.
    """
    cdef double work = new_work(
        question_target(question, chosen), &question.overlaps[chosen], &question.ask, question.weights
    )
    cdef double cost
    # Not its term of the cost, which the request's preferences scale.
    if work > question.ask.least_new:
        return -1
    return question_costs(question, chosen, chosen + 1, &cost, NULL) - question.least_private
