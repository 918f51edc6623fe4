"""Hits as foretold against hits as found: what counts as wrong, when the alarm is raised, what is done about it."""

from hypothesis import given
from hypothesis import strategies as st

from kvrouter_grpc.routing.prediction import ALARM, METRICS_REQUESTS, RESYNC_S, UNTOLD, WINDOW, HitPrediction
from kvrouter_grpc.types import Decision, EngineReport, Overlap, Target

SIZE = 16


def decision(prompt: int = 160, held: int = 0, *, likely: int = 0, host: int = 0) -> Decision:
    """Of a prompt of so many tokens, with so many blocks held, and so many tokens counted as cached."""
    usable = (prompt - 1) // SIZE
    cached = max(likely, min(held + host, usable)) * SIZE
    overlap = Overlap(held, host)
    return Decision(Target(1, 0), "a", "", overlap, SIZE, prompt, prompt // SIZE, cached, 0.0, 1.0)


def answer(hits: HitPrediction, made: Decision, cached: int | None, *, times: int = 1) -> HitPrediction:
    for _ in range(times):
        expected = hits.expect(made, 0.0)
        hits.computed(expected)
        hits.finished(expected, cached)
    return hits


def counts(hits: HitPrediction) -> tuple[int, int, int]:
    return hits.exact, hits.over, hits.under


class TestOneRequest:
    def test_what_is_expected(self) -> None:
        expected = HitPrediction().expect(decision(prompt=165, held=3, host=2, likely=7), 5.0)
        assert (expected.booked_at, expected.held, expected.likely, expected.new_blocks) == (5.0, 80, 112, 3)

    def test_of_a_prompt_held_as_a_whole_the_last_block_is_computed_again(self) -> None:
        expected = HitPrediction().expect(decision(prompt=160, held=10), 0.0)
        assert (expected.held, expected.likely, expected.new_blocks) == (144, 144, 1)

    def test_within_a_block_it_is_exact(self) -> None:
        for found in (48, 64, 80):
            hits = answer(HitPrediction(), decision(held=4), found)
            assert (counts(hits), hits.accuracy, hits.error_tokens) == ((1, 0, 0), 1.0, 0.0)
        assert counts(answer(HitPrediction(), decision(held=4), 47)) == (0, 1, 0)
        assert counts(answer(HitPrediction(), decision(held=4), 81)) == (0, 0, 1)

    def test_blocks_in_flight_may_be_there_in_time_or_not(self) -> None:
        for found in (32, 64, 100, 128):
            assert counts(answer(HitPrediction(), decision(held=2, likely=8), found)) == (1, 0, 0)

    def test_errors_are_added_up(self) -> None:
        hits = answer(HitPrediction(), decision(held=8), 64)
        assert (hits.foretold_tokens, hits.found_tokens, hits.error_tokens) == (128, 64, 64 / 16)
        assert hits.accuracy == 1 - 0.5 / WINDOW

    def test_before_the_block_size_is_known_nothing_is_judged(self) -> None:
        made = decision(held=4)
        made.block_size = 0
        assert counts(answer(HitPrediction(), made, 0)) == (0, 0, 0)

    def test_a_picture_begun_meanwhile_is_not_judged_by_it(self) -> None:
        hits = HitPrediction()
        expected = hits.expect(decision(held=4), 0.0)
        hits.begun()
        hits.computed(expected)
        hits.finished(expected, 0)
        assert (counts(hits), hits.accuracy, hits.tells) == ((0, 0, 0), 1.0, True)


@given(st.integers(0, 2000), st.integers(0, 130), st.integers(0, 130), st.integers(0, 1 << 32))
def test_every_answer_is_one_of_three_and_the_accuracy_stays_in_bounds(
    prompt: int, held: int, likely: int, found: int
) -> None:
    hits = answer(HitPrediction(), decision(prompt, held, likely=likely), found, times=20)
    assert sum(counts(hits)) == 20
    assert 0 <= hits.accuracy <= 1
    assert hits.error_tokens >= 0


class TestAlarm:
    def test_single_misses_are_normal(self) -> None:
        hits = HitPrediction()
        for _ in range(50):
            answer(hits, decision(held=8), 128, times=WINDOW - ALARM + 1)
            answer(hits, decision(held=8), 0, times=ALARM - 1)
            assert not hits.drifting
            assert not hits.resync_due(0.0)

    def test_misses_in_a_row_are_not(self) -> None:
        hits = answer(HitPrediction(), decision(held=8), 0, times=ALARM - 1)
        assert not hits.drifting
        answer(hits, decision(held=8), 0)
        assert (hits.drifting, hits.alarms, hits.accuracy) == (True, 1, 1 - ALARM / WINDOW)
        assert "found less cached than foretold in 8 of the last 16" in hits.told
        answer(hits, decision(held=8), 0, times=WINDOW)
        assert (hits.alarms, hits.accuracy) == (1, 0.0)

    def test_finding_more_raises_none(self) -> None:
        hits = answer(HitPrediction(), decision(held=2), 144, times=100)
        assert (counts(hits), hits.drifting, hits.accuracy) == ((0, 0, 100), False, 1.0)

    def test_prompts_of_which_a_block_is_held_prove_nothing(self) -> None:
        hits = answer(HitPrediction(), decision(held=8), 0, times=ALARM - 1)
        answer(hits, decision(held=1), 0, times=100)
        answer(hits, decision(held=0), 0, times=100)
        assert not hits.drifting
        assert hits.accuracy == 1 - (ALARM - 1) / WINDOW

    def test_it_comes_right_by_itself(self) -> None:
        hits = answer(HitPrediction(), decision(held=8), 0, times=WINDOW)
        answer(hits, decision(held=8), 128, times=WINDOW)
        assert (hits.drifting, hits.accuracy, hits.told) == (False, 1.0, "")


class TestResync:
    def drift(self, hits: HitPrediction) -> HitPrediction:
        return answer(hits, decision(held=8), 0, times=ALARM)

    def test_at_once_and_then_ever_more_seldom_while_it_does_not_help(self) -> None:
        hits = self.drift(HitPrediction())
        now, gaps = 1000.0, []
        assert hits.resync_due(now)
        for _ in range(9):
            hits.begun()
            assert (hits.drifting, hits.accuracy) == (False, 1.0)
            assert not hits.resync_due(now)
            self.drift(hits)
            began = now
            while not hits.resync_due(now):
                now += 1.0
            gaps.append(now - began)
        assert gaps == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]

    def test_one_that_helped_makes_the_next_one_come_soon_again(self) -> None:
        hits = self.drift(HitPrediction())
        for now in (0.0, RESYNC_S, 3 * RESYNC_S):
            assert hits.resync_due(now)
            hits.begun()
            self.drift(hits)
        hits.begun()
        answer(hits, decision(held=8), 128, times=WINDOW)
        self.drift(hits)
        assert hits.resync_due(1e6)
        hits.begun()
        self.drift(hits)
        assert not hits.resync_due(1e6 + RESYNC_S - 1)
        assert hits.resync_due(1e6 + RESYNC_S)


class TestEnginesThatDoNotTell:
    def report(self, hits: HitPrediction, queries: int, found: int) -> None:
        hits.reported(EngineReport(0, 0, prefix_queries=queries, prefix_hits=found))

    def test_are_found_out(self) -> None:
        hits = answer(HitPrediction(), decision(held=1), None, times=100)
        assert hits.tells is None  # they may leave out a 0, and so may the router be wrong by a block
        answer(hits, decision(held=8), None, times=UNTOLD)
        assert hits.tells is False
        assert "--enable-prompt-tokens-details" in hits.told
        assert counts(hits) == (0, 0, 0)
        answer(hits, decision(held=8), 128)
        assert (hits.tells, hits.told) == (True, "")

    def test_one_that_told_once_means_none_by_nothing(self) -> None:
        hits = answer(HitPrediction(), decision(held=8), 128)
        answer(hits, decision(held=8), None, times=ALARM)
        assert (hits.tells, counts(hits), hits.drifting) == (True, (1, ALARM, 0), True)

    def test_are_judged_by_their_metrics(self) -> None:
        hits = HitPrediction()
        self.report(hits, 1000, 500)
        for wrong, queries in ((False, 16 * 160), (True, 2 * 16 * 160)):
            answer(hits, decision(held=8), None, times=METRICS_REQUESTS)
            self.report(hits, 1000 + queries, 500)
            assert hits.drifting is wrong
        assert (hits.alarms, hits.accuracy) == (1, 0.5)

    def test_hits_from_elsewhere_only_add(self) -> None:
        hits = HitPrediction()
        self.report(hits, 0, 0)
        answer(hits, decision(held=8), None, times=METRICS_REQUESTS)
        self.report(hits, 1_000_000, 900_000)
        assert hits.accuracy == 1.0

    def test_prompts_that_were_not_looked_up_prove_nothing(self) -> None:
        hits = HitPrediction()
        self.report(hits, 0, 0)
        answer(hits, decision(held=8), None, times=10 * METRICS_REQUESTS)
        self.report(hits, 10, 0)
        assert hits.accuracy == 1.0

    def test_few_requests_are_not_judged_and_a_new_process_begins_anew(self) -> None:
        hits = HitPrediction()
        answer(hits, decision(held=8), None, times=METRICS_REQUESTS)  # before the first report: since when is unknown
        self.report(hits, 100, 100)
        answer(hits, decision(held=8), None, times=METRICS_REQUESTS - 1)
        self.report(hits, 10_000, 100)
        assert hits.accuracy == 1.0
        self.report(hits, 50, 0)
        answer(hits, decision(held=8), None)
        self.report(hits, 10_000, 0)
        assert hits.accuracy == 1.0

    def test_metrics_say_nothing_more_where_answers_tell(self) -> None:
        hits = answer(HitPrediction(), decision(held=8), 128)
        self.report(hits, 0, 0)
        answer(hits, decision(held=8), 128, times=100)
        self.report(hits, 1_000_000, 0)
        assert hits.accuracy == 1.0

    def test_metrics_that_do_not_count_hits_are_of_no_use(self) -> None:
        hits = HitPrediction()
        hits.reported(EngineReport(0, 0))
        answer(hits, decision(held=8), None, times=100)
        hits.reported(EngineReport(0, 0))
        assert hits.accuracy == 1.0
