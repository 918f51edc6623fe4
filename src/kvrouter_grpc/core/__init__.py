"""The compiled core: block hashes, the radix tree of cached blocks, requests on the wire. It knows no I/O."""

try:
    from kvrouter_grpc.core.block_hash import hash_blocks, hash_bytes, hash_sequence, seed_for, sequence_hashes
    from kvrouter_grpc.core.radix_tree import RadixTree
    from kvrouter_grpc.core.request_wire import split, split_batch
    from kvrouter_grpc.core.token_ids import TokenIds, json_array
except ModuleNotFoundError as error:
    raise ImportError("The compiled core is missing. Build it in the source tree with: make build") from error

__all__ = [
    "RadixTree",
    "TokenIds",
    "hash_blocks",
    "hash_bytes",
    "hash_sequence",
    "json_array",
    "seed_for",
    "sequence_hashes",
    "split",
    "split_batch",
]
