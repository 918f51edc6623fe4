"""How far a picture is trusted: bounds, what each piece of evidence does, and that repairs give all of it back."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrouter_grpc.routing.stream import ECHO_S, LEAST, Evidence, PromptWatch, StreamStatus, freshness
from kvrouter_grpc.types import StreamState

COUNTS = st.integers(0, 1 << 40)
EVIDENCE = st.builds(
    Evidence,
    heard=st.booleans(),
    predicted=st.booleans(),
    known=COUNTS,
    lost=COUNTS,
    partial=st.booleans(),
    behind=COUNTS,
    doubted=st.booleans(),
    unsettled_s=st.floats(0, 1e9),
    silent_prompts=st.integers(0, 64),
    blocks=COUNTS,
    orphans=COUNTS,
    unread=COUNTS,
    accuracy=st.floats(0, 1),
)
FALL = ("lost", "behind", "unsettled_s", "silent_prompts", "orphans", "unread")
RISE = ("known", "blocks", "accuracy")


@given(EVIDENCE)
def test_trust_is_a_number_between_none_and_full_and_so_is_every_part(seen: Evidence) -> None:
    value, *parts = freshness(seen)
    assert value == 0 or LEAST <= value <= 1
    assert all(0 <= part <= 1 for part in parts)
    assert value <= min(parts) or not seen.heard
    if not seen.heard:
        assert value == 0


@given(EVIDENCE, st.sampled_from(FALL), st.integers(1, 1 << 20))
def test_more_of_what_speaks_against_it_never_raises_the_trust(seen: Evidence, name: str, more: int) -> None:
    worse = seen._replace(**{name: getattr(seen, name) + more})
    assert freshness(worse).value <= freshness(seen).value


@given(EVIDENCE, st.sampled_from(("partial", "doubted", "predicted")))
def test_nor_does_a_doubt(seen: Evidence, name: str) -> None:
    without, doubtful = seen._replace(**{name: False}), seen._replace(**{name: True})
    assert freshness(doubtful).value <= freshness(without).value


@given(EVIDENCE, st.sampled_from(RISE), st.floats(0, 1))
def test_more_of_what_speaks_for_it_never_lowers_the_trust(seen: Evidence, name: str, share: float) -> None:
    more = max(seen.accuracy, share) if name == "accuracy" else getattr(seen, name) + int(share * (1 << 30))
    assert freshness(seen._replace(**{name: more})).value >= freshness(seen).value


@given(COUNTS, COUNTS)
def test_a_stream_in_order_is_trusted_fully_however_quiet(known: int, blocks: int) -> None:
    assert set(freshness(Evidence(known=known, blocks=blocks))) == {1.0}


@pytest.mark.parametrize(
    ("seen", "part"),
    [
        (Evidence(known=32, lost=2), "coverage"),
        (Evidence(known=3, behind=3), "lag"),
        (Evidence(known=3, doubted=True), "lag"),
        (Evidence(known=3, unsettled_s=10.0), "lag"),
        (Evidence(known=3, silent_prompts=2), "silence"),
    ],
)
def test_what_halves_the_trust(seen: Evidence, part: str) -> None:
    trust = freshness(seen)
    assert (trust.value, getattr(trust, part)) == (0.5, 0.5)
    assert sum(value < 1 for value in trust[1:]) == 1


def test_what_only_hides_blocks_costs_little() -> None:
    assert freshness(Evidence(known=10, partial=True)).value == 0.9
    assert freshness(Evidence(known=10, orphans=1000)).value == 0.75
    assert freshness(Evidence(known=10, blocks=100, orphans=100)).value == 0.875
    assert freshness(Evidence(known=100, unread=100)).value == 0.75


@pytest.mark.parametrize(
    "seen",
    [
        Evidence(heard=False),
        Evidence(known=0, lost=1),
        Evidence(known=0, behind=5),
        Evidence(known=100, unsettled_s=61.0),
        Evidence(known=100, silent_prompts=13),
        Evidence(known=100, accuracy=0.0),
    ],
)
def test_when_nothing_can_be_trusted(seen: Evidence) -> None:
    assert freshness(seen).value == 0.0


class TestSilence:
    def test_a_prompt_is_overdue_some_time_after_its_first_token(self) -> None:
        watch = PromptWatch()
        watch.computed(booked_at=10.0, now=11.0)
        assert watch.silent(0.0, 11.0) == 0
        assert watch.silent(0.0, 11.0 + ECHO_S) == 1

    def test_any_event_since_it_was_booked_answers_it(self) -> None:
        watch = PromptWatch()
        watch.computed(booked_at=10.0, now=11.0)
        watch.computed(booked_at=10.8, now=11.2)
        assert watch.silent(10.5, 20.0) == 1
        assert watch.silent(10.8, 20.0) == 0
        assert watch.silent(0.0, 20.0) == 0  # once answered, it stays so

    def test_a_prompt_that_was_cached_after_all_is_excused(self) -> None:
        watch = PromptWatch()
        watch.computed(10.0, 11.0)
        watch.computed(12.0, 13.0)
        watch.excuse(10.0)
        assert watch.silent(0.0, 99.0) == 1
        watch.excuse(12.0)
        assert not watch

    def test_without_prompts_silence_is_normal(self) -> None:
        assert PromptWatch().silent(0.0, 1e9) == 0

    def test_another_picture_expects_nothing_of_the_one_before(self) -> None:
        watch = PromptWatch()
        watch.computed(10.0, 11.0)
        watch.clear()
        assert watch.silent(0.0, 99.0) == 0

    def test_memory_is_bounded(self) -> None:
        watch = PromptWatch()
        for _ in range(10_000):
            watch.computed(1.0, 1.0)
        assert watch.silent(0.0, 99.0) == 64


class TestStatus:
    def status(self, **fields: object) -> StreamStatus:
        return replace(StreamStatus(state=StreamState.LIVE, known=10, last_event_at=5.0), **fields)

    def seen(self, status: StreamStatus, now: float = 100.0, *, accuracy: float = 1.0) -> Evidence:
        return status.evidence(now, blocks=7, orphans=0, accuracy=accuracy)

    def test_what_is_repaired_is_trusted_fully_again(self) -> None:
        status = self.status(
            state=StreamState.SYNCING,
            known=100,
            unsettled_at=90.0,
            behind=3,
            lost=2,
            doubted=True,
            unread=1,
            partial=True,
        )
        status.prompts.computed(6.0, 7.0)
        assert 0 < freshness(self.seen(status, accuracy=0.5)).value < 0.1
        status.state, status.unsettled_at, status.behind, status.doubted = StreamState.LIVE, None, 0, False
        status.lost = status.unread = 0
        status.partial = False
        status.last_event_at = 8.0
        assert freshness(self.seen(status)).value == 1.0

    @pytest.mark.parametrize("state", [StreamState.COLD, StreamState.OFF])
    def test_of_whom_nothing_was_heard_nothing_is_trusted(self, state: StreamState) -> None:
        assert freshness(self.seen(self.status(state=state))).value == 0

    def test_nothing_announces_what_is_predicted(self) -> None:
        status = self.status(state=StreamState.PREDICTED)
        status.prompts.computed(50.0, 51.0)
        assert freshness(self.seen(status)).value == 0.9

    def test_one_sentence_says_what_is_wrong(self) -> None:
        status = self.status()
        assert status.told(self.seen(status)) == ""
        status.unread = 3
        assert status.told(self.seen(status)).startswith("events that could not be read (3)")
        status.prompts.computed(50.0, 51.0)
        assert status.told(self.seen(status)).startswith(
            "no event has told of the blocks of prompts that were computed there (1)"
        )
        status.state, status.detail = StreamState.STALE, "2 batches are lost"
        assert status.told(self.seen(status)) == "2 batches are lost"
        status.state = StreamState.COLD
        assert "topic" in status.told(self.seen(status))
