"""Disaggregated prefill for a vLLM decode worker, through kvrouter-grpc."""

from .answer import Answer
from .engine import EngineError
from .handler import PrefillHandler
from .prefill import Prefill, Reason, Way

__all__ = ["Answer", "EngineError", "Prefill", "PrefillHandler", "Reason", "Way"]
