"""Configuration: one frozen, typed `Config`, from flags, environment, YAML, defaults, in this order."""

from kvrouter_grpc.config.disagg import LocalPrefill
from kvrouter_grpc.config.effective import effective
from kvrouter_grpc.config.load import load
from kvrouter_grpc.config.model import Config
from kvrouter_grpc.config.policy import EndpointPolicy
from kvrouter_grpc.config.router import RouterConfig
from kvrouter_grpc.config.sections import DecisionsConfig, EventsConfig, LogConfig, ServerConfig, UpstreamConfig
from kvrouter_grpc.config.worker import WorkerEntry
from kvrouter_grpc.config.worker_list import read_workers

__all__ = [
    "Config",
    "DecisionsConfig",
    "EndpointPolicy",
    "EventsConfig",
    "LocalPrefill",
    "LogConfig",
    "RouterConfig",
    "ServerConfig",
    "UpstreamConfig",
    "WorkerEntry",
    "effective",
    "load",
    "read_workers",
]
