"""A bad network between engines and router: when it is good again, the index is soon what the engines hold."""

import asyncio

import pytest

from robustness.fault_proxy import CALM, Faults
from robustness.faulty_fleet import FaultyFleet, decisions, faulty_fleet

BAD_S = 1.5
SOON_S = 5.0
RESTORED_S = 10.0  # with a reconnection before it, whose back-off has grown
REPLAY_INTERVAL_S = 0.9  # one second when it was sent, and a loaded machine between that and the proxy
GROWTH = 50 << 20  # bytes
STORM = Faults(copies=100)
EVERYTHING = Faults(drop=0.1, duplicate=0.1, reorder=0.1, delay=0.02, truncate=0.02, corrupt=0.02, copies=3)

DECISION_MS = 10.0
QUIET_MS = 2.0
"""How late the machine may wake a process up for its figures to say something of the router."""


async def assert_recovers(fleet: FaultyFleet, rss: int) -> None:
    """The faults have just stopped."""
    await fleet.exact(SOON_S)
    assert fleet.closest_replays() >= REPLAY_INTERVAL_S
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
    """Every batch a hundred times. Judged by the median: on a machine that others use, the tail is theirs."""
    async with faulty_fleet(2) as fleet:
        rss = fleet.rss()
        fleet.disturb(STORM, CALM)
        async with fleet.traffic(), decisions(fleet.address) as clock:
            await asyncio.sleep(BAD_S)
        fleet.calm()
        await assert_recovers(fleet, rss)
        quiet = clock["late_ms"]["p95"] <= QUIET_MS
        assert clock["decisions"] > 20
        assert clock["ms"]["p50"] <= DECISION_MS * (1 if quiet else 10), clock


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
        assert fleet.failures > 0


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
        assert fleet.closest_replays() >= REPLAY_INTERVAL_S
        assert fleet.rss() - rss <= GROWTH
