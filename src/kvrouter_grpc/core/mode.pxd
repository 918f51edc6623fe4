"""What every mode scores targets by. The lowest score is picked, or drawn from by a softmax; infinity is never chosen.

`tests/reference/mode.py` has the modes once more, written for readers.
"""

from libc.math cimport INFINITY, ceil
from libc.stdint cimport uint32_t, uint64_t

from kvrouter_grpc.core.cost cimport held_blocks
from kvrouter_grpc.core.pick cimport Dice, dice_below, scramble
from kvrouter_grpc.core.question cimport Question, question_costs, question_target
from kvrouter_grpc.core.target cimport Ledger


cdef enum Mode:
    LOWEST_COST
    IN_TURN
    BY_CHANCE
    POWER_OF_TWO
    LEAST_LOADED
    DEVICE_AWARE
    SESSION
    LONGEST_PREFIX
    KV_AWARE


cdef struct Knobs:
    double session_load_bound  # of the mean number of requests that a target may have
    double prefix_threshold  # tokens that a match must have to count
    double kv_aware_threshold  # tokens that a match may lack and still count
    double accelerator_to_cpu_ratio


# Who asks, beside the prompt.
cdef struct Caller:
    uint64_t turn  # of mode round-robin
    uint64_t session  # key
    bint has_session


cdef inline void mode_scores(
    Question* question,
    Mode mode,
    const Knobs* knobs,
    const Caller* caller,
    const Ledger* ledgers,
    Dice* dice,
    double* scores,
) noexcept nogil:
    """Writes the score of every row that is asked."""
    cdef uint32_t i
    if mode == LOWEST_COST:
        question.least_private = question_costs(question, 0, question.count, scores, NULL)
    elif mode == IN_TURN:
        _only(question, <uint32_t>(caller.turn % question.count), scores)
    elif mode == BY_CHANCE:
        for i in range(question.count):
            scores[i] = 0
    elif mode == POWER_OF_TWO:
        _power_of_two(question, dice, scores)
    elif mode == LEAST_LOADED:
        _least_loaded(question, scores)
    elif mode == DEVICE_AWARE:
        _device_aware(question, knobs, scores)
    elif mode == SESSION:
        _session(question, knobs, caller, ledgers, scores)
    elif mode == LONGEST_PREFIX:
        if not _longest_prefix(question, knobs.prefix_threshold, scores):
            _least_loaded(question, scores)
    elif not _longest_prefix(question, <double>question.ask.tokens - knobs.kv_aware_threshold, scores):
        _session(question, knobs, caller, ledgers, scores)


cdef inline void _only(const Question* question, uint32_t chosen, double* scores) noexcept nogil:
    cdef uint32_t i
    for i in range(question.count):
        scores[i] = INFINITY
    scores[chosen] = 0


cdef inline void _least_loaded(const Question* question, double* scores) noexcept nogil:
    cdef uint32_t i
    for i in range(question.count):
        scores[i] = question_target(question, i).active_requests


cdef inline void _power_of_two(const Question* question, Dice* dice, double* scores) noexcept nogil:
    # The less busy of two different rows, each pair as likely as any other.
    cdef uint32_t one = dice_below(dice, question.count)
    cdef uint32_t other = one
    if question.count > 1:
        other = dice_below(dice, question.count - 1)
        other += other >= one
    _only(question, one, scores)
    scores[one] = question_target(question, one).active_requests
    scores[other] = question_target(question, other).active_requests


cdef inline void _device_aware(const Question* question, const Knobs* knobs, double* scores) noexcept nogil:
    # Targets on CPUs get a request while they have fewer than their share: an accelerator is worth `ratio` of them.
    # Within a kind, the least loaded.
    cdef uint64_t requests[2]
    cdef uint64_t count[2]
    cdef double share
    cdef bint on_cpu
    cdef uint32_t i
    requests[0] = requests[1] = count[0] = count[1] = 0
    for i in range(question.count):
        on_cpu = question_target(question, i).on_cpu
        count[on_cpu] += 1
        requests[on_cpu] += question_target(question, i).active_requests
    on_cpu = count[0] == 0
    if count[0] and count[1]:
        share = <double>requests[0] * <double>count[1] / (knobs.accelerator_to_cpu_ratio * <double>count[0])
        # Whole requests, as the original counts them.
        on_cpu = requests[1] < <uint64_t>share
    for i in range(question.count):
        scores[i] = INFINITY
        if question_target(question, i).on_cpu == on_cpu:
            scores[i] = question_target(question, i).active_requests


cdef inline void _session(
    const Question* question, const Knobs* knobs, const Caller* caller, const Ledger* ledgers, double* scores
) noexcept nogil:
    # Rendezvous hashing with bounded load: every session ranks all targets in an order of its own, and takes the first
    # that is not too busy. A target that goes or comes moves only the sessions that had or will have it.
    cdef uint64_t requests = 0
    cdef uint64_t best = 0
    cdef uint64_t weight
    cdef double bound
    cdef uint32_t chosen = question.count
    cdef uint32_t i
    if not caller.has_session:
        _least_loaded(question, scores)
        return
    for i in range(question.count):
        requests += question_target(question, i).active_requests
    bound = ceil(knobs.session_load_bound * <double>(requests + 1) / <double>question.count)
    for i in range(question.count):
        if question_target(question, i).active_requests < bound:
            weight = scramble(caller.session ^ ledgers[question.rows[i]].identity)
            if chosen == question.count or weight > best:
                best = weight
                chosen = i
    # The least busy one is always below the bound, since that is not below the mean.
    _only(question, chosen if chosen < question.count else 0, scores)


cdef inline bint _longest_prefix(const Question* question, double least, double* scores) noexcept nogil:
    # Scores by the blocks that are held or on their way. False when the longest match is none or shorter than `least`
    # tokens.
    cdef double longest = 0
    cdef double held
    cdef uint32_t i
    for i in range(question.count):
        held = held_blocks(
            &question.overlaps[i], question_target(question, i).freshness, &question.ask, question.weights
        )
        scores[i] = -held
        longest = max(longest, held)
    return longest > 0 and longest * <double>question.ask.block_size >= least
