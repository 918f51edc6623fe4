"""The composition root: builds every part from the configuration, runs them together and takes them down in order."""

import asyncio
import contextlib
import gc
import json
import os
import random
import signal
import sys
from collections.abc import Mapping
from types import FrameType

import structlog
import uvloop
import zmq.asyncio

from kvrouter_grpc.config import Config, DecisionsConfig
from kvrouter_grpc.core import DecisionLog
from kvrouter_grpc.decisions.writer import DecisionWriter
from kvrouter_grpc.discovery.fleet import Fleet
from kvrouter_grpc.observability.logging import configure_logging
from kvrouter_grpc.observability.metrics import MetricsServer, RouterCollector
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.server.server import GrpcServer
from kvrouter_grpc.snapshots.keeper import SnapshotKeeper
from kvrouter_grpc.upstream.prefill_leg import PrefillLeg
from kvrouter_grpc.upstream.relay import Relay
from kvrouter_grpc.upstream.session import engine_session

ZMQ_MAX_SOCKETS = 65_536
"""Sockets of one ZMQ context; the library's default of 1,023 ends at about 250 workers."""

READINESS_S = 0.02
"""How often a router looks whether it is ready that lacks only what its event streams tell at first."""

log = structlog.get_logger(__name__)


class App:
    """One router process. `run()` lasts until `stop()` is called or a part of it fails.

    Attributes:
        address: Where KvRouter listens, `host:port`; "" before `started`.
        admin_address: Where KvRouterAdmin listens; the same unless it has a port of its own.
        metrics_address: Where the metrics are served; "" when they are not.
        routers: Endpoint to router.
        started: Set when the ports are bound.
    """

    def __init__(self, config: Config) -> None:
        self.address = ""
        self.admin_address = ""
        self.metrics_address = ""
        self.started = asyncio.Event()
        self.routers = {
            endpoint: Router(
                endpoint,
                config.router_of(endpoint),
                log=_decision_log(config.decisions),
                on_worker_change=lambda _: self._changed.set(),
            )
            for endpoint in config.endpoints
        }
        self._config = config
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()

    def stop(self) -> None:
        """Start the drain; `run()` returns when it is over."""
        self._stop.set()

    async def run(self) -> None:
        """Serve until stopped, then drain.

        Raises:
            ConfigError: An address cannot be bound.
            ExceptionGroup: A part failed. Nothing half-alive is left behind.
        """
        config = self._config
        context = zmq.asyncio.Context()
        context.max_sockets = ZMQ_MAX_SOCKETS
        try:
            async with engine_session() as session:
                fleet = Fleet(
                    self.routers,
                    session,
                    context,
                    events=config.events,
                    upstream=config.upstream,
                    min_workers=config.router.min_initial_workers,
                    follow_events=config.router.kv_events,
                    rng=random.Random(config.router.seed),
                    expendable=frozenset(config.prefill_pools().values()),
                )
                for spec in config.workers:
                    fleet.configure(spec)
                keeper = SnapshotKeeper(self.routers, config.router)
                decisions = DecisionWriter(self.routers, config.decisions)
                relay = Relay(fleet.client, config.upstream, fleet.suspect, self._prefill_legs(fleet))
                server = GrpcServer(config.server, self.routers, relay, fleet)
                metrics = MetricsServer(config.server, RouterCollector(self.routers, fleet))
                await keeper.load()  # before the first worker is followed
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(fleet.run(), name="fleet"),
                        group.create_task(keeper.run(), name="snapshots"),
                        group.create_task(decisions.run(), name="decision log"),
                        group.create_task(self._follow_readiness(server, fleet), name="readiness"),
                    ]
                    try:
                        self.metrics_address = await metrics.start()
                        self.address, self.admin_address = await server.start()
                        self.started.set()
                        await self._stop.wait()
                        await self._drain(server)
                        await keeper.write()
                        await decisions.flush()
                    finally:
                        await server.stop(0)
                        await metrics.stop()
                        for task in tasks:
                            task.cancel()
        finally:
            context.destroy(linger=0)

    def _prefill_legs(self, fleet: Fleet) -> Mapping[str, PrefillLeg]:
        config = self._config
        return {
            endpoint: PrefillLeg(
                self.routers[pool],
                config.router_of(endpoint).local_prefill,
                config.upstream.prefill_timeout_s,
                fleet.client,
                fleet.suspect,
            )
            for endpoint, pool in config.prefill_pools().items()
        }

    async def _follow_readiness(self, server: GrpcServer, fleet: Fleet) -> None:
        """Let the health service say what the fleet says."""
        said: list[str] | None = None
        was = False
        while True:
            changed = self._changed.is_set() or said is None
            self._changed.clear()
            ready = fleet.ready
            server.health.set_ready(ready)
            if changed or ready != was:
                findings = fleet.findings()
                if ready != was or findings != said:
                    level = log.info if ready and not findings else log.warning
                    level("ready" if ready else "not ready", findings=findings)
                was, said = ready, findings
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(READINESS_S if fleet.settling else None):
                    await self._changed.wait()

    async def _drain(self, server: GrpcServer) -> None:
        config = self._config.server
        log.info("draining", propagation_s=config.drain_propagation_s, timeout_s=config.drain_timeout_s)
        server.health.drain()
        # Load balancers learn of NOT_SERVING only at their next look; until then requests still come, and are served.
        await asyncio.sleep(config.drain_propagation_s)
        await server.stop(config.drain_timeout_s - config.drain_propagation_s)
        log.info("drained")


def _decision_log(config: DecisionsConfig) -> DecisionLog | None:
    return DecisionLog(config.log_size, hashes=config.log_hashes) if config.log_size else None


def serve(config: Config) -> int:
    """Run the router until SIGTERM or SIGINT; returns the exit code. A second signal exits at once with 128 + n."""
    configure_logging(config.log)
    for warning in config.warnings:
        log.warning(warning)
    uvloop.run(_serve(config))
    return 0


async def _serve(config: Config) -> None:
    app = App(config)
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        app.stop()
        # asyncio's handler runs between two steps of the loop; the second signal must work even when one hangs.
        loop.remove_signal_handler(number)
        signal.signal(number, _exit_now)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    async with asyncio.TaskGroup() as group:
        group.create_task(app.run(), name="app")
        await app.started.wait()
        # What is there now stays: some 80,000 objects, which a collection of garbage would look through for 50 ms.
        gc.collect()
        gc.freeze()
        said = {"event": "serving", "address": app.address, "admin_address": app.admin_address}
        if app.metrics_address:
            said["metrics_address"] = app.metrics_address
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


def _exit_now(number: int, _frame: FrameType | None) -> None:
    os._exit(128 + number)
