"""What it costs to send a request to a target, term by term. The lowest sum wins.

`prefill_first` is the router's own policy, `dynamo` the published formula of the Dynamo KV router, for people who move
over and for comparison. `tests/reference/cost.py` has both once more, written for readers.
"""

from libc.math cimport exp, tanh
from libc.stdint cimport int64_t, uint32_t

from kvrouter_grpc.core.target cimport TIERS, Target, active_blocks


cdef enum Formula:
    PREFILL_FIRST
    DYNAMO


cdef enum:
    TERMS = 3  # of either formula


cdef struct Weights:
    Formula formula
    double new_work_weight
    double overlap_score_credit
    double overlap_score_credit_decay
    double prefill_load_scale
    double decode_active_request_weight
    double host_cache_hit_weight
    double disk_cache_hit_weight
    bint track_active_blocks
    bint track_prefill_tokens
    bint assume_kv_reuse


# The request as the cost sees it.
cdef struct Ask:
    int64_t tokens  # of the prompt
    int64_t block_size  # at least 1
    int64_t usable_blocks  # that a cache can save: an engine computes at least the last token, and caches by block
    int64_t full_blocks  # of the prompt
    int64_t prompt_blocks  # the last one may be in part
    int64_t request_blocks  # prompt and expected output
    int64_t shortest_queue  # of all targets asked, in tokens


# What one target has of the prompt.
cdef struct Overlap:
    uint32_t tiers[TIERS]  # blocks, each tier going on where the one before ends
    uint32_t in_flight  # leading blocks that requests in flight pin: they will be cached before this one is computed


cdef inline int64_t overlap_total(const Overlap* overlap) noexcept nogil:
    return <int64_t>overlap.tiers[0] + overlap.tiers[1] + overlap.tiers[2] + overlap.tiers[3]


cdef inline void ask_init(Ask* ask, int64_t tokens, int64_t output_tokens, int64_t block_size) noexcept nogil:
    # Worked out once per request: a division takes longer than the rest of a target's cost.
    ask.tokens = tokens
    ask.block_size = block_size
    ask.usable_blocks = (tokens - 1) // block_size if tokens else 0
    ask.full_blocks = tokens // block_size
    ask.prompt_blocks = (tokens + block_size - 1) // block_size
    ask.request_blocks = (tokens + output_tokens + block_size - 1) // block_size
    ask.shortest_queue = 0


cdef inline int64_t cached_tokens(const Overlap* overlap, bint with_in_flight, const Ask* ask) noexcept nogil:
    """Tokens of the prompt that the engine should find cached; what its `cached_tokens` should say."""
    cdef int64_t blocks = overlap_total(overlap)
    if with_in_flight and overlap.in_flight > blocks:
        blocks = overlap.in_flight
    if blocks > ask.usable_blocks:
        blocks = ask.usable_blocks
    return blocks * ask.block_size


cdef inline void cost_terms(
    const Target* target,
    const Overlap* overlap,
    const Ask* ask,
    const Weights* weights,
    double preference,
    double* terms,
) noexcept nogil:
    """Writes the `TERMS` terms of the cost. `preference`: sum of the request's preferences for the target's taints."""
    if weights.formula == PREFILL_FIRST:
        _prefill_first(target, overlap, ask, weights, terms)
    else:
        _dynamo(target, overlap, ask, weights, preference, terms)


cdef inline void _prefill_first(
    const Target* target, const Overlap* overlap, const Ask* ask, const Weights* weights, double* terms
) noexcept nogil:
    # queued + (1 + k) * new + shortage, in tokens: the private wait before this prompt is computed; what must be
    # computed for it, which delays everyone after it and evicts other prefixes, hence its own weight; and by how
    # much the pinned blocks and this request exceed the cache.
    cdef double held = <double>overlap_total(overlap) * target.freshness
    cdef int64_t missing
    if overlap.in_flight > held:
        held = overlap.in_flight
    if held > <double>ask.usable_blocks:
        held = <double>ask.usable_blocks
    terms[0] = <double>target.queued_prefill_tokens if weights.track_prefill_tokens else 0.0
    terms[1] = (1 + weights.new_work_weight) * (<double>ask.tokens - held * <double>ask.block_size)
    terms[2] = 0.0
    if target.total_blocks != 0 and weights.track_active_blocks:
        missing = active_blocks(target) + ask.request_blocks - overlap.in_flight - target.total_blocks
        if missing > 0:
            terms[2] = <double>missing * <double>ask.block_size


cdef inline void _dynamo(
    const Target* target,
    const Overlap* overlap,
    const Ask* ask,
    const Weights* weights,
    double preference,
    double* terms,
) noexcept nogil:
    # scale * max(0, raw_prefill - credit) + decode + w * requests, in blocks, times the taint preference. The default
    # selector of the Dynamo KV router: `raw_prefill` is the queue plus the whole prompt, `credit` what is cached by
    # tier (decayed on targets whose queue is long), `decode` the blocks pinned with this request.
    cdef double size = <double>ask.block_size
    cdef double excess = <double>(target.queued_prefill_tokens - ask.shortest_queue) / size
    cdef double decay = 1 / (1 + weights.overlap_score_credit_decay * excess / (ask.prompt_blocks if ask.prompt_blocks else 1))
    cdef double credit = target.freshness * (
        weights.overlap_score_credit * decay * overlap.tiers[0]
        + weights.host_cache_hit_weight * overlap.tiers[1]
        + weights.disk_cache_hit_weight * <double>(<int64_t>overlap.tiers[2] + overlap.tiers[3])
    )
    cdef double prefill = 0.0
    cdef double decode = 0.0
    cdef double factor = 1.0
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
    if preference != 0:
        factor = exp(-tanh(preference))
    terms[0] = prefill * factor
    terms[1] = decode * factor
    terms[2] = weights.decode_active_request_weight * target.active_requests * factor
