"""CPU time and memory of processes, from /proc."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """Seconds that all live threads of a process have run, from the scheduler's own nanosecond count."""
    total = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            total += int((thread / "schedstat").read_text().split()[0])
    return total / 1e9


def rss_bytes(pid: int | str = "self") -> int:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def busy_s() -> float:
    """Seconds that all CPUs together have been busy since boot."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split(None, 9)[1:9])
    return (user + nice + system + irq + softirq + steal) * _TICK_S


class Window:
    """What processes used between `with` and its end.

    Args:
        pids: Processes by name. All that take part belong here, the load generator too: the rest of what kept the
            machine busy is `foreign`.

    Attributes:
        cpu: Seconds of CPU by name.
        wall: Seconds.
        foreign: CPUs that other processes kept busy meanwhile.
    """

    def __init__(self, pids: Mapping[str, int]) -> None:
        self.cpu: dict[str, float] = {}
        self.wall = self.foreign = 0.0
        self._pids = {**pids, "": os.getpid()}
        self._started = self._busy = 0.0

    def __enter__(self) -> Self:
        self._busy = busy_s()
        self._before = {name: cpu_s(pid) for name, pid in self._pids.items()}
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self._started
        self.cpu = {name: cpu_s(pid) - self._before[name] for name, pid in self._pids.items()}
        own = sum(self.cpu.values())
        self.foreign = max(0.0, busy_s() - self._busy - own) / max(self.wall, 1e-9)


def wait_quiet(patience_s: float, limit: float = 0.2, window_s: float = 0.3) -> float:
    """Wait until others keep less than `limit` CPUs busy, at most `patience_s`; returns what they keep busy."""
    ends = time.monotonic() + patience_s
    while True:
        with Window({}) as window:
            time.sleep(window_s)
        if window.foreign < limit or time.monotonic() >= ends:
            return window.foreign


def wait_idle(pids: Sequence[int], *, quiet_s: float = 0.3, limit: float = 0.05, patience_s: float = 120.0) -> None:
    """Wait until processes use less than `limit` CPUs for `quiet_s` seconds: they have worked off what they got.

    Raises:
        TimeoutError: They did not come to rest.
    """
    ends = time.monotonic() + patience_s
    while time.monotonic() < ends:
        before = sum(map(cpu_s, pids))
        time.sleep(quiet_s)
        if sum(map(cpu_s, pids)) - before < limit * quiet_s:
            return
    raise TimeoutError(f"processes {list(pids)} are still busy after {patience_s:g} s")


def percentile(values: Sequence[float], fraction: float) -> float:
    """The value below which `fraction` of the sorted values lie."""
    return values[min(len(values) - 1, int(len(values) * fraction))]


def least_cpu_us(call: Callable[[Any], object], inputs: Sequence[Any], batches: int) -> float:
    """Microseconds of CPU per call, over the quickest of `batches` passes through the inputs.

    Nothing makes a computation faster than it is, so the quickest pass is the least disturbed one.
    """
    best = float("inf")
    for _ in range(batches):
        start = time.process_time_ns()
        for each in inputs:
            call(each)
        best = min(best, (time.process_time_ns() - start) / len(inputs) / 1000)
    return best


def latencies_us(call: Callable[[Any], object], inputs: Sequence[Any], passes: int) -> dict[str, float]:
    """`p50` and `p99` of single calls by the wall clock, whose own cost (some 50 ns) is part of it."""
    clock, taken = time.perf_counter_ns, []
    for _ in range(passes):
        for each in inputs:
            before = clock()
            call(each)
            taken.append(clock() - before)
    taken.sort()
    return {"p50": percentile(taken, 0.5) / 1000, "p99": percentile(taken, 0.99) / 1000}
