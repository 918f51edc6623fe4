"""Configuration: one frozen, typed `Config`, from flags, environment, YAML, defaults, in this order."""

from kvrouter_grpc.config.model import Config
from kvrouter_grpc.config.router import RouterConfig
from kvrouter_grpc.config.sections import EventsConfig, LogConfig, ServerConfig, UpstreamConfig
from kvrouter_grpc.config.worker import WorkerEntry

__all__ = [
    "Config",
    "EventsConfig",
    "LogConfig",
    "RouterConfig",
    "ServerConfig",
    "UpstreamConfig",
    "WorkerEntry",
]
