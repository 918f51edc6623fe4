"""Minutes of faults, by hand: `make soak`, or with another length `make soak ARGS="--minutes 2 --seed 7"`.

Round after round other faults, on live batches and replays alike, while conversations go on; in between a worker
restarts, is cut off, or the router itself is replaced by one that begins with its snapshot. After each round everything
is calm, and the index has to become what the engines hold. Ends with 1 when anything was not as it must be.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from robustness.fault_proxy import Faults
from robustness.faulty_fleet import FaultyFleet, Wire, decisions, faulty_fleet

ROUND_S = 8.0
EXACT_S = 5.0
GIVE_UP_S = 30.0
GROWTH = 50 << 20  # bytes
PACE = 2.1  # see `FaultProxy.replays_beyond_pace`
WORKERS = 4

Incident = Callable[[FaultyFleet, Wire], Awaitable[None]]


def say(text: str) -> None:
    """One line, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


async def nothing(_: FaultyFleet, __: Wire) -> None:
    """Only the faults."""
    await asyncio.sleep(ROUND_S)


async def restart(_: FaultyFleet, wire: Wire) -> None:
    """A worker is killed and comes back empty; its connections to the proxy stay."""
    await asyncio.sleep(ROUND_S / 2)
    await wire.worker.restart()
    await asyncio.sleep(ROUND_S / 2)


async def cut(_: FaultyFleet, wire: Wire) -> None:
    """The events of a worker are out of reach for a while."""
    await asyncio.to_thread(wire.proxy.cut)
    await asyncio.sleep(ROUND_S / 2)
    await asyncio.to_thread(wire.proxy.restore)
    await asyncio.sleep(ROUND_S / 2)


def drawn(rng: random.Random) -> Faults:
    """Some faults, each more or less often; now and then a storm."""
    chances = {"drop": 0.3, "duplicate": 0.5, "reorder": 0.3, "delay": 0.05, "truncate": 0.05, "corrupt": 0.05}
    some = rng.sample(sorted(chances), rng.randrange(1, len(chances) + 1))
    copies = rng.choice([1, 1, 1, 3, 100])
    return Faults(**{name: chances[name] * rng.random() for name in some}, copies=copies)


async def soak(minutes: float, seed: int) -> bool:
    """Round after round; whether all went well."""
    rng = random.Random(seed)
    ends = time.monotonic() + 60 * minutes
    slowest = growth = 0.0
    good = True
    with tempfile.TemporaryDirectory() as folder:
        async with faulty_fleet(WORKERS, "--router-snapshot-dir", folder, seed=seed) as fleet:
            async with fleet.traffic():
                await asyncio.sleep(ROUND_S)
            say(f"{'calm':>9}  {await fleet.exact(GIVE_UP_S):5.2f} s until exact")
            rss = fleet.rss()
            while time.monotonic() < ends:
                incident: Incident = rng.choice([nothing, nothing, restart, cut])
                faults = drawn(rng)
                fleet.disturb(faults)
                began, waited_s = time.monotonic(), fleet.waited_s()
                async with decisions(fleet.address) as clock, fleet.traffic():
                    await incident(fleet, rng.choice(fleet.wires))
                    fleet.calm()
                waited = (fleet.waited_s() - waited_s) / (time.monotonic() - began)
                try:
                    took = await fleet.exact(GIVE_UP_S)
                except AssertionError as error:
                    say(str(error))
                    return False
                growth = max(growth, fleet.rss() - rss)
                slowest = max(slowest, took)
                say(
                    f"{incident.__name__:>9}  {took:5.2f} s until exact, {(fleet.rss() - rss) / 2**20:5.1f} MiB more, "
                    f"decisions {clock['ms']} ms, {waited:.0%} of the time without a CPU, {faults}"
                )
                if rng.random() < 0.2:
                    await fleet.stop_router()
                    await fleet.start_router()
                    rss = fleet.rss()
                    say(f"{'router':>9}  {await fleet.exact(GIVE_UP_S):5.2f} s until exact, begun from its snapshot")
            pace = max(wire.proxy.replays_beyond_pace() for wire in fleet.wires)
            done = sum((wire.proxy.live.done + wire.proxy.answers.done for wire in fleet.wires), start=Counter())
            say(f"{fleet.requests} requests, {fleet.failures} failed; faults: {dict(done)}")
            say(
                f"slowest {slowest:.2f} s, growth {growth / 2**20:.1f} MiB, replays at most {pace:.2f} beyond one a second"
            )
            good = slowest <= EXACT_S and growth <= GROWTH and pace <= PACE
    say("as it must be" if good else "NOT as it must be")
    return good


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(not asyncio.run(soak(given.minutes, given.seed)))


if __name__ == "__main__":
    main()
