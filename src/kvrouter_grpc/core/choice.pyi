from kvrouter_grpc.core.recording import Recording

class Choice:
    """One row as the decision saw it."""

    row: int
    blocks: int
    """Full blocks of the prompt."""
    tiers: tuple[int, int, int, int]
    """Blocks that the target holds on device, in host memory, on disk and remotely, each where the one before ends."""
    in_flight: int
    """Leading blocks that requests in flight on the target pin."""
    cached_tokens: int
    """Tokens of the prompt that the engine should find cached: whole blocks, never the last token."""
    new_tokens: int
    """Tokens of the prompt that must be computed, as the cost counts them: what is booked as prefill load."""
    freshness: float
    cost: float
    """The sum of its terms; infinity for what is no number."""
    terms: tuple[float, ...] | None
    """Of the cost, in the order of `Policy.terms`; None unless explained."""
    recording: Recording | None
    """The decision with everything that it read; None unless explained."""
