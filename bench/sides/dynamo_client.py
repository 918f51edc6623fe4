"""Side: the client of `dynamo.router`, over Dynamo's own request plane. Runs in its environment."""

import asyncio
import itertools
import time
from typing import Any

import uvloop
from dynamo.runtime import DistributedRuntime

from bench import meter, work
from bench.side import serve

OUTPUT_TOKENS = 32
clients: dict[str, Any] = {}
kept: list[Any] = []


async def connect() -> None:
    """Find the router and its workers."""
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    kept.append(runtime)
    for name in ("router.best_worker_id", "router.generate"):
        clients[name] = await runtime.endpoint("dynamo." + name).client()
        await clients[name].wait_for_instances()
    await asyncio.sleep(2)


async def in_process() -> None:
    """Make the router's Rust core in this process too, for decisions without a network."""
    from dynamo.llm import KvRouter, KvRouterConfig  # noqa: PLC0415 - slow to load

    clients["core"] = KvRouter(kept[0].endpoint("dynamo.backend.generate"), work.BLOCK, KvRouterConfig())
    await asyncio.sleep(3)


async def warm(length: int) -> None:
    """Let workers cache the warm prompts of this length."""
    for prompt in work.pool(length).warm:
        await _generate(prompt.tolist(), 1)
    await asyncio.sleep(1)


async def drive(kind: str, length: int, concurrency: int, seconds: float) -> dict[str, float]:
    """A closed loop, as `bench.sides.load.drive`."""
    call = {"best_worker": _best_worker, "generate": _stream, "core": _decide}[kind]
    prompts = itertools.cycle([prompt.tolist() for prompt in work.pool(length).queries])
    taken: list[float] = []
    firsts: list[float] = []
    ends = time.perf_counter() + seconds

    async def loop() -> None:
        while (started := time.perf_counter()) < ends:
            first = await call(next(prompts))
            taken.append(time.perf_counter() - started)
            if first is not None:
                firsts.append(first - started)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(loop())
    taken.sort()
    firsts.sort()
    found = {
        "calls": len(taken),
        "p50_ms": meter.percentile(taken, 0.5) * 1000,
        "p99_ms": meter.percentile(taken, 0.99) * 1000,
    }
    return found | ({"first_ms": meter.percentile(firsts, 0.5) * 1000} if firsts else {})


async def _best_worker(prompt: list[int]) -> None:
    async for _ in await clients["router.best_worker_id"].round_robin(prompt, annotated=False):
        pass


async def _decide(prompt: list[int]) -> None:
    await clients["core"].best_worker(prompt)


async def _stream(prompt: list[int]) -> float:
    return await _generate(prompt, OUTPUT_TOKENS)


async def _generate(prompt: list[int], output: int) -> float:
    request = {
        "token_ids": prompt,
        "model": work.MODEL,
        "stop_conditions": {"max_tokens": output, "ignore_eos": True},
        "sampling_options": {},
        "output_options": {},
    }
    first, messages = 0.0, 0
    async for _ in await clients["router.generate"].round_robin(request, annotated=False):
        first = first or time.perf_counter()
        messages += 1
    if messages < output:
        raise AssertionError(f"{messages} messages instead of {output}")
    return first


if __name__ == "__main__":
    serve([connect, in_process, warm, drive], uvloop.run)
