"""The router under test: the real program in a process of its own, and short words for what the tests ask of it."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from e2e.engines import Engine
from e2e.waiting import until
from kvrouter_client import (
    FinishReason,
    GenerateChunk,
    GenerateStream,
    KvRouterAdminClient,
    KvRouterClient,
    KvRouterError,
    RoutingData,
    RoutingHints,
    StopConditions,
    StreamState,
    StreamStatus,
    TokenLogprob,
    Usage,
    WorkerState,
    WorkerStatus,
)
from robustness.fault_proxy import FaultProxy

ENDPOINT = "dynamo.backend.generate"
PREFILL = "dynamo.prefill.generate"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
GENERATE_TIMEOUT_S = 60.0


def worker_flag(engine: Engine, endpoint: str = ENDPOINT, *, discover: bool, proxy: FaultProxy | None = None) -> str:
    """`--worker` for an engine; with `discover` it must tell the rest itself. Events may come through a proxy."""
    words = {"name": engine.name, "url": engine.url, "endpoint": endpoint}
    if not discover:
        publisher = proxy or engine
        words |= {"events": publisher.events, "replay": publisher.replay, "dp": str(engine.options.dp_size)}
    return ",".join(f"{key}={value}" for key, value in words.items())


@dataclass
class Reply:
    """A Generate stream, put together."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    log_probs: list[TokenLogprob] = field(default_factory=list)
    top_logprobs: list[Sequence[TokenLogprob]] = field(default_factory=list)
    chunks: int = 0
    _routing: RoutingData | None = None
    _usage: Usage | None = None

    def add(self, chunk: GenerateChunk) -> None:
        """Append one step."""
        if self.chunks == 0:
            self._routing = chunk.routing
        else:
            assert chunk.routing is None, "the decision comes with the first message only"
        self._usage = chunk.usage or self._usage
        self.chunks += 1
        self.token_ids += chunk.token_ids
        self.text += chunk.text
        self.log_probs += chunk.log_probs
        self.top_logprobs += chunk.top_logprobs
        self.finish_reason = chunk.finish_reason or self.finish_reason
        if chunk.stop_reason is not None:
            self.stop_reason = chunk.stop_reason

    async def rest(self, stream: GenerateStream) -> None:
        """Append what is still to come."""
        async for chunk in stream:
            self.add(chunk)

    @property
    def routing(self) -> RoutingData:
        """The decision."""
        assert self._routing is not None, "the first message carries no decision"
        return self._routing

    @property
    def usage(self) -> Usage:
        """The last totals."""
        assert self._usage is not None, "no message carries usage"
        return self._usage


class Router:
    """`kvrouter serve` in front of engines; an async context manager that checks the exit as well.

    Args:
        engines: Its workers.
        log: Where its stderr goes.
        flags: Further flags.
        discover: Give the workers' urls only.
        prefill: Workers that compute the prompts of the others.
        proxies: Between it and the event sockets of some of the engines, by name.
    """

    client: KvRouterClient
    admin: KvRouterAdminClient

    def __init__(
        self,
        engines: Sequence[Engine],
        log: Path,
        flags: Sequence[str] = (),
        *,
        discover: bool = False,
        prefill: Sequence[Engine] = (),
        proxies: Mapping[str, FaultProxy] | None = None,
    ) -> None:
        self.engines = [*engines, *prefill]
        self.log = log
        self._command = [sys.executable, "-m", "kvrouter_grpc", "serve", "--endpoint", ENDPOINT]
        self._command += ["--listen", "127.0.0.1:0", "--drain-propagation-s", "0", *flags]
        for engine in engines:
            proxy = (proxies or {}).get(engine.name)
            self._command += ["--worker", worker_flag(engine, discover=discover, proxy=proxy)]
        if prefill:
            self._command += ["--endpoint", PREFILL, "--router-prefill-endpoint", PREFILL]
        for engine in prefill:
            self._command += ["--worker", worker_flag(engine, PREFILL, discover=discover)]

    async def __aenter__(self) -> Self:
        with self.log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdout=subprocess.PIPE,
                stderr=output,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                line = await self._process.stdout.readline()
            assert line, f"the router ended before it served:\n{self.log.read_text()[-4000:]}"
            serving = json.loads(line)
            assert serving["event"] == "serving"
        except BaseException:
            await self._kill()
            raise
        self.client = KvRouterClient(serving["address"], generate_timeout_s=GENERATE_TIMEOUT_S)
        self.admin = KvRouterAdminClient(serving["address"])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.client.aclose()
        await self.admin.aclose()
        if error is not None:
            await self._kill()
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                status = await self._process.wait()
        except TimeoutError:
            await self._kill()
            raise AssertionError(f"the router did not stop within {STOP_TIMEOUT_S} s of SIGTERM") from None
        assert status == 0, f"the router ended with {status}:\n{self.log.read_text()[-4000:]}"

    async def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    # --- the request path -----------------------------------------------------------------------------------------

    def stream(self, tokens: Sequence[int], max_tokens: int = 1, **options: Any) -> GenerateStream:
        """Generate greedily, to exactly `max_tokens`."""
        options.setdefault("endpoint", ENDPOINT)
        stop = StopConditions(max_tokens=max_tokens, ignore_eos=True)
        return self.client.generate(tokens, stop_conditions=stop, temperature=0, **options)

    async def generate(self, tokens: Sequence[int], max_tokens: int = 1, **options: Any) -> Reply:
        """`stream`, to the end."""
        reply = Reply()
        async with self.stream(tokens, max_tokens, **options) as stream:
            await reply.rest(stream)
        return reply

    async def refused(self, tokens: Sequence[int], max_tokens: int = 1, **options: Any) -> KvRouterError:
        """The error that a Generate must end with."""
        try:
            reply = await self.generate(tokens, max_tokens, **options)
        except KvRouterError as error:
            return error
        raise AssertionError(f"{len(tokens)} tokens were answered: {reply}")

    async def overlaps(self, tokens: Sequence[int], **options: Any) -> dict[tuple[str, int], int]:
        """Blocks of the prompt in device memory, by worker name and rank."""
        scores = await self.client.get_overlap_scores(tokens, **options)
        return {(score.worker_name, score.dp_rank): score.device_blocks for score in scores.workers}

    async def overlap(self, engine: Engine, tokens: Sequence[int], **options: Any) -> int:
        """Blocks of the prompt that an engine with one rank holds."""
        return (await self.overlaps(tokens, **options))[engine.name, 0]

    # --- its workers ----------------------------------------------------------------------------------------------

    async def worker(self, engine: Engine) -> WorkerStatus:
        """An engine as the router sees it."""
        fleet = await self.admin.list_workers()
        (status,) = [each for each in fleet.workers if each.spec.name == engine.name]
        return status

    async def event_stream(self, engine: Engine, dp_rank: int = 0) -> StreamStatus:
        """The event stream of one rank as the router sees it."""
        (status,) = [each for each in (await self.worker(engine)).streams if each.dp_rank == dp_rank]
        return status

    async def pin(self, engine: Engine, dp_rank: int | None = None) -> RoutingHints:
        """Routing hints that name an engine."""
        return RoutingHints(worker_id=(await self.worker(engine)).worker_id, dp_rank=dp_rank)

    async def booked(self) -> tuple[int, int, int]:
        """Requests, queued prefill tokens and blocks booked, over all workers; what others sent there is left out."""
        booked = [0, 0, 0]
        for each in (await self.admin.get_loads()).loads:
            booked[0] += each.load.active_requests - (each.foreign.requests if each.foreign else 0)
            booked[1] += each.load.queued_prefill_tokens - (each.foreign.prefill_tokens if each.foreign else 0)
            booked[2] += each.load.active_blocks - (each.foreign.blocks if each.foreign else 0)
        requests, prefill_tokens, blocks = booked
        return requests, prefill_tokens, blocks

    async def settle(self, *engines: Engine) -> None:
        """Wait until the router has applied all that these engines (or all of them) have published so far."""
        for engine in engines or self.engines:
            for dp_rank in range(engine.options.dp_size):
                last = await engine.last_seq(dp_rank)

                async def settled(engine: Engine = engine, dp_rank: int = dp_rank, last: int | None = last) -> bool:
                    worker = await self.worker(engine)
                    streams = {stream.dp_rank: stream for stream in worker.streams}
                    if worker.state is not WorkerState.READY or dp_rank not in streams:
                        return False
                    stream = streams[dp_rank]
                    if last is None and stream.state is StreamState.COLD:
                        return True  # nothing was ever said
                    return stream.state is StreamState.LIVE and stream.last_seq == last

                await until(settled, f"{engine.name} rank {dp_rank} is live at sequence {last}")
