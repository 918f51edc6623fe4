"""A runnable double of a vLLM worker: same HTTP surface, same KV events, same cache behaviour, no model."""

from kvrouter_grpc.mock_worker.config import MockWorkerConfig

__all__ = ["MockWorkerConfig"]
