"""An engine: steps that mix a chunk of prefill with one token for each running request."""

import heapq
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bench.traces.cache import Cache, Span
from bench.traces.trace import Path, Request


@dataclass(frozen=True, slots=True)
class EngineModel:
    """How long the steps of an engine take, and what fits into one.

    A step takes `max(least_step_s, prefill) + per_decode_s * running + read_s * tokens of context that they read`. The
    time of a prefill token grows with what is in front of it: `(1 + context / context_doubles) / prefill_rate`.

    Attributes:
        cache_tokens: Size of the KV cache.
        batch_tokens: Most tokens in one step: a longer prompt is computed in chunks.
        long_prompt_tokens: Most tokens of one prompt in one step while there are other requests; the rest of the step
            is for those behind it (vLLM's `--long-prefill-token-threshold`).
        most_running: Requests that run at a time.
    """

    prefill_rate: float = 20_000.0
    least_step_s: float = 0.008
    per_decode_s: float = 0.000_05
    read_s: float = 0.0
    context_doubles: float = math.inf
    cache_tokens: int = 320_000
    batch_tokens: int = 8192
    long_prompt_tokens: int = 8192
    most_running: int = 256

    def prefill_s(self, context: int, tokens: int) -> float:
        """Seconds to compute `tokens` behind `context` others."""
        return tokens / self.prefill_rate * (1 + (context + tokens / 2) / self.context_doubles)

    def scaled(self, speed: float, cache: float = 1.0) -> "EngineModel":
        """An engine on hardware `speed` times as fast with `cache` times the room."""
        return replace(
            self,
            prefill_rate=self.prefill_rate * speed,
            least_step_s=self.least_step_s / speed,
            per_decode_s=self.per_decode_s / speed,
            read_s=self.read_s / speed,
            cache_tokens=int(self.cache_tokens * cache),
        )


LINEAR = EngineModel()
ROOFLINE = EngineModel(prefill_rate=25_000.0, read_s=0.000_04 / 1000, context_doubles=30_000.0)
LINEAR_PASSING = replace(LINEAR, long_prompt_tokens=2048)
MODELS = {"lin": LINEAR, "roof": ROOFLINE, "passing": LINEAR_PASSING}


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way through an engine. Times are seconds; -1 while they have not come."""

    request: Request
    number: int
    arrival: float
    engine: int = -1
    first_token: float = -1.0
    end: float = -1.0
    held_blocks: int = 0  # found in the cache when it was admitted
    cached_blocks: int = 0  # of them, those that it did not have to compute again
    computed: int = 0  # prompt tokens that are cached or computed
    private_blocks: int = 0
    admitted: bool = False
    lease: Any = None


class Engine:
    """One engine. Whoever drives it calls `submit`, and `wake` at the time that either of them returned last.

    Args:
        model: Its speed and size.
        block_size: Tokens per block.
        first_token: Called with each job that has its first token.
        ended: Called with each job that has all of them.
        publish: Called with (stored, removed) at the end of a step that changed the cache.

    Attributes:
        prefilled: Prompt tokens computed.
        busy_s: Seconds spent in steps that computed prompt tokens.
    """

    def __init__(
        self,
        model: EngineModel,
        block_size: int,
        first_token: Callable[[Job, float], None],
        ended: Callable[[Job, float], None],
        publish: Callable[[list[Span], list[Span]], None],
    ) -> None:
        self.model = model
        self.cache = Cache(model.cache_tokens // block_size)
        self.prefilled = 0
        self.busy_s = 0.0
        self.waiting: deque[Job] = deque()
        self.prefilling: list[Job] = []
        self._size = block_size
        self._first_token, self._ended, self._publish = first_token, ended, publish
        self._ticks = 0  # tokens that a request would have which ran from the start
        self._running: list[tuple[int, int, Job]] = []  # heap by the tick of the last token
        self._context = 0  # tokens in front of what the running requests compute
        # The stretch of equal steps that is under way: its start, its steps, and what they compute.
        self._since = 0.0
        self._steps = 0
        self._until = 0.0
        self._chunks: list[tuple[Job, int]] = []
        self._removed: list[Span] = []

    @property
    def running(self) -> int:
        """Requests that get a token per step."""
        return len(self._running)

    def submit(self, job: Job, now: float) -> float:
        """Queue a job. Returns when to wake the engine."""
        if job.request.prompt_tokens + job.request.output_tokens > self.cache.capacity * self._size:
            raise ValueError(f"a request of {job.request.prompt_tokens} tokens does not fit into an empty cache")
        self.waiting.append(job)
        if self._steps == 0:
            return self._begin(now)
        if self._steps > 1:
            # Join at the end of the step that is under way.
            self._steps = 1 + bisect_left(range(1, self._steps), now - self._since, key=self._elapsed)
            self._until = self._since + self._elapsed(self._steps)
        return self._until

    def wake(self, now: float) -> float:
        """End the stretch under way and begin the next. Returns its end; infinity if there is nothing to do."""
        stored, removed = self._changes()
        if stored or removed:
            self._publish(stored, removed)
        self._ticks += self._steps
        self._context += len(self._running) * self._steps
        for job, tokens in self._chunks:
            job.computed += tokens
            if job.computed == job.request.prompt_tokens:
                self.prefilling.remove(job)
                self._start_decoding(job, now)
        running = self._running
        while running and running[0][0] <= self._ticks:
            self._finish(heapq.heappop(running)[2], now)
        self._chunks = []
        return self._begin(now)

    def left_over(self, job: Job) -> int:
        """Prompt tokens that the step under way leaves of a job that is being computed."""
        return job.request.prompt_tokens - job.computed - sum(tokens for each, tokens in self._chunks if each is job)

    def step_ends_in(self, now: float) -> float:
        """Seconds until a new request could be looked at."""
        if self._steps == 0:
            return 0.0
        if self._steps == 1:
            return self._until - now
        steps = 1 + bisect_left(range(1, self._steps), now - self._since, key=self._elapsed)
        return self._since + self._elapsed(steps) - now

    def decode_share(self) -> float:
        """Seconds that the running requests add to each step."""
        return self.model.per_decode_s * len(self._running) + self.model.read_s * self._context

    # --- steps -------------------------------------------------------------------------------------------------------

    def _begin(self, now: float) -> float:
        self._since = now
        self._fill()
        running = len(self._running)
        if self._chunks:
            self._steps = 1
            work = 0.0
            for job, tokens in self._chunks:
                self.prefilled += tokens
                work += self.model.prefill_s(job.computed, tokens)
            self._until = now + max(self.model.least_step_s, work) + self.decode_share()
            self.busy_s += self._until - now
        elif running:
            self._steps = self._running[0][0] - self._ticks
            self._until = now + self._elapsed(self._steps)
        else:
            self._steps = 0
            return math.inf
        return self._until

    def _elapsed(self, steps: int) -> float:
        """Seconds that so many steps without prefill take: their context grows by a token per request and step."""
        model, running = self.model, len(self._running)
        read = self._context * steps + running * steps * (steps - 1) // 2
        return steps * (model.least_step_s + model.per_decode_s * running) + model.read_s * read

    def _fill(self) -> None:
        """Choose the chunks of the next step: in order of arrival, as many tokens as it takes."""
        room = self.model.batch_tokens - len(self._running)
        alone = len(self._running) + len(self.prefilling) + len(self.waiting) == 1
        most = self.model.batch_tokens if alone else self.model.long_prompt_tokens
        begun = iter(tuple(self.prefilling))
        while room > 0:
            job = next(begun, None) or self._admit()
            if job is None:
                break
            tokens = min(room, most, job.request.prompt_tokens - job.computed)
            self._chunks.append((job, tokens))
            room -= tokens

    def _admit(self) -> Job | None:
        """The next waiting job, if it fits. Room for its answer is set aside at once, so nobody is preempted."""
        if not self.waiting or len(self._running) + len(self.prefilling) >= self.model.most_running:
            return None
        job = self.waiting[0]
        request, size = job.request, self._size
        blocks = sum(map(len, request.path))
        private = -(-(request.prompt_tokens + request.output_tokens) // size) - blocks
        held = job.held_blocks = self.cache.match(request.path)
        evicted = self.cache.admit(request.path, private)
        if evicted is None:
            return None
        self.waiting.popleft()
        self._removed += evicted
        job.private_blocks = private
        # The last token is always computed, and the cache serves whole blocks.
        job.cached_blocks = min(self._computed(request.path, held), (request.prompt_tokens - 1) // size)
        job.computed = job.cached_blocks * size
        job.admitted = True
        self.prefilling.append(job)
        return job

    def _computed(self, path: Path, held: int) -> int:
        """Leading blocks, of those held, that are computed when the next step ends; a longer prompt may be at them."""
        for job in self.prefilling:
            common = sum(len(ours) for ours, theirs in zip(path, job.request.path, strict=False) if ours is theirs)
            done = (job.request.prompt_tokens - self.left_over(job)) // self._size
            if done < common:
                held = min(held, done)
        return held

    def _changes(self) -> tuple[list[Span], list[Span]]:
        stored: list[Span] = []
        for job, tokens in self._chunks:
            start, end = job.computed // self._size, (job.computed + tokens) // self._size
            _add_spans(stored, job.request, max(start, job.held_blocks), end)
        removed, self._removed = self._removed, []
        return stored, removed

    def _start_decoding(self, job: Job, now: float) -> None:
        self._first_token(job, now)
        if job.request.output_tokens == 1:
            self._release(job, now)
            return
        heapq.heappush(self._running, (self._ticks + job.request.output_tokens - 1, job.number, job))
        self._context += job.request.prompt_tokens

    def _finish(self, job: Job, now: float) -> None:
        self._context -= job.request.prompt_tokens + job.request.output_tokens - 1
        self._release(job, now)

    def _release(self, job: Job, now: float) -> None:
        request = job.request
        kept = self.cache.keep(request.answer)
        self.cache.release((*request.path, *kept), job.private_blocks - sum(map(len, kept)))
        if kept:
            self._publish([Span(segment, 0, len(segment.ids)) for segment in kept], [])
        self._ended(job, now)


def _add_spans(spans: list[Span], request: Request, start: int, end: int) -> None:
    """Append the blocks `start` to `end` of a prompt."""
    place = 0
    for segment in request.path:
        size = len(segment.ids)
        if place >= end:
            break
        if place + size > start:
            spans.append(Span(segment, max(0, start - place), min(size, end - place)))
        place += size
