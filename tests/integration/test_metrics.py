"""The metrics, scraped over HTTP as Prometheus does."""

import re
import socket
from array import array

import aiohttp
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from stack import ENDPOINT, running

from kvrouter_grpc.app import App
from kvrouter_grpc.config import Config
from kvrouter_grpc.errors import ConfigError
from kvrouter_grpc.routing.workers import worker_id_of
from kvrouter_grpc.types import Prompt, RoutingHints, RoutingRequest
from pages import ROOT

ON = {"metrics_port": 0}


async def scrape(address: str) -> dict[str, Metric]:
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}/metrics") as response:
        assert response.status == 200
        return {family.name: family for family in text_string_to_metric_families(await response.text())}


def values(family: Metric, *labels: str) -> dict[tuple[str, ...], float]:
    return {tuple(sample.labels.get(label, "") for label in labels): sample.value for sample in family.samples}


async def test_a_scrape_tells_what_is_held_booked_and_foretold():
    async with running("a", "b", server=ON) as stack:
        prompt = list(range(64))
        await stack.on("a", prompt)
        await stack.on("a", prompt)
        pin = RoutingHints(worker_id=worker_id_of("a"))
        with stack.router.lease(RoutingRequest(Prompt(array("I", prompt)), pin, request_id="held")):
            families = await scrape(stack.app.metrics_address)
        ranks = {name: values(family, "worker", "dp_rank") for name, family in families.items()}
        assert values(families["kvrouter_ready"]) == {(): 1}
        assert ranks["kvrouter_freshness"] == {("a", "0"): 1, ("b", "0"): 1}
        assert ranks["kvrouter_cached_blocks"][("a", "0")] == stack.router.index.blocks(stack.target("a"))
        assert ranks["kvrouter_cached_blocks"][("b", "0")] == 0
        assert ranks["kvrouter_active_requests"] == {("a", "0"): 1, ("b", "0"): 0}
        assert ranks["kvrouter_active_blocks"] == {("a", "0"): 4, ("b", "0"): 0}
        assert ranks["kvrouter_hits_exact"][("a", "0")] == 2
        assert ranks["kvrouter_found_cached_tokens"][("a", "0")] == 48
        live = values(families["kvrouter_stream_state"], "worker", "state")
        assert (live["a", "live"], live["a", "stale"], live["b", "live"]) == (1, 0, 1)
        up = values(families["kvrouter_worker_state"], "endpoint", "worker", "state")
        assert up[ENDPOINT, "a", "ready"] == 1
        assert up[ENDPOINT, "a", "unhealthy"] == 0
        assert values(families["kvrouter_index_bytes"], "endpoint")[(ENDPOINT,)] > 0


async def test_the_page_lists_what_is_served():
    page = (ROOT / "docs/metrics.md").read_text()
    named = set(re.findall(r"^\| `(kvrouter_\w+)", page, re.MULTILINE))
    async with running("a", server=ON) as stack:
        families = await scrape(stack.app.metrics_address)
    served = {f"{name}_total" if family.type == "counter" else name for name, family in families.items()}
    assert named == {name for name in served if name.startswith("kvrouter_")}


async def test_without_a_port_nothing_is_served():
    async with running("a") as stack:
        assert stack.app.metrics_address == ""


async def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = {"listen": "127.0.0.1:0", "metrics_port": port}
        app = App(Config.model_validate({"endpoints": (ENDPOINT,), "server": server}))
        with pytest.RaisesGroup(
            pytest.RaisesExc(ConfigError, match=f"metrics_port: cannot listen on 127.0.0.1:{port}")
        ):
            await app.run()
