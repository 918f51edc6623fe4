"""Choosing among costs, and the generator of the random choices.

The generator is SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014): one word
of state, any seed is good, and a run with the same seed repeats its choices.
"""

from libc.math cimport INFINITY, exp
from libc.stdint cimport UINT32_MAX, uint32_t, uint64_t

from kvrouter_grpc.core.target cimport Target


cdef struct Dice:
    uint64_t state


cdef inline uint64_t scramble(uint64_t word) noexcept nogil:
    """The finalizer of SplitMix64: a permutation of words in which every bit depends on all."""
    word = (word ^ (word >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * <uint64_t>0x94D049BB133111EB
    return word ^ (word >> 31)


cdef inline uint64_t dice_next(Dice* dice) noexcept nogil:
    dice.state += <uint64_t>0x9E3779B97F4A7C15
    return scramble(dice.state)


cdef inline uint32_t dice_below(Dice* dice, uint32_t end) noexcept nogil:
    """A number in 0..end-1, uniform but for a bias of end / 2**32."""
    return <uint32_t>(((dice_next(dice) >> 32) * end) >> 32)


cdef inline double dice_unit(Dice* dice) noexcept nogil:
    """A number in [0, 1) with 53 random bits."""
    return <double>(dice_next(dice) >> 11) * (1.0 / 9007199254740992.0)


cdef inline uint32_t pick_lowest(
    const double* scores, uint32_t count, const uint32_t* rows, const Target* targets, Dice* dice
) noexcept nogil:
    """Index of the lowest score. Ties go to the targets with the fewest requests (`rows` NULL: not asked), then evenly.

    Args:
        scores: What is compared.
        count: How many, at least one.
        rows: Of the targets, parallel to `scores`.
        targets: By row; looked at only in a tie.
        dice: Of the last choice.
    """
    cdef double lowest = scores[0]
    cdef uint32_t fewest = UINT32_MAX
    cdef uint32_t best = 0
    cdef uint32_t tied = 1
    cdef uint32_t requests
    cdef uint32_t i
    for i in range(1, count):
        if scores[i] < lowest:
            lowest = scores[i]
            best = i
            tied = 1
        elif scores[i] == lowest:
            tied += 1
    if tied == 1:
        return best
    if rows != NULL:
        for i in range(best, count):
            if scores[i] == lowest:
                requests = targets[rows[i]].active_requests
                if requests < fewest:
                    fewest = requests
                    best = i
                    tied = 1
                elif requests == fewest:
                    tied += 1
        if tied == 1:
            return best
    tied = dice_below(dice, tied)
    for i in range(best, count):
        if scores[i] == lowest and (rows == NULL or targets[rows[i]].active_requests == fewest):
            if tied == 0:
                return i
            tied -= 1
    return best


cdef inline double softmax_weights(double* costs, uint32_t count, double temperature) noexcept nogil:
    """Overwrites costs with `exp(-(cost - min) / ((max - min) * temperature))`; gives their sum.

    The contract's min-max normalised softmax: the temperature means the same whatever the costs' unit. All are 1 when
    all costs are equal. What costs infinity weighs nothing while anything else weighs something.
    """
    cdef double low = INFINITY
    cdef double high = -INFINITY
    cdef double total = 0
    cdef uint32_t i
    for i in range(count):
        if costs[i] < low:
            low = costs[i]
        if costs[i] > high and costs[i] < INFINITY:
            high = costs[i]
    for i in range(count):
        if costs[i] == low:
            costs[i] = 1
        elif costs[i] < INFINITY:
            costs[i] = exp(-(costs[i] - low) / ((high - low) * temperature))
        else:
            costs[i] = 0
        total += costs[i]
    return total


cdef inline uint32_t pick_softmax(double* costs, uint32_t count, double temperature, Dice* dice) noexcept nogil:
    """Index drawn by the weights of a softmax. `costs` is overwritten."""
    cdef double total = softmax_weights(costs, count, temperature)
    cdef uint32_t last = 0
    cdef uint32_t i
    total *= dice_unit(dice)
    for i in range(count):
        if costs[i] > 0:
            last = i
            total -= costs[i]
            if total < 0:
                break
    return last


cdef inline void chances(
    double* scores, uint32_t count, const uint32_t* rows, const Target* targets, double temperature
) noexcept nogil:
    """Overwrites scores with how likely each is to be picked; arguments as for `pick_lowest` and `pick_softmax`."""
    cdef double lowest = INFINITY
    cdef double total = 0
    cdef uint32_t fewest = UINT32_MAX
    cdef uint32_t i
    if temperature > 0:
        total = softmax_weights(scores, count, temperature)
    else:
        for i in range(count):
            lowest = min(lowest, scores[i])
        for i in range(count):
            if rows != NULL and scores[i] == lowest:
                fewest = min(fewest, targets[rows[i]].active_requests)
        for i in range(count):
            scores[i] = scores[i] == lowest and (rows == NULL or targets[rows[i]].active_requests == fewest)
            total += scores[i]
    for i in range(count):
        scores[i] /= total
