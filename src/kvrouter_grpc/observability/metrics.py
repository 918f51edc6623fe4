"""Prometheus metrics over HTTP: what the router knows of every worker's cache, what it booked there, what that costs.

Nothing is counted for their sake. A scrape reads the figures that the parts keep anyway, in one step of the event loop,
so a decision pays nothing for being observed.
"""

import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from aiohttp import web
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.aiohttp import make_aiohttp_handler
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvrouter_grpc.config import ServerConfig
from kvrouter_grpc.config.section import split_host_port
from kvrouter_grpc.discovery.fleet import Fleet
from kvrouter_grpc.discovery.view import StreamView, WorkerView
from kvrouter_grpc.errors import ConfigError
from kvrouter_grpc.routing.loads import TargetLoad
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.routing.stream import freshness
from kvrouter_grpc.types import EngineReport, StreamState, Target, WorkerState

PREFIX = "kvrouter_"

RANK = ("endpoint", "worker", "dp_rank")
"""Labels of a figure of one rank."""


class _Rank(NamedTuple):
    """Everything that is told of one rank."""

    worker: WorkerView
    stream: StreamView
    load: TargetLoad
    report: EngineReport | None


_GAUGES: Mapping[str, str] = {
    "freshness": "Trust in the overlap of the rank, 0 to 1.",
    "cached_blocks": "Blocks the rank is known to hold, over all tiers.",
    "orphan_blocks": "Blocks the rank stored whose place is not known.",
    "batches_behind": "Event batches known to be published and not applied yet.",
    "last_event_age_seconds": "Time since the last event batch.",
    "hit_accuracy_ratio": "Share of the cached tokens foretold of the last requests that the engine found.",
    "hit_error_tokens": "Running mean of the error of that prediction, per request.",
    "hit_drifting": "1 while the predictions for the rank are wrong too often.",
    "active_requests": "Requests booked on the rank.",
    "queued_prefill_tokens": "Prompt tokens booked on the rank that have no first token yet.",
    "active_blocks": "Distinct blocks that booked requests pin.",
    "total_blocks": "Blocks the rank has room for.",
    "engine_running_requests": "Requests the engine itself reports as running.",
    "engine_waiting_requests": "Requests the engine itself reports as waiting.",
    "engine_kv_usage_ratio": "Part of its cache that the engine itself reports as in use.",
}

_COUNTERS: Mapping[str, str] = {
    "event_batches": "Event batches applied.",
    "event_gaps": "Times an event batch was missing.",
    "event_batches_missed": "Event batches lost and not recovered.",
    "event_replays": "Replays asked of the engine.",
    "event_decode_failures": "Event batches that could not be read.",
    "events_skipped": "Events of unknown kind or broken shape.",
    "engine_restarts": "Restarts of the engine seen.",
    "resyncs": "Times the picture of the cache was doubted and fetched again because it had foretold wrongly.",
    "hits_exact": "Finished requests whose cached tokens were foretold.",
    "hits_over": "Finished requests of which the engine found less than foretold.",
    "hits_under": "Finished requests of which the engine found more than foretold.",
    "foretold_cached_tokens": "Cached tokens foretold of finished requests.",
    "found_cached_tokens": "Cached tokens that the engine reported of them.",
}


def _gauges(rank: _Rank, now: float) -> Mapping[str, float | None]:
    stream, load, report = rank.stream, rank.load, rank.report
    heard = stream.status.last_event_at
    return {
        "freshness": freshness(stream.evidence).value,
        "cached_blocks": stream.blocks,
        "orphan_blocks": stream.orphans,
        "batches_behind": stream.status.behind,
        "last_event_age_seconds": now - heard if heard else None,
        "hit_accuracy_ratio": stream.hits.accuracy,
        "hit_error_tokens": stream.hits.error_tokens,
        "hit_drifting": stream.hits.drifting,
        "active_requests": load.active_requests,
        "queued_prefill_tokens": load.queued_prefill_tokens,
        "active_blocks": load.active_blocks,
        "total_blocks": rank.worker.spec.total_kv_blocks,
        "engine_running_requests": report.running if report else None,
        "engine_waiting_requests": report.waiting if report else None,
        "engine_kv_usage_ratio": report.kv_usage if report else None,
    }


def _counters(stream: StreamView) -> Mapping[str, float]:
    status, hits = stream.status, stream.hits
    return {
        "event_batches": status.batches,
        "event_gaps": status.gaps,
        "event_batches_missed": status.missed,
        "event_replays": status.replays,
        "event_decode_failures": status.decode_failures,
        "events_skipped": status.skipped,
        "engine_restarts": status.restarts,
        "resyncs": status.resyncs,
        "hits_exact": hits.exact,
        "hits_over": hits.over,
        "hits_under": hits.under,
        "foretold_cached_tokens": hits.foretold_tokens,
        "found_cached_tokens": hits.found_tokens,
    }


class RouterCollector(Collector):
    """The figures of every endpoint, as of the moment of a scrape; docs/metrics.md lists them.

    Args:
        routers: Endpoint to router.
        fleet: Their workers.
    """

    def __init__(self, routers: Mapping[str, Router], fleet: Fleet) -> None:
        self._routers = routers
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """Everything, read now."""
        gauges = {name: GaugeMetricFamily(PREFIX + name, text, labels=RANK) for name, text in _GAUGES.items()}
        counters = {name: CounterMetricFamily(PREFIX + name, text, labels=RANK) for name, text in _COUNTERS.items()}
        states = GaugeMetricFamily(
            PREFIX + "stream_state", "1 for the state of the event stream.", labels=(*RANK, "state")
        )
        ups = GaugeMetricFamily(PREFIX + "worker_state", "1 for the state of the worker.", labels=(*RANK[:2], "state"))
        faults = GaugeMetricFamily(
            PREFIX + "worker_fault", "1 while something is wrong with the worker.", labels=(*RANK[:2], "fault")
        )
        now = time.monotonic()
        for endpoint, router in self._routers.items():
            for worker in self._fleet.workers(endpoint):
                name = worker.spec.name
                for state in WorkerState:
                    ups.add_metric((endpoint, name, state.value), worker.state is state)
                for fault in sorted({each.fault for each in worker.faults}):
                    faults.add_metric((endpoint, name, fault), 1)
                for rank in self._ranks(router, worker):
                    labels = endpoint, name, str(rank.stream.dp_rank)
                    for key, value in _gauges(rank, now).items():
                        if value is not None:
                            gauges[key].add_metric(labels, value)
                    for key, count in _counters(rank.stream).items():
                        counters[key].add_metric(labels, count)
                    for stream_state in StreamState:
                        states.add_metric((*labels, stream_state.value), rank.stream.status.state is stream_state)
        yield from (ups, faults, states, *gauges.values(), *counters.values(), *self._of_endpoints())

    def _ranks(self, router: Router, worker: WorkerView) -> Iterator[_Rank]:
        for stream in worker.streams:
            target = Target(worker.worker_id, stream.dp_rank)
            yield _Rank(worker, stream, router.load(target), router.feedback.engine_report(target))

    def _of_endpoints(self) -> Iterator[Metric]:
        ready = GaugeMetricFamily(PREFIX + "ready", "1 while the router is ready to serve.")
        ready.add_metric((), self._fleet.ready)
        yield ready
        kinds = {
            "blocks": "Distinct blocks in the index.",
            "edges": "Edges of the index.",
            "bytes": "Memory of the index.",
        }
        families = {
            kind: GaugeMetricFamily(f"{PREFIX}index_{kind}", text, labels=("endpoint",)) for kind, text in kinds.items()
        }
        expired = CounterMetricFamily(
            PREFIX + "reservations_expired", "Reservations that nobody freed.", labels=("endpoint",)
        )
        waiting = GaugeMetricFamily(
            PREFIX + "queue_waiting_requests", "Requests that wait for busy workers.", labels=("endpoint",)
        )
        waits = GaugeMetricFamily(
            PREFIX + "queue_estimated_wait_seconds",
            "About how long one that came now would wait.",
            labels=("endpoint",),
        )
        waited = CounterMetricFamily(
            PREFIX + "queue_requests",
            "Requests that have waited, by what became of them.",
            labels=("endpoint", "outcome"),
        )
        for endpoint, router in self._routers.items():
            if (admission := router.admission) is not None:
                waiting.add_metric((endpoint,), len(admission.queue))
                waits.add_metric((endpoint,), admission.estimated_wait_s if len(admission.queue) else 0)
                for outcome, count in admission.outcomes.items():
                    waited.add_metric((endpoint, outcome), count)
            stats = router.index.stats()
            for kind, family in families.items():
                family.add_metric((endpoint,), stats.get(kind, 0))
            expired.add_metric((endpoint,), router.loads.expired)
        yield from (*families.values(), expired, waiting, waits, waited)


class MetricsServer:
    """Serves `/metrics` in Prometheus' text format, and nothing else.

    Args:
        config: Where: `metrics_port`, on the host of `listen`.
        collector: What to tell; figures of the process are added.
    """

    def __init__(self, config: ServerConfig, collector: Collector) -> None:
        self._config = config
        registry = CollectorRegistry()
        registry.register(collector)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        app = web.Application()
        app.router.add_get("/metrics", make_aiohttp_handler(registry))
        self._runner = web.AppRunner(app, access_log=None)

    async def start(self) -> str:
        """Bind the port; returns `host:port`, or "" when metrics are off.

        Raises:
            ConfigError: The port cannot be bound.
        """
        port = self._config.metrics_port
        if port < 0:
            return ""
        host, _ = split_host_port(self._config.listen)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host.strip("[]"), port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigError(
                [f"server.metrics_port: cannot listen on {host}:{port}; is the port in use? -1 serves no metrics"]
            ) from error
        return f"{host}:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Close the port."""
        await self._runner.cleanup()
