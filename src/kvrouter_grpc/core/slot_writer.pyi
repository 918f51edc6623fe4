from kvrouter_grpc.core.radix_tree import RadixTree

def write_slot(tree: RadixTree, slot: int) -> bytes:
    """What a slot holds, as bytes: engine hashes, how often each was stored, and the blocks they name.

    About 16 bytes and 10 ns per block, in one piece: nothing can change meanwhile.

    Raises:
        KeyError: The slot is not in use.
        MemoryError: There was none, or the slot needs more than 2**28 blocks.
    """
