"""The router of one endpoint: who is eligible, who wins, what is booked, what is said."""

from array import array
from collections import Counter

import pytest

from kvrouter_grpc.config import RouterConfig
from kvrouter_grpc.errors import (
    DuplicateRequestError,
    InvalidRequestError,
    NotReadyError,
    NoWorkersError,
    PinnedWorkerNotAllowedError,
    PinnedWorkerUnavailableError,
    UnknownModelError,
    UnknownReservationError,
    UnknownWorkerError,
)
from kvrouter_grpc.routing.loads import TargetLoad
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.routing.workers import worker_id_of
from kvrouter_grpc.types import (
    Prompt,
    RouterOverride,
    RoutingHints,
    RoutingRequest,
    StreamState,
    Target,
    WorkerFacts,
    WorkerSpec,
    WorkerState,
)
from reference.kv_encode import encode_batch
from reference.kv_events import BlocksStored

ENDPOINT = "ns.backend.generate"
FREE = RoutingHints()
WORDS = list(range(100, 164))  # four blocks of 16
PROMPT = Prompt(array("I", WORDS))


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def make(clock=None, **config):
    config = {"block_size": 16, "seed": 1} | config
    return Router(ENDPOINT, RouterConfig(**config), clock=clock or Clock())


def add(router, name, *, dp=1, models=("base",), loras=(), ready=True, live=True, **spec):
    worker = router.workers.add(WorkerSpec(name, f"http://{name}", ENDPOINT, dp_size=dp, **spec))
    router.workers.introduced(worker, worker.spec, WorkerFacts(models, loras))
    router.add_targets(worker.targets)
    for target in worker.targets:
        follow(router, target, StreamState.LIVE if live else StreamState.COLD)
    if ready:
        router.workers.set_health(worker, WorkerState.READY)
    return worker


def follow(router, target, state, known=0, lost=0):
    stream = router.index.stream(target)
    stream.state, stream.known, stream.lost = state, known, lost
    router.index.refresh(target)


def hold(router, worker, words, rank=0):
    size = router.index.block_size
    event = BlocksStored(array("Q", range(1, len(words) // size + 1)), None, array("I", words), size)
    router.index.apply_payload(Target(worker.worker_id, rank), encode_batch([event]))


def ask(hints=FREE, *, words=WORDS, **more):
    return RoutingRequest(Prompt(array("I", words)), hints, **more)


def test_the_longest_prefix_wins_and_the_reply_says_what_it_is():
    router = make()
    add(router, "a")
    b = add(router, "b")
    hold(router, b, WORDS[:48])
    decision = router.best_worker(ask(explain=True))
    assert (decision.worker_name, decision.url, decision.target) == ("b", "http://b", Target(worker_id_of("b"), 0))
    assert (decision.overlap.device, decision.prompt_blocks, decision.expected_cached_tokens) == (3, 4, 48)
    assert [candidate.worker_name for candidate in decision.candidates] == ["b", "a"]
    best = decision.candidates[0]
    assert best.terms == {
        "queued_prefill": 0,
        "new_prefill": 16,
        "replication": 0,
        "active_requests": 0,
        "memory_shortage": 0,
    }
    assert best.cost == decision.cost == 16


def test_deciding_changes_nothing_and_leasing_books():
    router = make()
    worker = add(router, "a")
    target = worker.targets[0]
    router.best_worker(ask())
    assert router.load(target).active_requests == 0
    lease = router.lease(ask(request_id="r1"))
    assert router.load(target) == TargetLoad(active_requests=1, queued_prefill_tokens=64, active_blocks=4)
    router.mark_prefill_complete("r1")
    assert router.load(target) == TargetLoad(active_requests=1, queued_prefill_tokens=0, active_blocks=4)
    router.free("r1")
    assert router.load(target) == TargetLoad()
    assert lease.released
    for call in (router.free, router.mark_prefill_complete):
        with pytest.raises(UnknownReservationError, match="r1"):
            call("r1")


def test_a_burst_does_not_herd_and_a_shared_prefix_stays_together():
    router = make()
    for name in "abcd":
        add(router, name)
    burst = Counter(
        router.lease(ask(words=range(number * 1000, number * 1000 + 640), request_id=f"r{number}")).decision.worker_name
        for number in range(8)
    )
    assert set(burst.values()) == {2}
    shared = range(9000, 9640)
    first = router.lease(ask(words=shared, request_id="s1")).decision
    second = router.best_worker(ask(words=[*shared, *range(200, 216)]))
    assert second.worker_name == first.worker_name
    assert second.overlap.total == 0  # no event yet:
    assert second.expected_cached_tokens == 640  # what is in flight will be there


def test_forgotten_reservations_expire(clock):
    router = make(clock, request_expiry_s=10)
    target = add(router, "a").targets[0]
    router.lease(ask(request_id="default"))
    router.lease(ask(request_id="own"), ttl_s=60)
    clock.now = 11
    router.best_worker(ask())
    assert router.load(target).active_requests == 1
    with pytest.raises(UnknownReservationError):
        router.free("default")
    clock.now = 61
    with pytest.raises(UnknownReservationError):
        router.free("own")


def test_a_request_id_is_unique_in_flight():
    router = make()
    add(router, "a")
    router.lease(ask(request_id="r"))
    with pytest.raises(DuplicateRequestError, match="'r' is in flight"):
        router.lease(ask(request_id="r"))
    router.free("r")
    router.lease(ask(request_id="r")).release()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r, w: r.workers.set_health(w, WorkerState.UNHEALTHY, "refused"), "unhealthy: refused"),
        (lambda r, w: r.workers.set_draining(w, draining=True), "draining"),
        (lambda r, w: r.check_block_size(w, 32, "as it reports"), "--router-block-size 32"),
        (lambda r, w: r.workers.set_health(w, WorkerState.STARTING, "not reached yet"), "not reached yet"),
    ],
)
def test_who_cannot_serve_is_left_out_with_the_reason(change, said):
    router = make()
    worker = add(router, "a")
    hold(router, worker, WORDS)
    change(router, worker)
    with pytest.raises(NoWorkersError, match=said):
        router.best_worker(ask())
    with pytest.raises(PinnedWorkerUnavailableError, match=said):
        router.best_worker(ask(RoutingHints(worker_id=worker.worker_id)))
    add(router, "b")
    decision = router.best_worker(ask(explain=True))
    assert decision.worker_name == "b"
    assert said in decision.candidates[-1].dropped


def test_no_workers_says_how_to_add_one():
    with pytest.raises(NoWorkersError, match="--worker"):
        make().best_worker(ask())


def test_pins():
    router = make()
    one, two = add(router, "one"), add(router, "two", dp=2)
    hold(router, one, WORDS)
    pin = RoutingHints(worker_id=two.worker_id, dp_rank=1)
    assert router.best_worker(ask(pin)).target == Target(two.worker_id, 1)
    assert router.best_worker(ask(RoutingHints(worker_id=one.worker_id))).target == Target(one.worker_id, 0)
    with pytest.raises(UnknownWorkerError):
        router.best_worker(ask(RoutingHints(worker_id=12345)))
    with pytest.raises(InvalidRequestError, match="2 ranks"):
        router.best_worker(ask(RoutingHints(worker_id=two.worker_id)))
    with pytest.raises(InvalidRequestError, match="ranks 0 to 1"):
        router.best_worker(ask(RoutingHints(worker_id=two.worker_id, dp_rank=2)))
    allowed = frozenset({one.worker_id})
    with pytest.raises(PinnedWorkerNotAllowedError):
        router.best_worker(ask(RoutingHints(worker_id=two.worker_id, dp_rank=0, allowed_worker_ids=allowed)))


def test_allowed_workers_taints_and_tried_targets():
    router = make()
    a, b = add(router, "a", taints=frozenset({"gpu", "big"})), add(router, "b", taints=frozenset({"gpu"}))
    hold(router, a, WORDS)
    assert router.best_worker(ask(RoutingHints(allowed_worker_ids=frozenset({b.worker_id})))).worker_name == "b"
    assert router.best_worker(ask(RoutingHints(required_taints=frozenset({"big"})))).worker_name == "a"
    with pytest.raises(NoWorkersError, match="lacks required taint cpu"):
        router.best_worker(ask(RoutingHints(required_taints=frozenset({"gpu", "cpu"}))))
    assert router.best_worker(ask(exclude=frozenset(a.targets[:1]))).worker_name == "b"
    with pytest.raises(NoWorkersError, match="allowed_worker_ids"):
        router.best_worker(ask(RoutingHints(allowed_worker_ids=frozenset({1}))))


def test_models_and_adapters():
    router = make()
    add(router, "a", models=("base",), loras=("adapter",))
    add(router, "b", models=("other",))
    assert router.best_worker(ask(model="adapter")).worker_name == "a"
    assert router.best_worker(ask(model="other")).worker_name == "b"
    with pytest.raises(UnknownModelError, match="'nope'"):
        router.best_worker(ask(model="nope"))
    assert router.model_for("other", "") == "other"
    assert router.model_for("base", "adapter") == "adapter"
    with pytest.raises(UnknownModelError, match="base, other"):
        router.model_for("", "")
    with pytest.raises(UnknownModelError, match="nope"):
        router.model_for("", "nope")
    assert (router.lora_of("adapter"), router.lora_of("base")) == ("adapter", "")


def test_round_robin_takes_turns_and_random_spreads():
    router = make(mode="round-robin")
    for name in "abc":
        add(router, name)
    taken = [router.lease(ask(request_id=f"r{number}")).decision.worker_name for number in range(5)]
    assert taken == list("abcab")
    assert {router.best_worker(ask()).worker_name for _ in range(3)} == {"c"}  # asking takes no turn
    router = make(mode="random")
    for name in "abc":
        add(router, name)
    drawn = Counter(router.best_worker(ask()).worker_name for _ in range(900))
    assert min(drawn.values()) > 200
    assert len(drawn) == 3


def test_override_temperature_and_cost():
    router = make()
    a, _ = add(router, "a"), add(router, "b")
    hold(router, a, WORDS)
    hot = RoutingHints(override=RouterOverride(temperature=100.0))
    drawn = Counter(router.best_worker(ask(hot)).worker_name for _ in range(400))
    assert min(drawn["a"], drawn["b"]) > 100
    assert {router.best_worker(ask()).worker_name for _ in range(20)} == {"a"}
    other = RoutingHints(override=RouterOverride(cost="dynamo"))
    decision = router.best_worker(ask(other, explain=True))
    assert decision.candidates[0].terms == {"prefill": 0, "decode": 4, "active_requests": 0}
    blind = RoutingHints(override=RouterOverride(cost="dynamo", overlap_score_credit=0.0))
    assert {router.best_worker(ask(blind)).worker_name for _ in range(60)} == {"a", "b"}


def test_a_picture_counts_as_far_as_it_is_to_be_trusted_and_a_cold_one_not_at_all():
    router = make()
    a = add(router, "a")
    hold(router, a, WORDS)
    follow(router, a.targets[0], StreamState.STALE, known=32, lost=2)
    decision = router.best_worker(ask(explain=True))
    assert decision.freshness == 0.5
    assert decision.candidates[0].terms["new_prefill"] == 64 - 16 * 2
    follow(router, a.targets[0], StreamState.COLD)
    assert router.best_worker(ask()).cost == 64


def test_untracked_load_is_not_booked():
    router = make(track_active_blocks=False, track_prefill_tokens=False)
    target = add(router, "a").targets[0]
    router.lease(ask(request_id="r"))
    load = router.load(target)
    assert (load.active_requests, load.active_blocks, load.queued_prefill_tokens) == (1, 0, 0)


def test_overlap_scores_are_sorted_and_weighted():
    router = make()
    a, b = add(router, "a", dp=2), add(router, "b", ready=False)
    hold(router, a, WORDS[:32], rank=1)
    hold(router, b, WORDS)
    scores = router.overlap_scores(PROMPT)
    assert (scores.block_size, scores.num_blocks) == (16, 4)
    assert [entry.target for entry in scores.targets] == sorted([*a.targets, *b.targets])
    held = {entry.target: entry.overlap.device for entry in scores.targets}
    assert (held[a.targets[0]], held[a.targets[1]], held[b.targets[0]]) == (0, 2, 4)
    halved = router.overlap_scores(PROMPT, RouterOverride(overlap_score_credit=0.5))
    assert {entry.target: entry.credit_blocks for entry in halved.targets}[b.targets[0]] == 2


def test_overlap_scores_need_a_block_size():
    with pytest.raises(NotReadyError, match="--router-block-size"):
        make(block_size=None).overlap_scores(PROMPT)


def test_a_worker_that_fits_again_is_taken_back():
    router = make()
    worker = add(router, "a")
    router.check_block_size(worker, 32, "its KV events")
    assert worker.state is WorkerState.MISCONFIGURED
    assert "16" in worker.reason
    assert "32" in worker.reason
    router.check_block_size(worker, 16, "as it reports")
    assert router.best_worker(ask()).worker_name == "a"


def test_ids_are_stable_across_routers():
    assert worker_id_of("vllm-0") == worker_id_of("vllm-0") != worker_id_of("vllm-1")
    assert 0 <= worker_id_of("vllm-0") < 2**64
