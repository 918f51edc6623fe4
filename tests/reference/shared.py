"""What a target has of a prompt when it can read what others have put into remote storage, block by block."""

from collections.abc import Container, Sequence


def overlap(held: Sequence[Container[int]], shared: Container[int] | None, length: int) -> tuple[int, ...]:
    """Blocks of a prompt by tier, each tier going on where the one before ends.

    Args:
        held: Positions that the target holds, by tier, remote storage last.
        shared: Positions that anybody has put into remote storage; None: what others have there does not count.
        length: Blocks of the prompt.
    """
    tiers = list(held)
    if shared is not None:
        tiers[-1] = shared
    depth, found = 0, []
    for tier in tiers:
        end = depth
        while end < length and end in tier:
            end += 1
        found.append(end - depth)
        depth = end
    return tuple(found)
