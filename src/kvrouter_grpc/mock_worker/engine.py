"""One data-parallel rank at work: lets time pass between the steps of its scheduler."""

import asyncio
from collections.abc import Callable

from kvrouter_grpc.mock_worker.blocks import BlockManager
from kvrouter_grpc.mock_worker.config import MockWorkerConfig
from kvrouter_grpc.mock_worker.histogram import Histogram
from kvrouter_grpc.mock_worker.kv_events import KvEvent
from kvrouter_grpc.mock_worker.scheduler import Scheduler, Step
from kvrouter_grpc.mock_worker.sequence import Sequence

# Steps that end late (a busy machine, coarse timers) are caught up with, but never by more than this.
_CATCH_UP_S = 0.05
_TTFT_BUCKETS_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)


class Engine:
    """Runs one rank: plan a step, wait as long as it would take, hand out its tokens and events."""

    def __init__(self, config: MockWorkerConfig, publish: Callable[[list[KvEvent]], None] | None) -> None:
        """Set up an idle engine.

        Args:
            config: Sizes and speed.
            publish: Takes the events of one step; None when nobody listens.
        """
        self.blocks = BlockManager(
            config.num_blocks, config.block_size, config.hash_seed, prefix_caching=config.prefix_caching
        )
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self.ttft = Histogram(_TTFT_BUCKETS_S)
        self.failed = False
        self._publish = publish
        self._seconds_per_prefill_token = 1.0 / config.prefill_tokens_per_s
        self._seconds_per_decode_step = config.itl_ms / 1000.0
        self._speedup = config.speedup
        self._work = asyncio.Event()
        self._running = asyncio.Event()
        self._running.set()
        self._deadline = 0.0

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence; `sequence.notify` hears of its progress."""
        sequence.arrived = asyncio.get_running_loop().time()
        self.scheduler.add(sequence)
        self._work.set()

    def abort(self, sequence: Sequence) -> None:
        """End a sequence that nobody waits for any more."""
        self.scheduler.abort(sequence)
        self._work.set()  # others may fit now

    def abort_all(self) -> None:
        """End every sequence with the finish reason "abort"."""
        for sequence in self.scheduler.abort_all():
            sequence.notify(sequence)

    def fail(self) -> None:
        """Die like an engine process under a living front end."""
        self.failed = True
        self.abort_all()

    def release(self, sequence: Sequence) -> None:
        """Free the blocks that an ended sequence still held."""
        self.scheduler.release(sequence)
        self._work.set()

    def pause(self) -> None:
        """Compute nothing until `resume`."""
        self._running.clear()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._running.set()

    async def run(self) -> None:
        """Work until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._running.wait()
            step = self.scheduler.schedule()
            if step is None:
                self._work.clear()
                await self._work.wait()
                self._deadline = loop.time()
                continue
            await self._compute(step, loop)
            await self._running.wait()
            news = self.scheduler.complete(step)
            events = self.blocks.take_events()
            if events and self._publish is not None:
                self._publish(events)
            now = loop.time()
            for sequence in news:
                if sequence.output_tokens == 1:
                    self.ttft.observe(now - sequence.arrived)
                sequence.notify(sequence)

    async def _compute(self, step: Step, loop: asyncio.AbstractEventLoop) -> None:
        if not self._speedup:
            await asyncio.sleep(0)
            return
        duration = step.prefill_tokens * self._seconds_per_prefill_token
        if step.decoding:
            duration += self._seconds_per_decode_step
        now = loop.time()
        self._deadline = max(self._deadline, now - _CATCH_UP_S) + duration / self._speedup
        await asyncio.sleep(max(0.0, self._deadline - now))
