"""KV-cache-aware gRPC router for plain vLLM fleets."""

from importlib.metadata import version

__version__ = version("kvrouter-grpc")
