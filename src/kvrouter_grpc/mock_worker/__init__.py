"""A runnable double of a vLLM worker: same HTTP surface, same KV events, same cache behaviour, no model."""

from kvrouter_grpc.mock_worker.config import MockWorkerConfig
from kvrouter_grpc.mock_worker.worker import MockWorker

__all__ = ["MockWorker", "MockWorkerConfig"]
