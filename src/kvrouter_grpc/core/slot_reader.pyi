from kvrouter_grpc.core.radix_tree import RadixTree

def read_slot(tree: RadixTree, slot: int, data: bytes) -> None:
    """Put back what `write_slot` wrote into an empty slot, of this tree or of another one.

    Matches and removals are then what they were. The bytes may be anything: a checksum is the caller's business, memory
    is taken in proportion to their size, and the tree stays consistent whatever they say.

    Raises:
        KeyError: The slot is not in use.
        ValueError: The bytes are not those of a slot, or it holds something; nothing was changed.
        MemoryError: There was none; the slot is empty.
    """
