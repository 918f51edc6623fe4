"""The compiled core: hashes, the tree of cached blocks, events and requests on the wire, the decision. No I/O."""

try:
    from kvrouter_grpc.core.block_hash import hash_blocks, hash_bytes, hash_sequence, seed_for, sequence_hashes
    from kvrouter_grpc.core.choice import Choice
    from kvrouter_grpc.core.decider import Decider
    from kvrouter_grpc.core.decision_log import DecisionLog
    from kvrouter_grpc.core.kv_feed import Applied, BatchError, KvFeed
    from kvrouter_grpc.core.policy import COSTS, Policy
    from kvrouter_grpc.core.radix_tree import RadixTree
    from kvrouter_grpc.core.recording import Recording
    from kvrouter_grpc.core.reply_wire import answer_reply, best_worker_head, best_worker_reply, delimited
    from kvrouter_grpc.core.request_wire import entries, read_plain, split
    from kvrouter_grpc.core.shortlist import Shortlist
    from kvrouter_grpc.core.slot_reader import read_slot
    from kvrouter_grpc.core.slot_writer import write_slot
    from kvrouter_grpc.core.target_table import TargetTable
    from kvrouter_grpc.core.token_ids import TokenIds, json_array
except ModuleNotFoundError as error:
    raise ImportError("The compiled core is missing. Build it in the source tree with: make build") from error

__all__ = [
    "COSTS",
    "Applied",
    "BatchError",
    "Choice",
    "Decider",
    "DecisionLog",
    "KvFeed",
    "Policy",
    "RadixTree",
    "Recording",
    "Shortlist",
    "TargetTable",
    "TokenIds",
    "answer_reply",
    "best_worker_head",
    "best_worker_reply",
    "delimited",
    "entries",
    "hash_blocks",
    "hash_bytes",
    "hash_sequence",
    "json_array",
    "read_plain",
    "read_slot",
    "seed_for",
    "sequence_hashes",
    "split",
    "write_slot",
]
