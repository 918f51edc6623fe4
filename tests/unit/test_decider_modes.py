"""How the compiled decision picks: ties, chance, turns, sessions, prefixes."""

import math
from collections import Counter

import pytest

from kvrouter_grpc.routing.cost import Weights
from kvrouter_grpc.routing.mode import Knobs
from reference import pick
from reference.field import NO_BLOCKS, Field, Made


def test_ties_go_to_the_fewest_requests_then_evenly():
    field = Field([Made(requests=2), Made(requests=1), Made(queued=1), Made(requests=2)], [1])
    weights = Weights(request_weight=0.0)
    assert {field.decide(weights).row for _ in range(50)} == {1}
    field = Field([Made(requests=3), Made(requests=3), Made(queued=1), Made(requests=3)], [1])
    even = Counter(field.decide(weights).row for _ in range(9000))
    assert set(even) == {0, 1, 3}
    assert all(abs(count - 3000) < 300 for count in even.values())  # six standard deviations


def test_softmax_follows_the_formula():
    field = Field([Made(queued=10), Made(queued=20), Made(queued=40)], [])
    draws, temperature = 30_000, 0.5
    drawn = Counter(field.decide(temperature=temperature).row for _ in range(draws))
    weights = [math.exp(-(cost - 10) / (30 * temperature)) for cost in (10, 20, 40)]
    for row, weight in enumerate(weights):
        share = weight / sum(weights)
        assert drawn[row] / draws == pytest.approx(share, abs=6 * math.sqrt(share / draws))


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_is_never_preferred(temperature, wrong):
    field = Field([Made(taint=math.nan), Made(taint=1.0), Made(taint=math.nan)], range(8))
    choices = [field.decide(cost="dynamo", temperature=temperature, explain=True) for _ in range(50)]
    assert {choice.row for choice in choices} == {1}
    assert [seen.cost for seen in choices[0].recording.candidates()][::2] == [math.inf, math.inf]
    field = Field([Made(), Made()], range(8))
    endless = [field.decide(Weights(new_work_weight=wrong), temperature=temperature) for _ in range(100)]
    assert {choice.row for choice in endless} == {0, 1}  # somebody has to have it
    assert all(choice.cost == math.inf for choice in endless)


def test_taking_turns_and_chance():
    field = Field([Made() for _ in range(5)], range(8))
    for field.turn in range(12):
        assert field.decide(mode="round-robin").row == field.turn % 5
    even = Counter(field.decide(mode="random").row for _ in range(5000))
    assert all(abs(even[row] - 1000) < 180 for row in range(5))


def test_the_less_busy_of_two():
    field = Field([Made(requests=number) for number in range(4)], range(8))
    drawn = Counter(field.decide(mode="power-of-two").row for _ in range(6000))
    # Of six pairs, the least busy row is in three, the next in two more, and so on; the busiest never wins.
    assert [round(6 * drawn[row] / 6000) for row in range(4)] == [3, 2, 1, 0]
    assert drawn[3] == 0
    even = Field([Made()] * 3, range(8))
    drawn = Counter(even.decide(mode="power-of-two").row for _ in range(3000))
    assert all(abs(drawn[row] - 1000) < 160 for row in range(3))
    assert Field([Made()], [1]).decide(mode="power-of-two").row == 0


def test_targets_on_cpus_get_their_share():
    """Each decision is booked: an accelerator that is worth four CPUs ends up with four times as much as one."""
    field = Field([Made(), Made(), Made(on_cpu=True)], range(4))
    for _ in range(900):
        chosen = field.decide(knobs=Knobs(accelerator_to_cpu_ratio=4.0), mode="device-aware-weighted").row
        field.table.book(chosen, NO_BLOCKS, 0, True)
    requests = [field.table.load(row)[0] - 2 for row in field.rows]
    assert requests == pytest.approx([400, 400, 100], abs=4)


def test_a_session_stays_and_a_target_that_goes_moves_only_its_own():
    sessions = [pick.scramble(number) for number in range(2000)]
    field = Field([Made() for _ in range(8)], range(4))
    knobs = Knobs(session_load_bound=1e6)
    homes = {key: field.decide(knobs=knobs, mode="session", session=key).row for key in sessions}
    assert all(abs(count - 250) < 90 for count in Counter(homes.values()).values())
    assert len(set(homes.values())) == 8
    field.rows, field.preferences = field.rows[:3] + field.rows[4:], field.preferences[1:]
    for key, home in homes.items():
        moved = field.decide(knobs=knobs, mode="session", session=key).row
        assert home in {moved, 3}


def test_a_busy_target_passes_sessions_on_and_nobody_exceeds_the_bound():
    field = Field([Made() for _ in range(5)], range(4))
    for number in range(500):
        chosen = field.decide(knobs=Knobs(session_load_bound=1.25), mode="session", session=7 + number % 3).row
        field.table.book(chosen, NO_BLOCKS, 0, True)
    requests = [field.table.load(row)[0] for row in field.rows]
    assert max(requests) <= math.ceil(1.25 * sum(requests) / 5)


def test_prefix_modes_fall_back_when_the_match_is_short():
    made = [Made((3, 0, 0, 0), requests=5), Made((3, 0, 0, 0), requests=4), Made()]
    field = Field(made, range(20))
    assert field.decide(mode="prefix").row == 1
    assert field.decide(knobs=Knobs(prefix_threshold=12), mode="prefix").row == 1
    assert field.decide(knobs=Knobs(prefix_threshold=13), mode="prefix").row == 2
    assert field.decide(knobs=Knobs(kv_aware_threshold=8), mode="kv-aware").row == 1
    assert field.decide(knobs=Knobs(kv_aware_threshold=7), mode="kv-aware").row == 2
    homes = {
        field.decide(knobs=Knobs(session_load_bound=9, kv_aware_threshold=7), mode="kv-aware", session=key).row
        for key in range(50)
    }
    assert homes == {0, 1, 2}
    assert Field([Made(requests=1), Made()], range(20)).decide(mode="kv-aware").row == 1  # nobody holds anything
