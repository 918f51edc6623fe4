"""Sides of the benchmark as processes, and the meters that read them."""

import os
import time

import pytest
from bench import meter, work
from bench.side import Side, SideError

from kvrouter_grpc.core import hash_sequence


def test_limit_does_the_same_work_as_we_do() -> None:
    with Side("bench.sides.limit") as side:
        assert side.call("hashes", tokens=8192) == hash_sequence(work.prompt(8192), work.BLOCK).tolist()
        assert 0 < side.call("hash_prompt", tokens=512, batches=2, repeats=2) < 10_000


def test_error_of_a_side_is_told_and_the_side_goes_on() -> None:
    with Side("bench.sides.limit") as side:
        with pytest.raises(SideError, match="unexpected keyword argument 'nonsense'"):
            side.call("hashes", nonsense=1)
        with pytest.raises(SideError, match="KeyError"):
            side.call("no_such_function")
        assert len(side.call("hashes", tokens=512)) == 32


def test_side_that_ended_is_told_with_what_it_said() -> None:
    with Side("bench.sides.no_such_module") as side, pytest.raises(SideError, match="No module named"):
        side.call("hashes", tokens=512)


def test_window_counts_the_cpu_time_of_this_process() -> None:
    with meter.Window({"again": os.getpid()}) as window:
        ends = time.process_time() + 0.05
        while time.process_time() < ends:
            pass
    assert window.cpu["again"] >= 0.04
    assert window.wall >= 0.04


def test_percentile() -> None:
    values = list(range(100))
    assert [meter.percentile(values, fraction) for fraction in (0, 0.5, 0.99, 1)] == [0, 50, 99, 99]
    assert meter.percentile([7], 0.99) == 7
