"""Looks at one worker over HTTP and at its event sockets. Judges nothing."""

import asyncio
import random
import time
import uuid
from array import array
from collections.abc import Callable
from dataclasses import dataclass

import zmq.asyncio

from kvrouter_grpc.check.observation import ProbeSeen, RankSeen, WorkerSeen
from kvrouter_grpc.config import EventsConfig
from kvrouter_grpc.discovery.attendant import at_rank
from kvrouter_grpc.errors import RouterError
from kvrouter_grpc.events.probe import Heard, Line, StreamProbe
from kvrouter_grpc.events.sockets import EventSource
from kvrouter_grpc.routing.workers import complete
from kvrouter_grpc.server.tokenizer import Tokenizer
from kvrouter_grpc.types import EngineRequest, Usage, WorkerSpec
from kvrouter_grpc.upstream.vllm_http import VllmHttpClient

PROBE_BLOCKS = 2
"""Full blocks of a probe prompt. One more token follows: an engine always computes the last one again."""

PROBE_TOKEN_IDS = range(16, 272)
"""Token ids of probe prompts: above the special tokens, below the end of any vocabulary."""

ECHO_S = 3.0
"""How long the event of a probe prompt may take; an engine sends it before its first token."""

SAMPLE_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two leading spaces,\ttabs\nand a line",
    "naïve café, 東京, Привет, مرحبا, 🙂",
    "def f(x):\n    return {'a': [1, 2.5e-3]}",
)
"""What tokenizers of one name differ in, when they do: white space, scripts, special tokens."""


@dataclass(frozen=True, slots=True)
class Scope:
    """How far a check may go.

    Attributes:
        timeout_s: Limit for everything.
        listen_s: How long to listen to the events of a worker after the replay.
        probe: Whether a prompt may be sent.
    """

    timeout_s: float = 20.0
    listen_s: float = 1.0
    probe: bool = False


class Observer:
    """Looks at workers.

    Args:
        scope: How far to go.
        config: Limits of the event sockets.
        context: Of the event sockets.
        client: Gives the client of a url.
        tokenizer: To compare with the workers', None to compare nothing.
        rng: Makes the probe prompts.
    """

    def __init__(
        self,
        scope: Scope,
        config: EventsConfig,
        context: zmq.asyncio.Context,
        client: Callable[[str], VllmHttpClient],
        *,
        tokenizer: Tokenizer | None = None,
        rng: random.Random,
    ) -> None:
        self._scope = scope
        self._config = config
        self._context = context
        self._client = client
        self._tokenizer = tokenizer
        self._rng = rng

    async def look(self, seen: WorkerSeen) -> None:
        """Fill `seen`, which holds the worker's entry. Returns after `timeout_s` at the latest."""
        client = self._client(seen.given.url)
        try:
            async with asyncio.timeout(self._scope.timeout_s):
                await self._ask(client, seen)
                seen.ranks = _ranks(seen.spec)
                async with asyncio.TaskGroup() as group:
                    for rank in seen.ranks:
                        group.create_task(self._look_at_rank(client, seen, rank))
        except TimeoutError:
            seen.timed_out = True

    async def _ask(self, client: VllmHttpClient, seen: WorkerSeen) -> None:
        seen.health = await client.health()
        try:
            seen.facts = await client.facts()
            seen.spec = complete(seen.given, seen.facts)
            seen.settings = await client.settings()
            if self._tokenizer is not None:
                seen.differing = await self._compare(client, seen.facts.models[0], self._tokenizer)
        except RouterError as error:
            seen.error = error.message

    async def _compare(self, client: VllmHttpClient, model: str, tokenizer: Tokenizer) -> list[str] | None:
        differing = []
        for text in SAMPLE_TEXTS:
            theirs = await client.tokenize(text, model)
            if theirs is None:
                return None
            if (await tokenizer.encode(text)).tolist() != theirs:
                differing.append(text)
        return differing

    async def _look_at_rank(self, client: VllmHttpClient, seen: WorkerSeen, rank: RankSeen) -> None:
        if rank.events is None:
            if self._scope.probe:
                await self._probe(client, seen, rank, asyncio.Event())
            return
        arrived = asyncio.Event()

        def heard(batch: Heard) -> None:
            rank.tally.take(batch.topic, batch.seq, batch.payload, replayed=batch.replayed, now=time.time())
            arrived.set()

        stream = StreamProbe(EventSource(rank.events, rank.replay), self._config, self._context, heard)
        greeted = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                listening = group.create_task(stream.listen(greeted))
                await greeted.wait()
                rank.live_line = stream.live
                await stream.ask()
                if self._scope.probe:
                    await self._probe(client, seen, rank, arrived)
                if stream.live is Line.OPEN:
                    await asyncio.sleep(self._scope.listen_s)
                listening.cancel()
        finally:
            rank.replay_line, rank.replay_ended, rank.misshapen = stream.replay, stream.ended, stream.misshapen

    async def _probe(self, client: VllmHttpClient, seen: WorkerSeen, rank: RankSeen, arrived: asyncio.Event) -> None:
        """Send one prompt twice."""
        size = seen.spec.block_size or next(iter(rank.tally.block_sizes), None)
        if size is None or seen.facts is None:
            return
        prompt = self._rng.choices(PROBE_TOKEN_IDS, k=PROBE_BLOCKS * size + 1)
        rank.probe = probe = ProbeSeen(len(prompt), PROBE_BLOCKS)
        rank.tally.await_store(prompt)
        pin = rank.rank if (seen.spec.dp_size or 1) > 1 else None
        try:
            probe.first = await _generate(client, seen.facts.models[0], prompt, pin)
            if rank.live_line is Line.OPEN:
                probe.stored = await _within(ECHO_S, arrived, lambda: not rank.tally.store_awaited)
            probe.second = await _generate(client, seen.facts.models[0], prompt, pin)
        except RouterError as error:
            probe.error = error.message


def _ranks(spec: WorkerSpec) -> list[RankSeen]:
    """One per rank, with the addresses that there are to look at."""
    events, replay = (spec.events, spec.replay) if spec.kv_events else (None, None)
    return [
        RankSeen(rank, at_rank(events, rank) if events else None, at_rank(replay, rank) if replay else None)
        for rank in range(spec.dp_size or 1)
    ]


async def _generate(client: VllmHttpClient, model: str, prompt: list[int], rank: int | None) -> Usage | None:
    """Have one token generated; the counts of the answer."""
    request = EngineRequest(
        f"kvrouter-check-{uuid.uuid4().hex[:12]}", model, array("I", prompt), {"max_tokens": 1, "temperature": 0.0}
    )
    usage = None
    async for chunks in client.generate(request, rank):
        for chunk in chunks:
            usage = chunk.usage or usage
    return usage


async def _within(limit_s: float, arrived: asyncio.Event, condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true with one of the next arrivals."""
    try:
        async with asyncio.timeout(limit_s):
            while not condition():
                arrived.clear()
                await arrived.wait()
    except TimeoutError:
        return False
    return True
