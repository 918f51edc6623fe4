"""The trace benchmark: its cache is an exact LRU, its engine keeps its timetable, every request comes through."""

import math
import re
from array import array
from collections import OrderedDict
from functools import cache

import pytest
from bench.traces import page, report, rows, scenario, study
from bench.traces.cache import Cache, pooled_hit_ratio
from bench.traces.engine import LINEAR, MODELS, Engine, EngineModel, Job
from bench.traces.fleet import Fleet, replay
from bench.traces.policy import ORACLE, Policy, Routers, choices, parse, policies
from bench.traces.trace import Request, Segment, Trace, build
from hypothesis import given, settings
from hypothesis import strategies as st

BLOCK = 16

# Prompts as lists of ids that are chained: a child of node n is drawn anew or taken from those that n has.
CHAINS = st.lists(st.lists(st.integers(0, 2), min_size=0, max_size=9), min_size=1, max_size=14)


def chained(chains):
    """Ids that are equal exactly when everything up to there is."""
    known = {}
    return [
        [known.setdefault(tuple(chain[: end + 1]), 1000 + 7 * len(known)) for end in range(len(chain))]
        for chain in chains
    ]


def records(prompts, **more):
    return [
        {"timestamp": 100 * place, "input_length": BLOCK * len(ids) + 3, "output_length": 5, "hash_ids": ids, **more}
        for place, ids in enumerate(prompts)
    ]


def flat(request):
    return [block for segment in request.path for block in segment.ids]


@given(CHAINS)
def test_prompts_keep_what_they_share(chains):
    prompts = chained(chains)
    trace = build("t", BLOCK, list(rows.from_ids(records(prompts), BLOCK)))
    blocks = {}
    for ids, request in zip(prompts, trace.requests, strict=True):
        assert [blocks.setdefault(old, new) for old, new in zip(ids, flat(request), strict=True)] == flat(request)
        assert [segment.parent for segment in request.path] == [None, *request.path][: len(request.path)]
    assert len(set(blocks.values())) == len(blocks)


@given(CHAINS)
def test_segments_come_whole_and_know_whether_they_are_shared(chains):
    trace = build("t", BLOCK, list(rows.from_ids(records(chained(chains)), BLOCK)))
    users = {}
    for request in trace.requests:
        for segment in request.path:
            assert len(segment) > 0
            users.setdefault(segment, set()).add(request)
    ids = [block for segment in users for block in segment.ids]
    assert len(ids) == len(set(ids))
    assert all(segment.shared == (len(requests) > 1) for segment, requests in users.items())


def test_rows_survive_their_file(tmp_path):
    written = list(rows.from_ids(records(chained([[0, 1], [0, 1, 2], [1]]), session_id=4, turn=1, delay=1500), BLOCK))
    rows.write(tmp_path / "a.csv.gz", written)
    rows.write(tmp_path / "b.csv.gz", rows.read(tmp_path / "a.csv.gz"))
    assert rows.read(tmp_path / "a.csv.gz") == written
    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()


def test_equal_timestamps_are_spread_over_the_time_to_the_next():
    stamped = [dict(record, timestamp=stamp) for record, stamp in zip(records([[]] * 4), (0, 0, 0, 30), strict=True)]
    assert [row.at_ms for row in rows.from_ids(stamped, BLOCK)] == [0, 10, 20, 30]


def test_copies_have_their_own_blocks_but_share_what_sessions_share():
    trace = build(
        "t",
        BLOCK,
        [
            rows.Row(0, 99, 1, 0, None, -1, 5),
            rows.Row(50, 99, 1, 1, None, 2, 2),  # leaves the first session's prompt behind block 2
            rows.Row(60, 140, 1, 0, 10.0, 4, 3),
        ],
    )
    twice = trace.copies(2)
    assert len(twice) == 2 * len(trace)
    own = [set(flat(request)) for request in twice.requests if request.session == 0]
    other = [set(flat(request)) for request in twice.requests if request.session == 2]
    assert len(own) == len(other) == 2
    assert own[1] & other[1] == {0, 1, 2}
    assert [request.arrival for request in twice.requests] == sorted(request.arrival for request in twice.requests)


# --- cache -----------------------------------------------------------------------------------------------------------


class NaiveCache:
    """Single blocks: those in use are counted, the others lie in the order in which they are to be evicted."""

    def __init__(self, capacity):
        self.capacity, self.private = capacity, 0
        self.users, self.idle = {}, OrderedDict()

    def match(self, ids):
        held = [block in self.users or block in self.idle for block in ids]
        return held.index(False) if False in held else len(held)

    def admit(self, ids, private):
        if len(set(self.users) | set(ids)) + self.private + private > self.capacity:
            return None
        for block in ids:
            self.idle.pop(block, None)
            self.users[block] = self.users.get(block, 0) + 1
        self.private += private
        evicted = []
        while len(self.users) + len(self.idle) + self.private > self.capacity:
            evicted.append(self.idle.popitem(last=False)[0])
        return evicted

    def release(self, ids, private):
        self.private -= private
        for block in reversed(ids):
            self.users[block] -= 1
            if not self.users[block]:
                del self.users[block]
                self.idle[block] = None


@given(CHAINS, st.lists(st.tuples(st.integers(0, 13), st.integers(0, 3)), max_size=60), st.integers(4, 30))
def test_cache_evicts_as_a_naive_one(chains, calls, capacity):
    trace = build("t", BLOCK, list(rows.from_ids(records(chained(chains)), BLOCK)))
    real, naive, running = Cache(capacity), NaiveCache(capacity), []
    for number, private in calls:
        request = trace.requests[number % len(trace)]
        ids = flat(request)
        assert real.match(request.path) == naive.match(ids)
        evicted, expected = real.admit(request.path, private), naive.admit(ids, private)
        if evicted is None or expected is None:
            assert evicted is expected
            if running:  # the one that came first ends
                path, blocks, own = running.pop(0)
                real.release(path, own)
                naive.release(blocks, own)
            continue
        gone = [block for segment, start, end in evicted for block in segment.ids[start:end]]
        assert sorted(gone) == sorted(expected)
        running.append((request.path, ids, private))
        assert real.used == len(naive.users) + len(naive.idle) + naive.private
        assert real.pinned == len(naive.users) + naive.private


def test_pooled_cache_is_bounded_by_its_room():
    segment = Segment(None, array("I", range(10)))
    trace = Trace("t", BLOCK, tuple(Request(float(place), 165, 1, (segment,)) for place in range(4)))
    assert pooled_hit_ratio(trace, 10) == 0.75
    assert pooled_hit_ratio(trace, 9) == 0


# --- engine ----------------------------------------------------------------------------------------------------------

SLOW = EngineModel(
    prefill_rate=1000.0, least_step_s=0.01, per_decode_s=0.001, cache_tokens=100 * BLOCK, batch_tokens=100
)


def drive(model, jobs):
    """Run jobs on one engine by their arrival; what it published, in order."""
    published = []
    engine = Engine(
        model,
        BLOCK,
        lambda job, now: setattr(job, "first_token", now),
        lambda job, now: setattr(job, "end", now),
        lambda stored, removed: published.append((stored, removed)),
    )
    waiting, until = list(jobs), math.inf
    while waiting or until < math.inf:
        if waiting and waiting[0].arrival < until:
            job = waiting.pop(0)
            until = engine.submit(job, job.arrival)
        else:
            until = engine.wake(until)
    return engine, published


def request(arrival, prompt, output, path=()):
    return Request(arrival, prompt, output, path)


def test_engine_keeps_a_timetable_worked_out_by_hand():
    blocks = Segment(None, array("I", range(15)))
    jobs = [
        Job(request(0.0, 250, 5, (blocks,)), 0, 0.0),
        Job(request(0.265, 120, 1), 1, 0.265),  # comes while the first decodes: in at the end of its step
        Job(request(1.0, 250, 1, (blocks,)), 2, 1.0),  # 15 of its blocks are cached, 10 tokens are left
    ]
    engine, published = drive(SLOW, jobs)
    # Chunks of 100, 100 and 50 tokens; then a token each 0.01 + 0.001 s.
    assert jobs[0].first_token == pytest.approx(0.25)
    # The step under way ends at 0.272; the next takes 99 of the 120 tokens beside one decode, the one after that 21.
    assert jobs[1].first_token == pytest.approx(0.272 + 0.099 + 0.001 + 0.021 + 0.001)
    assert jobs[1].end == jobs[1].first_token
    # Tokens 2 and 3 at 0.261 and 0.272, 4 and 5 with the two chunks.
    assert jobs[0].end == pytest.approx(0.272 + 0.099 + 0.001 + 0.021 + 0.001)
    assert jobs[2].cached_blocks == 15
    assert jobs[2].first_token == pytest.approx(1.01)
    assert engine.prefilled == 250 + 120 + 10
    assert [sum(span.end - span.start for span in stored) for stored, _ in published] == [6, 6, 3]


def test_context_that_is_read_makes_steps_longer():
    model = EngineModel(prefill_rate=1000.0, least_step_s=0.01, per_decode_s=0, read_s=0.001, cache_tokens=8192)
    job = Job(request(0.0, 10, 4), 0, 0.0)
    drive(model, [job])
    assert job.first_token == pytest.approx(0.01)
    assert job.end == pytest.approx(0.01 + 3 * 0.01 + 0.001 * (10 + 11 + 12))


def test_prompt_that_is_cached_whole_computes_its_last_block():
    blocks = Segment(None, array("I", range(4)))
    jobs = [Job(request(at, 64, 1, (blocks,)), number, at) for number, at in enumerate((0.0, 1.0))]
    engine, published = drive(SLOW, jobs)
    assert jobs[1].cached_blocks == 3
    assert engine.prefilled == 64 + 16
    assert len(published) == 1


def test_request_waits_until_its_blocks_are_free():
    model = EngineModel(prefill_rate=1000.0, least_step_s=0.01, per_decode_s=0, cache_tokens=10 * BLOCK)
    jobs = [Job(request(0.0, 100, 20), 0, 0.0), Job(request(0.0, 100, 1), 1, 0.0)]
    engine, _ = drive(model, jobs)
    assert jobs[0].end == pytest.approx(0.1 + 19 * 0.01)
    assert jobs[1].first_token == pytest.approx(jobs[0].end + 0.1)
    assert engine.cache.pinned == 0


def test_short_prompts_pass_a_long_one_where_the_engine_lets_them():
    model = EngineModel(prefill_rate=1000.0, least_step_s=0, per_decode_s=0, batch_tokens=100, long_prompt_tokens=60)
    begun = Segment(None, array("I", range(12)))
    jobs = [
        Job(request(0.0, 200, 1, (begun,)), 0, 0.0),  # alone in the first step, which it has for itself
        Job(request(0.05, 30, 1), 1, 0.05),  # beside 60 tokens of the first
        Job(request(0.05, 195, 1, (begun,)), 2, 0.05),  # 10 tokens beside those
    ]
    engine, published = drive(model, jobs)
    assert jobs[1].first_token == pytest.approx(0.1 + 0.1)
    assert jobs[0].first_token == jobs[2].first_token == pytest.approx(0.2 + 0.040 + 0.025)
    assert engine.prefilling == []
    # The third finds what the first has computed by then, computes the rest itself, and that is told once.
    assert jobs[2].cached_blocks == 160 // BLOCK
    assert engine.prefilled == 200 + 30 + 35
    assert [sum(span.end - span.start for span in stored) for stored, _ in published] == [6, 4, 2]


def test_request_that_can_never_fit_is_an_error():
    with pytest.raises(ValueError, match="does not fit"):
        drive(SLOW, [Job(request(0.0, 5000, 1), 0, 0.0)])


# --- whole runs ------------------------------------------------------------------------------------------------------


@cache
def small(load):
    """A little of a load, on caches that are too small for it."""
    trace = scenario.LOADS[load](4.0).first(150)
    return trace, Fleet((MODELS["lin"].scaled(1, 0.45), MODELS["roof"].scaled(0.5, 0.45), LINEAR.scaled(2, 0.4)))


EVERY_POLICY = pytest.mark.parametrize("policy", policies(), ids=lambda policy: policy.name)


@EVERY_POLICY
@pytest.mark.parametrize("load", ["conversation", "agents", "bursts"])
def test_every_request_comes_through_and_nothing_is_left(policy, load):
    trace, fleet = small(load)
    run = replay(trace, fleet, policy)
    assert len(run.jobs) == len(trace)
    for job in run.jobs:
        assert 0 <= job.arrival < job.first_token <= job.end
        shortest = run.engines[job.engine].model.least_step_s * job.request.output_tokens
        assert job.end - job.arrival >= shortest * 0.999
    assert sum(engine.prefilled for engine in run.engines) == sum(
        job.request.prompt_tokens - job.cached_blocks * trace.block_size for job in run.jobs
    )
    for engine in run.engines:
        assert engine.cache.pinned == 0
        assert engine.cache.used <= engine.cache.capacity
    if isinstance(run.chooser, Routers):
        run.chooser.deliver(math.inf)
        [replica] = run.chooser.replicas
        for target, engine in zip(replica.targets, run.engines, strict=True):
            # The index, fed through the event path alone, knows what the engine holds.
            assert replica.router.index.blocks(target) == engine.cache.blocks
            assert replica.router.load(target) == (0, 0, 0)


def test_turns_wait_for_the_answer_before():
    trace, fleet = small("agents")
    run = replay(trace, fleet, policies()[0])
    last = {}
    for job in sorted(run.jobs, key=lambda job: job.arrival):
        before = last.get(job.request.session)
        if job.request.delay is not None and before is not None:
            assert job.arrival == pytest.approx(before.end + job.request.delay)
        last[job.request.session] = job
    assert any(job.request.delay is not None for job in run.jobs)


def test_equal_seeds_make_equal_runs_and_others_do_not():
    trace, fleet = small("conversation")
    random = Policy("random", {"mode": "random"})
    first, again, other = (replay(trace, fleet, random, seed) for seed in (1, 1, 2))
    assert [job.end for job in first.jobs] == [job.end for job in again.jobs]
    assert [job.engine for job in first.jobs] != [job.engine for job in other.jobs]


def test_replicas_share_the_requests_and_see_all_events():
    trace, fleet = small("conversation")
    run = replay(trace, Fleet(fleet.models, replicas=3), policies()[0])
    run.chooser.deliver(math.inf)
    assert len(run.chooser.replicas) == 3
    for replica in run.chooser.replicas:
        assert [replica.router.index.blocks(target) for target in replica.targets] == [
            engine.cache.blocks for engine in run.engines
        ]


def test_a_good_policy_is_better_than_turns_and_near_the_oracle():
    trace = scenario.Scenario("agents", 4, requests=600).trace()
    fleet = scenario.Scenario("agents", 4).fleet()
    turns, best, default = (
        report.figures(replay(trace, fleet, policy))
        for policy in (Policy("turns", {"mode": "round-robin"}), ORACLE, policies()[0])
    )
    assert default["ttft_mean"] < 0.7 * turns["ttft_mean"]
    assert default["ttft_mean"] < 1.3 * best["ttft_mean"]
    assert default["hit"] > turns["hit"] + 0.1


def test_all_that_the_configuration_offers_is_compared():
    names = {policy.name for policy in policies()}
    assert names >= {*choices("cost"), *choices("mode")} - {"kv", "direct"} | {"oracle"}
    assert len(names) == len(policies())
    for each in study.STUDIES.values():
        assert set(each.policies) <= names | {"least-loaded"}  # a mode that may not be there yet
        assert len({case.name for case in each.scenarios}) == len(each.scenarios)


def test_policies_can_be_named_with_settings():
    assert parse("default,new_work_weight=4").settings["new_work_weight"] == "4"
    assert parse("oracle") == ORACLE
    for wrong in ("magic", "default,magic=4", "oracle,seed=1"):
        with pytest.raises(ValueError, match="no such"):
            parse(wrong)


@settings(max_examples=20)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_quantile_is_the_least_value_that_covers_the_share(values, share):
    ordered = sorted(values)
    found = report.quantile(ordered, share)
    assert sum(value <= found for value in ordered) >= share * len(ordered) - 1e-9
    assert sum(value < found for value in ordered) < share * len(ordered)


def test_tables_of_the_page_are_known_and_made_from_figures():
    named = re.findall(r"<!-- figures: ([\w-]+) -->", page.PAGE.read_text())
    assert named
    assert set(named) <= set(page.TABLES)
    values = {"traces.conversation-L-n8.default.ttft_mean": 0.5, "traces.conversation-L-n8.oracle.ttft_mean": 0.4}
    made = page.filled("a <!-- figures: main-ttft_mean --> old <!-- end --> b", values)
    assert made.startswith("a <!-- figures: main-ttft_mean -->\n\n|  | conversation |\n")
    assert "| default | **0.5** |" in made
    assert "| oracle | 0.4 |" in made  # nobody can be it, so it does not win
    assert made.endswith("<!-- end --> b")
    assert page.filled(made, values) == made
    with pytest.raises(KeyError):
        page.filled("<!-- figures: magic --><!-- end -->", values)


def test_relative_figures_are_geometric_means_of_what_was_measured_everywhere():
    cases = [case.name for case in study.STUDIES["main"].scenarios]
    values = {f"traces.{case}.dynamo.ttft_mean": 2.0 for case in cases}
    values |= {f"traces.{case}.default.ttft_mean": (0.5, 2.0)[place % 2] for place, case in enumerate(cases)}
    values |= {f"traces.{cases[0]}.lmetric.ttft_mean": 1.0}  # in one case of several
    rows = page.TABLES["relative"](values)
    assert [row[:2] for row in rows] == [["", "mean TTFT"], ["default", "0.50"], ["dynamo", "1.00"]]


def test_figures_of_real_engines_name_the_best_of_each():
    measures = dict.fromkeys(page.FLEET, 1.0)
    values = {f"fleet.all.default.{name}": value for name, value in measures.items()}
    values |= {f"fleet.all.round-robin.{name}": 0.5 for name in measures}
    head, ours, theirs = page.TABLES["fleet"](values)
    assert ours[head.index("cached")] == "**100%**"
    assert theirs[head.index("mean TTFT")] == "**0.5**"
    assert page.TABLES["fleet"]({}) == [head]
