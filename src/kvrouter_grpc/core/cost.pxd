"""What it costs to send a request to a target, term by term. The lowest sum wins.

`prefill_first` is the router's own policy; the others are published ones, for people who move over and for comparison.
`tests/reference/cost.py` has them all once more, written for readers. One more formula is: a function here and a line in
`Formula` and `cost_terms`, its name and terms in `policy.pyx` and `config/router.py`, and its twin.
"""

from libc.math cimport exp, tanh
from libc.stdint cimport int64_t, uint32_t

from kvrouter_grpc.core.overlap cimport Overlap, overlap_total
from kvrouter_grpc.core.target cimport Target, active_blocks


cdef enum Formula:
    PREFILL_FIRST
    DYNAMO
    DYNAMO_EXAMPLE
    LMETRIC


cdef enum:
    MOST_TERMS = 5  # of any formula; those that it does not have are 0
    MEMORY_WAIT = 10  # prompt tokens that one token of missing memory costs: it comes free when whole requests end
    REPLICATION = 2  # the term of `PREFILL_FIRST` that is only paid for the sake of others


cdef struct Weights:
    Formula formula
    double new_work_weight
    double request_weight
    double overlap_score_credit
    double held_worth  # the same for this router's formulas: no block saves more than itself
    double overlap_score_credit_decay
    double prefill_load_scale
    double decode_active_request_weight
    double host_cache_hit_weight
    double disk_cache_hit_weight
    double remote_cache_hit_weight
    bint shared_cache  # what one target has in the remote tier, all have
    bint track_active_blocks
    bint track_prefill_tokens
    bint assume_kv_reuse


# The request as the cost sees it.
cdef struct Ask:
    int64_t tokens  # of the prompt
    int64_t output_tokens  # that the answer is expected to have
    int64_t block_size  # at least 1
    int64_t usable_blocks  # that a cache can save: an engine computes at least the last token, and caches by block
    int64_t full_blocks  # of the prompt
    int64_t prompt_blocks  # the last one may be in part
    int64_t request_blocks  # prompt and expected output
    int64_t shortest_queue  # of all targets asked, in tokens; only where a formula asks for it, as the next
    uint32_t most_waiting  # requests without a first token, of all targets asked
    double least_new  # tokens to compute, of the target asked that lacks the fewest
    double regret  # tokens that requests have waited for the same prefix rather than have it computed once more


cdef inline void ask_init(Ask* ask, int64_t tokens, int64_t output_tokens, int64_t block_size) noexcept nogil:
    # Worked out once per request: a division takes longer than the rest of a target's cost.
    ask.tokens = tokens
    ask.output_tokens = output_tokens
    ask.block_size = block_size
    ask.usable_blocks = (tokens - 1) // block_size if tokens else 0
    ask.full_blocks = tokens // block_size
    ask.prompt_blocks = (tokens + block_size - 1) // block_size
    ask.request_blocks = (tokens + output_tokens + block_size - 1) // block_size
    ask.shortest_queue = 0
    ask.most_waiting = 0
    ask.least_new = 0
    ask.regret = 0


cdef inline bint is_own(Formula formula) noexcept nogil:
    """Whether a formula goes by this router's rules, not by published ones.

    Those are: what requests in flight pin counts as cached, an engine computes at least the last block, and equal
    costs go to the target with the fewest requests.
    """
    return formula == PREFILL_FIRST or formula == LMETRIC


cdef inline int64_t cached_tokens(const Overlap* overlap, const Ask* ask, const Weights* weights) noexcept nogil:
    """Tokens of the prompt that the engine should find cached; what its `cached_tokens` should say."""
    cdef int64_t blocks = overlap_total(overlap)
    if is_own(weights.formula) and overlap.in_flight > blocks:
        blocks = overlap.in_flight
    return min(blocks, ask.usable_blocks) * ask.block_size


cdef inline double weighted_blocks(const Overlap* overlap, const Weights* weights) noexcept nogil:
    """Blocks that a target holds, those of lower tiers by what they are worth."""
    cdef double blocks = overlap.tiers[0]
    if overlap.tiers[1] | overlap.tiers[2] | overlap.tiers[3]:
        blocks += weights.host_cache_hit_weight * overlap.tiers[1]
        blocks += weights.disk_cache_hit_weight * overlap.tiers[2]
        blocks += weights.remote_cache_hit_weight * overlap.tiers[3]
    return blocks


cdef inline double held_blocks(
    const Overlap* overlap, double freshness, const Ask* ask, const Weights* weights
) noexcept nogil:
    """Blocks that need not be computed, as this router counts: a block of a lower tier saves part of the work."""
    cdef double held = freshness * weighted_blocks(overlap, weights)
    return min(max(held, <double>overlap.in_flight), <double>ask.usable_blocks)


cdef inline double new_work(
    const Target* target, const Overlap* overlap, const Ask* ask, const Weights* weights
) noexcept nogil:
    """Tokens of the prompt that must be computed there, as far as the index is to be trusted and the caller wants it to."""
    cdef double held = weights.held_worth * held_blocks(overlap, target.freshness, ask, weights)
    return <double>ask.tokens - held * <double>ask.block_size


cdef inline int64_t new_tokens(const Overlap* overlap, const Ask* ask, const Weights* weights) noexcept nogil:
    """Tokens of the prompt that must be computed: what is booked as prefill load."""
    cdef double held
    if is_own(weights.formula):
        held = held_blocks(overlap, 1, ask, weights)
    else:
        held = weighted_blocks(overlap, weights)
    return max(0, ask.tokens - <int64_t>(held * <double>ask.block_size + 0.5))


cdef inline void cost_terms(
    const Target* target,
    const Overlap* overlap,
    const Ask* ask,
    const Weights* weights,
    double preference,
    double* terms,
) noexcept nogil:
    """Writes the `MOST_TERMS` terms of the cost.

    `preference`: sum of the request's preferences for the target's taints. It scales all terms, by e at the most.
    """
    cdef double factor
    cdef uint32_t i
    terms[3] = terms[4] = 0.0
    if weights.formula == PREFILL_FIRST:
        _prefill_first(target, overlap, ask, weights, terms)
    elif weights.formula == DYNAMO:
        _dynamo(target, overlap, ask, weights, terms)
    elif weights.formula == DYNAMO_EXAMPLE:
        _dynamo_example(target, overlap, ask, weights, terms)
    else:
        _lmetric(target, overlap, ask, weights, terms)
    if preference != 0:
        factor = exp(-tanh(preference))
        for i in range(<uint32_t>MOST_TERMS):
            terms[i] *= factor


cdef inline void _prefill_first(
    const Target* target, const Overlap* overlap, const Ask* ask, const Weights* weights, double* terms
) noexcept nogil:
    # queued + new + replication + requests + shortage, in tokens: the private wait before this prompt is computed; what
    # must be computed for it; k times what of that another target would not have to compute, since it delays everyone
    # after it and evicts other prefixes, less the regret of its prefix, see regret.pxd; a share of the steps and the
    # memory for each request there; and by how much the pinned blocks and this request exceed the cache, times MEMORY_WAIT.
    cdef double work = new_work(target, overlap, ask, weights)
    cdef double copied = weights.new_work_weight * (work - ask.least_new) - ask.regret
    cdef int64_t missing
    terms[0] = <double>target.queued_prefill_tokens if weights.track_prefill_tokens else 0.0
    terms[1] = work
    terms[REPLICATION] = 0.0 if copied < 0 else copied
    terms[3] = weights.request_weight * target.active_requests
    if target.total_blocks != 0 and weights.track_active_blocks:
        missing = active_blocks(target) + ask.request_blocks - overlap.in_flight - target.total_blocks
        if missing > 0:
            terms[4] = MEMORY_WAIT * <double>missing * <double>ask.block_size


cdef inline void _dynamo(
    const Target* target, const Overlap* overlap, const Ask* ask, const Weights* weights, double* terms
) noexcept nogil:
    # scale * max(0, raw_prefill - credit) + decode + w * requests, in blocks. The default selector of the Dynamo KV
    # router: `raw_prefill` is the queue plus the whole prompt, `credit` what is cached by tier (decayed on targets
    # whose queue is long), `decode` the blocks pinned with this request. Where prompts are not tracked, the credit
    # comes off decode.
    cdef double size = <double>ask.block_size
    cdef double excess = <double>(target.queued_prefill_tokens - ask.shortest_queue) / size
    cdef double decay = 1 / (1 + weights.overlap_score_credit_decay * excess / (ask.prompt_blocks if ask.prompt_blocks else 1))
    cdef double credit = target.freshness * (
        weights.overlap_score_credit * decay * overlap.tiers[0]
        + weights.host_cache_hit_weight * overlap.tiers[1]
        + weights.disk_cache_hit_weight * overlap.tiers[2]
        + weights.remote_cache_hit_weight * overlap.tiers[3]
    )
    cdef double prefill = 0.0
    cdef double decode = 0.0
    if weights.track_active_blocks:
        decode = <double>(
            active_blocks(target)
            + ask.full_blocks
            - (overlap.in_flight if weights.assume_kv_reuse else 0)
        )
    if weights.track_prefill_tokens:
        prefill = <double>(target.queued_prefill_tokens + ask.tokens) / size - credit
        prefill = weights.prefill_load_scale * (prefill if prefill > 0 else 0.0)
    else:
        decode = decode - credit if decode > credit else 0.0
    terms[0] = prefill
    terms[1] = decode
    terms[2] = weights.decode_active_request_weight * target.active_requests


cdef inline void _dynamo_example(
    const Target* target, const Overlap* overlap, const Ask* ask, const Weights* weights, double* terms
) noexcept nogil:
    # 2 * (1 - overlap) + usage + waiting: the score 2 * overlap - usage - waiting of Dynamo's example of a router,
    # turned round. All are shares: of the prompt that is cached, of the cache that is in use, and of the requests that
    # wait where most of them wait.
    cdef double cached = target.freshness * weighted_blocks(overlap, weights)
    terms[0] = 2.0
    if ask.tokens > 0:
        terms[0] -= 2 * cached * <double>ask.block_size / <double>ask.tokens
    terms[1] = 0.0
    if target.total_blocks != 0:
        terms[1] = min(1.0, <double>active_blocks(target) / target.total_blocks)
    terms[2] = <double>target.waiting_requests / ask.most_waiting if ask.most_waiting else 0.0


cdef inline void _lmetric(
    const Target* target, const Overlap* overlap, const Ask* ask, const Weights* weights, double* terms
) noexcept nogil:
    # prefill * (1 + requests), in tokens: what must be computed there before this prompt is, times the batch that it
    # joins. As a sum: the prefill, and once more for each request in flight.
    cdef double prefill = new_work(target, overlap, ask, weights)
    if weights.track_prefill_tokens:
        prefill += <double>target.queued_prefill_tokens
    terms[0] = prefill
    terms[1] = prefill * target.active_requests
    terms[2] = 0.0
