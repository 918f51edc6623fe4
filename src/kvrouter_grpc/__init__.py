"""KV-cache-aware gRPC router for plain vLLM fleets."""

__version__ = "0.1.0"
