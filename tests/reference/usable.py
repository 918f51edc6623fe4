"""The twin of `core/overlap.pxd`: the prefix that all KV cache groups of a target leave usable, tried out cut by cut."""

TIERS = 4


def usable(groups, step, most):
    """Blocks by tier.

    Args:
        groups: Of each its window in blocks (0: all) and, by tier, the set of the prompt's positions that it holds.
        step: A cut is a multiple of this.
        most: The highest cut.
    """
    reach = [0] * len(groups)
    total, found = 0, []
    for tier in range(TIERS):
        cut = 0
        if any(held[tier] is not None for _, held in groups):
            for i, (window, held) in enumerate(groups):
                while window == 0 and reach[i] in (held[tier] or ()):
                    reach[i] += 1
            ends = [most, *(reach[i] for i, (window, _) in enumerate(groups) if window == 0)]
            cuts = [cut for cut in range(0, min(ends) + 1, step) if all(fits(cut, *group, tier) for group in groups)]
            cut = max(cuts)
        found.append(max(0, cut - total))
        total = max(total, cut)
    return tuple(found)


def fits(cut, window, held, tier):
    return window == 0 or all(block in (held[tier] or ()) for block in range(max(0, cut - window), cut))
