"""Continuous batching: who computes what, step by step."""

import pytest

from kvrouter_grpc.mock_worker.blocks import BlockManager, BlockTable
from kvrouter_grpc.mock_worker.config import MockWorkerConfig
from kvrouter_grpc.mock_worker.kv_events import BlockStored
from kvrouter_grpc.mock_worker.scheduler import Scheduler
from kvrouter_grpc.mock_worker.sequence import Sequence, StopRules
from kvrouter_grpc.mock_worker.tokens import Walk

SIZE = 4
CONFIG = MockWorkerConfig(block_size=SIZE)


def ask(
    prompt: list[int], max_tokens: int = 1, *, remote_tokens: int = 0, keep_blocks: bool = False, **rules: object
) -> Sequence:
    return Sequence(
        table=BlockTable(list(prompt)),
        prompt_tokens=len(prompt),
        rules=StopRules(max_tokens, **rules),  # type: ignore[arg-type]
        walk=Walk(CONFIG, prompt),
        notify=lambda _: None,
        remote_tokens=remote_tokens,
        keep_blocks=keep_blocks,
    )


def scheduler(num_blocks: int = 64, *, max_num_seqs: int = 8, budget: int = 64) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, SIZE), max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)


def run(engine: Scheduler) -> list[tuple[int, int]]:
    """(prefill tokens, decoding sequences) of every step until nothing is left to do."""
    steps = []
    while (step := engine.schedule()) is not None:
        engine.complete(step)
        steps.append((step.prefill_tokens, step.decoding))
    return steps


def test_prefill_then_one_token_a_step() -> None:
    engine = scheduler()
    sequence = ask(list(range(10)), 3)
    engine.add(sequence)
    assert run(engine) == [(10, 0), (0, 1), (0, 1)]
    assert sequence.output_tokens == 3
    assert sequence.finish_reason == "length"
    assert engine.blocks.usage == 0.0


def test_a_long_prompt_is_prefilled_in_chunks_beside_others() -> None:
    engine = scheduler(budget=8)
    short, long = ask(list(range(4)), 4), ask(list(range(100, 120)))
    engine.add(short)
    engine.add(long)
    assert run(engine) == [(8, 0), (7, 1), (7, 1), (2, 1)]


def test_at_most_max_num_seqs_run() -> None:
    engine = scheduler(max_num_seqs=2)
    for start in range(0, 300, 100):
        engine.add(ask(list(range(start, start + 5)), 2))
    step = engine.schedule()
    assert step is not None
    assert (engine.num_running, engine.num_waiting, len(step.sequences)) == (2, 1, 2)
    engine.complete(step)
    run(engine)
    assert engine.counters.finished["length"] == 3


def test_equal_prompts_in_one_step_share_blocks() -> None:
    engine = scheduler()
    first, second = ask(list(range(10))), ask(list(range(10)))
    engine.add(first)
    engine.add(second)
    assert run(engine) == [(12, 0)]
    assert (first.cached_tokens, second.cached_tokens) == (0, 8)
    assert (engine.counters.prefix_queries, engine.counters.prefix_hits) == (20, 8)


def test_short_memory_preempts_the_youngest_which_then_answers_the_same() -> None:
    alone = scheduler()
    wanted = ask(list(range(100, 108)), 12)
    alone.add(wanted)
    run(alone)

    engine = scheduler(num_blocks=8)  # 7 usable blocks, 28 tokens: not enough for two of 20
    old, young = ask(list(range(8)), 12), ask(list(range(100, 108)), 12)
    engine.add(old)
    engine.add(young)
    run(engine)
    assert engine.counters.preemptions == 1
    assert (old.output_tokens, young.output_tokens) == (12, 12)
    assert young.table.tokens == wanted.table.tokens
    assert young.cached_tokens == 0  # counted once, when it first ran
    assert engine.blocks.usage == 0.0


def test_an_abort_frees_memory_for_who_waits_and_leaves_the_cache() -> None:
    engine = scheduler(num_blocks=4)
    held, waiting = ask(list(range(9)), 3), ask(list(range(9)), 3)
    engine.add(held)
    engine.add(waiting)
    step = engine.schedule()
    assert step is not None
    assert engine.num_waiting == 1
    engine.abort(held)
    assert engine.complete(step) == []
    run(engine)
    assert held.finish_reason == "abort"
    assert waiting.finish_reason == "length"
    assert waiting.cached_tokens == 8
    engine.abort(held)  # a second time: nothing
    assert engine.counters.finished["abort"] == 0


def test_remote_prefill_computes_only_the_last_token() -> None:
    engine = scheduler()
    sequence = ask(list(range(10)), 2, remote_tokens=10)
    engine.add(sequence)
    assert run(engine) == [(1, 0), (0, 1)]
    (stored, *_) = engine.blocks.take_events()
    assert isinstance(stored, BlockStored)
    assert len(stored.hashes) == 2
    assert sequence.cached_tokens == 0
    assert engine.counters.prompt_remote == 9


def test_kept_blocks_stay_until_released() -> None:
    engine = scheduler()
    sequence = ask(list(range(10)), keep_blocks=True)
    engine.add(sequence)
    run(engine)
    assert len(sequence.table.blocks) == 3
    assert not engine.blocks.reset()
    engine.release(sequence)
    assert engine.blocks.reset()


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_natural_ends_are_where_the_walk_says(ignore_eos: bool) -> None:
    config = MockWorkerConfig(natural_eos=True, natural_eos_after=4)
    lengths = []
    for start in range(200):
        prompt = [start, start + 1]
        sequence = ask(prompt, 64, ignore_eos=ignore_eos)
        sequence.walk = Walk(config, prompt)
        engine = scheduler()
        engine.add(sequence)
        run(engine)
        lengths.append(sequence.output_tokens)
        assert sequence.finish_reason == ("length" if ignore_eos else "stop")
        assert sequence.stop_reason is None
    mean = sum(lengths) / len(lengths)
    assert mean == 64 if ignore_eos else 3 < mean < 5


def test_stop_tokens_stop_but_not_before_min_tokens() -> None:
    free = ask(list(range(5)), 8)
    engine = scheduler()
    engine.add(free)
    run(engine)
    output = free.table.tokens[5:]
    stopped = ask(list(range(5)), 8, stop_token_ids=frozenset([output[2]]))
    engine.add(stopped)
    late = ask(list(range(5)), 8, stop_token_ids=frozenset([output[2]]), min_tokens=4)
    engine.add(late)
    run(engine)
    assert stopped.table.tokens[5:] == output[:3]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", output[2])
    assert stopped.take() == (output[:3], f" w{output[0]} w{output[1]}")
    assert late.table.tokens[5:] == output


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_cut_the_text_across_tokens(include: bool) -> None:
    free = ask(list(range(5)), 4)
    engine = scheduler()
    engine.add(free)
    run(engine)
    words = [f" w{token}" for token in free.table.tokens[5:]]
    stop = words[1][-1] + words[2][:2]  # reaches from the second word into the third
    sequence = ask(list(range(5)), 4, stop=("never", stop), include_stop=include)
    engine.add(sequence)
    pieces = []
    while (step := engine.schedule()) is not None:
        engine.complete(step)
        pieces.append(sequence.take()[1])
    text = "".join(pieces)
    assert text == words[0] + words[1][:-1] + (stop if include else "")
    assert (sequence.finish_reason, sequence.stop_reason) == ("stop", stop)
    assert sequence.output_tokens == 3
