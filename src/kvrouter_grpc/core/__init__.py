"""The compiled core: block hashes, the radix tree of cached blocks, engine events. It knows no I/O."""

try:
    from kvrouter_grpc.core.block_hash import hash_blocks, hash_bytes, hash_sequence, seed_for, sequence_hashes
    from kvrouter_grpc.core.kv_feed import Applied, BatchError, KvFeed
    from kvrouter_grpc.core.radix_tree import RadixTree
except ModuleNotFoundError as error:
    raise ImportError("The compiled core is missing. Build it in the source tree with: make build") from error

__all__ = [
    "Applied",
    "BatchError",
    "KvFeed",
    "RadixTree",
    "hash_blocks",
    "hash_bytes",
    "hash_sequence",
    "seed_for",
    "sequence_hashes",
]
