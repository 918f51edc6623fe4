"""No turn of the event loop is long, whatever the event plane has to do: a decision waits for one turn at most.

Measured is the CPU time that the loop's thread spends in a turn, so what else runs on the machine does not count. The
engines and their bad network run in other processes and threads.
"""

import asyncio
import gc
import json
import random
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from integration.stack import ENDPOINT, until
from kvrouter_grpc.app import App
from kvrouter_grpc.config import Config
from kvrouter_grpc.types import Target, WorkerSpec
from programs import mock_worker
from robustness.fault_proxy import CALM, FaultProxy, Faults

STORM = Faults(copies=100)
LONGEST_S = 0.005
"""Half of what a decision may take. Seen are 1.1 ms: a slice of the event plane, and a call or two of its own."""

ATTEMPTS = 3
"""What a hypervisor takes away counts as CPU time, too: a turn that is long shows itself every time."""

SECONDS = 1.5


class MeasuredLoop(asyncio.SelectorEventLoop):
    """Notes the CPU time of its turns."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: list[float] = []

    def _run_once(self) -> None:
        began = time.thread_time()
        super()._run_once()  # type: ignore[misc]
        self.turns.append(time.thread_time() - began)


def config(proxy: FaultProxy, url: str, router: dict[str, Any]) -> Config:
    worker = WorkerSpec("w", url, ENDPOINT, events=proxy.events, replay=proxy.replay)
    return Config.model_validate(
        {
            "endpoints": (ENDPOINT,),
            "workers": (worker,),
            "server": {"listen": "127.0.0.1:0", "drain_propagation_s": 0, "drain_timeout_s": 1},
            "router": {"seed": 1} | router,
        }
    )


@contextmanager
def traffic(url: str) -> Iterator[None]:
    """Conversations from a thread of their own, straight to the engine."""
    stop = threading.Event()
    rng = random.Random(1)

    def talk() -> None:
        tokens: list[int] = []
        while not stop.is_set():
            tokens = tokens[-512:] + rng.choices(range(300, 30_000), k=64)
            body = {"model": "mock", "prompt": tokens, "max_tokens": 8, "ignore_eos": True}
            request = urllib.request.Request(  # noqa: S310
                f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
                answer.read()

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


Scene = Callable[[App, FaultProxy], Awaitable[None]]


def assert_short_turns(scene: Scene, **router: Any) -> None:
    """No turn of a router's loop is long during a scene."""
    for _ in range(ATTEMPTS):
        turns = longest_turns(scene, **router)
        if turns[0] <= LONGEST_S:
            return
    raise AssertionError(f"CPU seconds of the longest turns, in each of {ATTEMPTS} attempts such: {turns}")


def longest_turns(scene: Scene, **router: Any) -> list[float]:
    """CPU seconds of the longest turns of a router's loop during a scene, the longest first."""
    turns: list[float] = []

    async def run(loop: MeasuredLoop) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(app.run())
            await app.started.wait()
            index, (worker,) = app.routers[ENDPOINT].index, app.routers[ENDPOINT].workers.workers()
            target = Target(worker.worker_id, 0)
            await until(lambda: (status := index.stream_if_known(target)) is not None and status.settled)
            gc.collect()
            gc.freeze()  # as `serve` does
            await asyncio.sleep(0)
            loop.turns.clear()
            await scene(app, proxy)
            turns.extend(loop.turns)
            gc.unfreeze()
            app.stop()

    with (
        mock_worker("--num-blocks", "8192", "--full-speed") as engine,
        FaultProxy(engine.said["events"][0], engine.said["replay"][0]) as proxy,
        traffic(engine.said["url"]),
    ):
        app = App(config(proxy, engine.said["url"], router))
        loop = MeasuredLoop()
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(run(loop))
    return sorted(turns, reverse=True)[:10]


async def storm(_: App, proxy: FaultProxy) -> None:
    """Every batch a hundred times."""
    proxy.disturb(STORM, CALM)
    await asyncio.sleep(SECONDS)
    proxy.calm()


async def pictures_begun_anew(app: App, _: FaultProxy) -> None:
    """The whole history is forgotten and replayed, again and again."""
    router = app.routers[ENDPOINT]
    (worker,) = router.workers.workers()
    target = Target(worker.worker_id, 0)
    for _ in range(3):
        seen = router.index.stream(target).batches
        router.index.clear(target)
        await asyncio.sleep(SECONDS / 3)
        assert router.index.stream(target).batches > seen


def test_a_storm_makes_no_turn_long() -> None:
    assert_short_turns(storm)


def test_neither_do_snapshots_meanwhile(tmp_path: Path) -> None:
    assert_short_turns(storm, snapshot_dir=tmp_path, snapshot_threshold=100)
    assert list(tmp_path.iterdir()), "none was written"


def test_neither_does_a_cache_that_is_forgotten() -> None:
    assert_short_turns(pictures_begun_anew)
