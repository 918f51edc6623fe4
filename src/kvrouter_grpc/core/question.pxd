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
from kvrouter_grpc.core.overlap cimport Found, Overlap, overlap_of, overlap_total
from kvrouter_grpc.core.target cimport Groups, Ledger, Target


cdef struct Question:
    const Weights* weights
    Ask ask
    const uint32_t* rows  # that are asked
    const double* preferences  # parallel to `rows`, or NULL
    uint32_t count
    const Target* targets  # by row
    const Ledger* ledgers  # by row
    const uint32_t* in_flight  # blocks of the prompt, by row
    Found found  # of the prompt in the index
    uint32_t deepest  # blocks that the row has which has most of the prompt
    const Overlap* known  # of every row that is asked, of a recording; NULL: they are looked up


cdef inline const Target* question_target(const Question* question, uint32_t i) noexcept nogil:
    return &question.targets[question.rows[i]]


cdef inline void question_overlap(const Question* question, uint32_t i, Overlap* overlap) noexcept nogil:
    """What the i-th row that is asked has of the prompt."""
    cdef const Target* target = question_target(question, i)
    cdef const Groups* groups = NULL
    if question.known != NULL:
        overlap[0] = question.known[i]
        return
    if target.grouped:
        groups = question.ledgers[question.rows[i]].groups
    overlap.in_flight = question.in_flight[question.rows[i]]
    overlap_of(target, groups, &question.found, <uint32_t>question.ask.usable_blocks, overlap)


cdef inline void question_costs(
    const Question* question, uint32_t first, uint32_t end, double* costs, Overlap* last_overlap, double* last_terms
) noexcept nogil:
    """The costs of the rows that are asked from `first` to before `end`.

    One function for one row and for all, so that there is one copy of the formulas, compiled into the loop.

    Args:
        question: What is asked.
        first: The first of the rows.
        end: Where they end; behind `first`.
        costs: Of each of them.
        last_overlap: What the last of them has of the prompt; may be NULL.
        last_terms: The `MOST_TERMS` terms of its cost; NULL with the other.
    """
    cdef Overlap overlap
    cdef double terms[MOST_TERMS]
    cdef double cost
    cdef uint32_t i
    memset(terms, 0, sizeof(terms))
    memset(&overlap, 0, sizeof(overlap))
    for i in range(first, end):
        question_overlap(question, i, &overlap)
        cost_terms(
            question_target(question, i),
            &overlap,
            &question.ask,
            question.weights,
            question.preferences[i] if question.preferences != NULL else 0,
            terms,
        )
        cost = terms[0] + terms[1] + terms[2] + terms[3] + terms[4]
        # What is no number is worse than any number, and compares with others.
        costs[i - first] = INFINITY if isnan(cost) else cost
    if last_overlap != NULL:
        last_overlap[0] = overlap
        memcpy(last_terms, terms, sizeof(terms))


cdef inline void question_compare(Question* question) noexcept nogil:
    """Works out what the formula asks of all rows together."""
    cdef Overlap overlap
    cdef int64_t blocks
    cdef double work
    cdef uint32_t i
    question.deepest = 0
    if question.weights.formula == PREFILL_FIRST:
        question.ask.least_new = <double>question.ask.tokens
        for i in range(question.count):
            question_overlap(question, i, &overlap)
            blocks = min(max(overlap_total(&overlap), <int64_t>overlap.in_flight), question.ask.usable_blocks)
            question.deepest = max(question.deepest, <uint32_t>blocks)
            # No block saves more than all of its tokens, so few rows have to be worked out.
            if <double>(question.ask.tokens - blocks * question.ask.block_size) < question.ask.least_new:
                work = new_work(question_target(question, i), &overlap, &question.ask, question.weights)
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

    What is paid for the sake of others does not count.
    """
    cdef Overlap overlap
    cdef double terms[MOST_TERMS]
    cdef double least = INFINITY
    cdef double own = 0
    cdef double cost
    cdef double work
    cdef uint32_t i
    for i in range(question.count):
        question_costs(question, i, i + 1, &cost, &overlap, terms)
        cost -= terms[REPLICATION]
        least = min(least, cost)
        if i == chosen:
            own = cost
            # Not its term of the cost, which the request's preferences scale.
            work = new_work(question_target(question, i), &overlap, &question.ask, question.weights)
            if work > question.ask.least_new:
                return -1
    return own - least
