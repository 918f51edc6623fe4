"""`kvrouter demo`: the router over embedded mock workers, with a small multi-turn workload, shown live."""

from kvrouter_grpc.demo.command import demo_command

__all__ = ["demo_command"]
