"""A bad network between engines and router: when it is good again, the index is soon what the engines hold."""

import asyncio
import os
import time
from pathlib import Path

import pytest

from robustness.fault_proxy import CALM, Faults
from robustness.faulty_fleet import FaultyFleet, decisions, faulty_fleet

BAD_S = 1.5
SOON_S = 5.0
RESTORED_S = 10.0  # with a reconnection before it, whose back-off has grown
PACE = 2.1  # see `replays_beyond_pace`; and a loaded machine
GROWTH = 50 << 20  # bytes
STORM = Faults(copies=100)
EVERYTHING = Faults(drop=0.1, duplicate=0.1, reorder=0.1, delay=0.02, truncate=0.02, corrupt=0.02, copies=3)

DECISION_MS = 10.0
BUSY_MACHINE = 10
QUIET = 0.05
"""Share of the time for which the router waits for a CPU, below which its latencies are its own."""


async def assert_recovers(fleet: FaultyFleet, rss: int) -> None:
    """The faults have just stopped."""
    await fleet.exact(SOON_S)
    assert all(wire.proxy.replays_beyond_pace() <= PACE for wire in fleet.wires)
    assert fleet.rss() - rss <= GROWTH
    assert fleet.failures == 0


@pytest.mark.parametrize(
    "faults",
    [
        Faults(drop=0.3),
        Faults(duplicate=0.5, reorder=0.3, delay=0.05),
        Faults(truncate=0.05, corrupt=0.05),
        EVERYTHING,
    ],
    ids=["lost", "late-or-twice", "damaged", "everything"],
)
async def test_after_faults_the_index_is_what_the_engines_hold(faults: Faults) -> None:
    """Live batches and replays suffer alike."""
    async with faulty_fleet(2) as fleet:
        rss = fleet.rss()
        fleet.disturb(faults)
        async with fleet.traffic():
            await asyncio.sleep(BAD_S)
            fleet.calm()
        await assert_recovers(fleet, rss)
        done = fleet.wires[0].proxy.live.done
        assert all(done[fault] for fault in done), "some faults never happened"


async def test_a_storm_delays_no_decision() -> None:
    """Every batch a hundred times. How much others use of the machine decides how strictly it is judged."""
    async with faulty_fleet(2) as fleet:
        rss, began, waited_s = fleet.rss(), time.monotonic(), fleet.waited_s()
        fleet.disturb(STORM, CALM)
        async with fleet.traffic(), decisions(fleet.address) as clock:
            await asyncio.sleep(BAD_S)
        waited = (fleet.waited_s() - waited_s) / (time.monotonic() - began)
        fleet.calm()
        await assert_recovers(fleet, rss)
        assert clock["decisions"] > 20
        measure, limit = ("p95", DECISION_MS) if waited < QUIET else ("p50", BUSY_MACHINE * DECISION_MS)
        assert clock["ms"][measure] <= limit, f"{clock}, the router waited {waited:.0%} of the time for a CPU"


async def test_an_engine_restarts_behind_a_bad_network() -> None:
    """The router sees no connection drop, and the numbers of both processes mixed."""
    async with faulty_fleet(2) as fleet:
        wire = fleet.wires[0]
        fleet.disturb(EVERYTHING)
        async with fleet.traffic():
            await asyncio.sleep(BAD_S)
            await wire.worker.restart()
            await asyncio.sleep(BAD_S)
            fleet.calm()
        await fleet.exact(SOON_S)
        assert (await fleet.streams())[wire.name].restarts >= 1


async def test_a_subscriber_that_was_cut_off_is_exact_again() -> None:
    async with faulty_fleet(2, "--events-reconnect-max-ms", "500") as fleet:
        rss = fleet.rss()
        for wire in fleet.wires:
            await asyncio.to_thread(wire.proxy.cut)
        async with fleet.traffic():
            await asyncio.sleep(BAD_S)
        for wire in fleet.wires:
            assert await fleet.wrong(wire), "the cut must have hidden something"
            await asyncio.to_thread(wire.proxy.restore)
        await fleet.exact(RESTORED_S)
        assert all(wire.proxy.replays_beyond_pace() <= PACE for wire in fleet.wires)
        assert fleet.rss() - rss <= GROWTH


async def test_a_router_comes_back_from_its_snapshot_amid_faults(tmp_path: Path) -> None:
    """What it wrote is what it knew, and the rest is fetched over the same bad network."""
    async with faulty_fleet(2, "--router-snapshot-dir", str(tmp_path)) as fleet:
        async with fleet.traffic():
            await asyncio.sleep(BAD_S)
        await fleet.exact(SOON_S)
        fleet.disturb(EVERYTHING)
        await fleet.stop_router()
        assert (await asyncio.to_thread(os.listdir, tmp_path)) != []
        await fleet.start_router()
        async with fleet.traffic():
            await asyncio.sleep(BAD_S)
            fleet.calm()
        await fleet.exact(SOON_S)
