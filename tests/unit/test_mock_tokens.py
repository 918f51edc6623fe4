"""The mock's model."""

import pytest

from kvrouter_grpc.errors import ConfigError
from kvrouter_grpc.mock_worker.config import FIRST_WORD_TOKEN, MockWorkerConfig
from kvrouter_grpc.mock_worker.tokens import EOS_TOKEN, Walk, encode_text, token_text

CONFIG = MockWorkerConfig()


def answer(
    config: MockWorkerConfig, prompt: list[int], length: int = 20, *, adapter: str = "", variant: int = 0
) -> list[int]:
    walk = Walk(config, prompt, adapter=adapter, variant=variant)
    return [walk.next() for _ in range(length)]


def test_the_same_prompt_is_answered_alike_and_others_differently() -> None:
    first = answer(CONFIG, [1, 2, 3])
    assert first == answer(MockWorkerConfig(model="other", block_size=32), [1, 2, 3])
    different = [
        answer(CONFIG, [1, 2, 4]),
        answer(MockWorkerConfig(seed=1), [1, 2, 3]),
        answer(CONFIG, [1, 2, 3], adapter="a"),
        answer(CONFIG, [1, 2, 3], variant=1),
    ]
    assert len({tuple(tokens) for tokens in (first, *different)}) == 5
    assert all(FIRST_WORD_TOKEN <= token < CONFIG.vocab_size for token in first)


def test_an_answer_can_be_continued_from_any_point() -> None:
    whole = answer(CONFIG, [7] * 50)
    for cut in range(1, 20):
        assert answer(CONFIG, [7] * 50 + whole[:cut], 20 - cut) == whole[cut:]


def test_answers_are_spread_over_the_vocabulary() -> None:
    config = MockWorkerConfig(vocab_size=FIRST_WORD_TOKEN + 100)
    seen = {token for start in range(50) for token in answer(config, [start])}
    assert len(seen) > 95


def test_text_is_bytes() -> None:
    tokens = encode_text("añ")
    assert tokens == [5 + byte for byte in "añ".encode()]
    assert token_text(tokens[0]) == "a"
    assert token_text(EOS_TOKEN) == ""
    assert token_text(300) == " w300"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"block_size": 0}, "block_size"),
        ({"num_blocks": 1}, "num_blocks"),
        ({"vocab_size": 100}, "vocab_size"),
        ({"port": 70_000}, "port"),
        ({"events_port": 65_535, "dp_size": 2}, "events_port"),
        ({"speedup": -1.0}, "speedup"),
        ({"itl_ms": float("nan")}, "itl_ms"),
        ({"itl_ms": float("inf")}, "itl_ms"),
        ({"replay_frames": 5}, "replay_frames"),
        ({"loras": ("a", "a")}, "must differ"),
        ({"loras": ("=path",)}, "must not be empty"),
        ({"num_blocks": 4, "max_model_len": 49}, "raise num_blocks"),
    ],
)
def test_a_worker_that_could_not_run_is_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        MockWorkerConfig(**change)  # type: ignore[arg-type]
    assert len(caught.value.faults) == 1


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        MockWorkerConfig(block_size=0, dp_size=0, model="")
    assert len(caught.value.faults) == 3


def test_the_context_is_what_fits() -> None:
    assert MockWorkerConfig(num_blocks=11, block_size=16).context_tokens == 160
    assert MockWorkerConfig().context_tokens == 8192
    assert MockWorkerConfig(max_model_len=100).context_tokens == 100
