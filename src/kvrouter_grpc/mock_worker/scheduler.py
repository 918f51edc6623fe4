"""Continuous batching, one step at a time: who computes how many tokens next. Pure; time passes elsewhere."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvrouter_grpc.mock_worker.blocks import BlockManager
from kvrouter_grpc.mock_worker.sequence import FinishReason, Sequence


@dataclass(slots=True)
class Counters:
    """Running totals that `/metrics` shows; tokens unless named otherwise."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt: int = 0
    prompt_remote: int = 0
    generation: int = 0
    preemptions: int = 0  # times
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("stop", "length", "abort", "error"), 0))


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass.

    Attributes:
        sequences: Who takes part.
        prefill_tokens: Prompt tokens computed (and tokens computed again after a preemption).
        decoding: Sequences that only generate.
    """

    sequences: list[Sequence]
    prefill_tokens: int
    decoding: int


class Scheduler:
    """First come, first served: running sequences first, then waiting ones while budget and memory last."""

    def __init__(self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.blocks = blocks
        self.counters = Counters()
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def num_waiting(self) -> int:
        """Sequences that compute nothing yet, or no longer after a preemption."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self._waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """End a sequence now. Its full blocks stay cached. Does nothing once it has ended."""
        if sequence.finish_reason is not None:
            return
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._end(sequence, "abort")

    def abort_all(self) -> list[Sequence]:
        """End every sequence; returns those it ended."""
        sequences = [*self._running, *self._waiting]
        for sequence in sequences:
            self.abort(sequence)
        return sequences

    def schedule(self) -> Step | None:
        """Plan the next step and give out its blocks; None when nothing can be computed."""
        budget = self._max_num_batched_tokens
        taking_part: list[Sequence] = []
        prefill_tokens = decoding = 0
        preempted = False
        index = 0
        while index < len(self._running) and budget > 0:
            sequence = self._running[index]
            todo = min(len(sequence.table.tokens) - sequence.computed, budget)
            if not self._fits_or_preempts(sequence, sequence.computed + todo):
                preempted = True
                continue  # one sequence less is running; perhaps it was this one
            if sequence.computed + todo > sequence.prompt_tokens and todo == 1:
                decoding += 1
            else:
                prefill_tokens += todo
            sequence.computed += todo
            budget -= todo
            taking_part.append(sequence)
            index += 1
        while not preempted and self._waiting and budget > 0 and len(self._running) < self._max_num_seqs:
            computed = self._admit(self._waiting[0], budget)
            if computed is None:
                break
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            taking_part.append(sequence)
            prefill_tokens += computed
            budget -= computed
        if not taking_part:
            return None
        return Step(taking_part, prefill_tokens, decoding)

    def complete(self, step: Step) -> list[Sequence]:
        """Generate the tokens of a step that was computed; returns the sequences with news."""
        news: list[Sequence] = []
        ended = False
        for sequence in step.sequences:
            if sequence.finish_reason is not None or sequence.computed < len(sequence.table.tokens):
                continue  # aborted meanwhile, or a chunk of a longer prompt
            sequence.step()
            self.counters.generation += 1
            news.append(sequence)
            if sequence.finish_reason is not None:
                ended = True
                self._end(sequence, sequence.finish_reason)
        if ended:
            self._running = [sequence for sequence in self._running if sequence.finish_reason is None]
        return news

    def release(self, sequence: Sequence) -> None:
        """Free the blocks of a sequence that ended with `keep_blocks`."""
        self.blocks.free(sequence.table)

    def _fits_or_preempts(self, sequence: Sequence, num_tokens: int) -> bool:
        """Grow a running sequence, or preempt the youngest one and return False."""
        if self.blocks.grow(sequence.table, num_tokens):
            return True
        victim = self._running.pop()
        self.blocks.free(victim.table)
        victim.computed = 0
        self._waiting.appendleft(victim)
        self.counters.preemptions += 1
        return False

    def _admit(self, sequence: Sequence, budget: int) -> int | None:
        """Start a waiting sequence; returns the tokens it computes in this step, None when memory is short."""
        table, counters = sequence.table, self.counters
        length = len(table.tokens)
        hits = self.blocks.find_prefix(table)
        cached = hits * self.blocks.block_size
        # Of what was sent, the last token is computed here, since that yields the next one.
        ready = max(cached, min(sequence.remote_tokens, length - 1))
        todo = min(length - ready, budget)
        if not self.blocks.admit(table, hits, ready + todo, report_hits=sequence.report_hits):
            return None
        if sequence.cached_tokens is None:
            sequence.cached_tokens = cached
            counters.prefix_queries += length
            counters.prefix_hits += cached
            counters.prompt += length
            counters.prompt_remote += ready - cached
        sequence.computed = ready + todo
        return todo

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        if reason != "abort":  # like vLLM, which does not count clients that went away
            self.counters.finished[reason] += 1
        if reason != "length" or not sequence.keep_blocks:
            self.blocks.free(sequence.table)


def open_requests(schedulers: Iterable[Scheduler]) -> int:
    """Sequences that run or wait."""
    return sum(scheduler.num_running + scheduler.num_waiting for scheduler in schedulers)
