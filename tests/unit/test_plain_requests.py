"""A plain request is answered without protobuf; the long way, through messages, must say the same."""

import random
from array import array
from contextvars import copy_context
from types import SimpleNamespace
from typing import Any, get_args

from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvrouter_grpc._gen import router_pb2
from kvrouter_grpc.config import RouterConfig, ServerConfig
from kvrouter_grpc.core import best_worker_head, best_worker_reply, delimited
from kvrouter_grpc.errors import RouterError
from kvrouter_grpc.routing.loads import TargetLoad
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.server.reply import write_best_worker
from kvrouter_grpc.server.router_service import RouterService
from kvrouter_grpc.types import (
    Decision,
    Overlap,
    Prompt,
    RoutingRequest,
    StreamState,
    Target,
    Tier,
    WorkerFacts,
    WorkerSpec,
    WorkerState,
)
from reference.kv_encode import encode_batch
from reference.kv_events import BlocksStored

BLOCK = 16
ENDPOINTS = ("a.b.one", "a.b.two")
MODELS = ("base", "adapter", "other")
CHOICES = {name: get_args(RouterConfig.model_fields[name].annotation) for name in ("mode", "cost")}
UNKNOWN_FIELD = b"\xa0\x06\x01"  # number 100: means nothing, but makes a request one that is not plain

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
BLOCKS = st.integers(0, 2**20)


@given(
    st.builds(Target, U64, U32),
    st.text(max_size=40),
    st.text(max_size=40),
    st.builds(Overlap, BLOCKS, BLOCKS, BLOCKS, BLOCKS),
    st.builds(TargetLoad, U32, U64, U64),
    st.tuples(U32, U32, U32),
    st.tuples(st.floats(allow_nan=False), st.floats(0, 1)),
)
@example(Target(0, 0), "", "", Overlap(), TargetLoad(), (0, 0, 0), (-0.0, 0.0))
@example(
    Target(2**64 - 1, 2**32 - 1),
    "é" * 200,
    "u" * 70_000,
    Overlap(*[2**30 - 1] * 4),
    TargetLoad(2**32 - 1, 2**64 - 1, 2**64 - 1),
    (2**32 - 1,) * 3,
    (1e300, 1.0),
)
def test_a_reply_is_the_message_that_protobuf_would_write(target, name, url, overlap, load, sizes, measures):
    cached, prompt_tokens, block_size = sizes
    cost, freshness = measures
    choice: Any = SimpleNamespace(tiers=tuple(overlap), cached_tokens=cached, cost=cost, freshness=freshness)
    written = best_worker_reply(best_worker_head(*target, name, url), choice, load, prompt_tokens, block_size)
    message = router_pb2.BestWorkerIdResponse()
    expected = cached if block_size else 0
    decision = Decision(target, name, url, overlap, block_size, prompt_tokens, 0, expected, cost, freshness)
    write_best_worker(message, decision, load)
    assert router_pb2.BestWorkerIdResponse.FromString(written) == message
    assert written == message.SerializeToString()


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_fields_in_a_row_are_a_repeated_field(contents):
    status = b"".join(delimited(3, delimited(2, content)) for content in contents)
    parsed = router_pb2.Status.FromString(status)
    assert [detail.value for detail in parsed.details] == contents


class Fleet:
    """Two endpoints with workers in every state, the same for every fleet of a seed."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        config = RouterConfig(
            seed=rng.getrandbits(60),
            block_size=rng.choice((BLOCK, BLOCK, None)),
            mode=rng.choice(CHOICES["mode"]),
            cost=rng.choice(CHOICES["cost"]),
            temperature=rng.choice((0.0, 0.0, 1.5)),
            track_active_blocks=rng.random() < 0.7,
        )
        self.now = 0.0
        self.prompts = [array("I", rng.choices(range(1000), k=rng.choice((5, 64, 200)))) for _ in range(4)]
        self.routers = {name: Router(name, config, clock=lambda: self.now) for name in ENDPOINTS}
        self.service = RouterService(
            ServerConfig(max_prompt_tokens=190, vocab_size=2000),
            self.routers if rng.random() < 0.5 else dict([next(iter(self.routers.items()))]),
            None,  # type: ignore[arg-type]
        )
        for name, router in self.routers.items():
            for number in range(rng.randrange(5)):
                self.add(
                    rng, router, WorkerSpec(f"{name}{number}", f"http://w{number}", name, dp_size=rng.choice((1, 2)))
                )

    def add(self, rng: random.Random, router: Router, spec: WorkerSpec) -> None:
        worker = router.workers.add(spec)
        models = rng.choice(((), ("base",), ("base",), ("other",)))
        router.workers.introduced(worker, spec, WorkerFacts(models, rng.choice(((), ("adapter",)))))
        router.workers.set_health(worker, rng.choice((WorkerState.READY, WorkerState.READY, WorkerState.UNHEALTHY)))
        router.add_targets(worker.targets)
        for target in worker.targets:
            stream = router.index.stream(target)
            stream.state, stream.batches = rng.choice((StreamState.LIVE, StreamState.STALE)), 1
            router.index.refresh(target)
            held = rng.choice(self.prompts)
            names = array("Q", range(1, len(held) // BLOCK + 1))
            for tier in (Tier.DEVICE, Tier.HOST)[: rng.randrange(3)]:
                stored = BlocksStored(names, None, held[: len(names) * BLOCK], BLOCK, tier=tier)
                router.index.apply_payload(target, encode_batch([stored]))

    def change(self, rng: random.Random) -> None:
        """What may happen between two requests."""
        self.now += rng.choice((0.0, 1.0, 200.0))
        router = rng.choice(list(self.routers.values()))
        workers = router.workers.workers()
        kind = rng.randrange(6)
        if kind == 0 and workers:
            router.workers.set_draining(rng.choice(workers), rng.random() < 0.5)
        elif kind == 1 and workers:
            worker = router.workers.remove(rng.choice(workers).spec.name)
            assert worker is not None
            router.remove_targets(worker.targets)
        elif kind == 2:
            name = f"new{rng.getrandbits(30)}"
            self.add(rng, router, WorkerSpec(name, f"http://{name}", router.endpoint))
        elif kind < 5:
            try:
                name = str(rng.getrandbits(40))
                router.lease(RoutingRequest(Prompt(rng.choice(self.prompts)), request_id=name))
            except RouterError:
                return

    def request(self, rng: random.Random) -> router_pb2.BestWorkerIdRequest:
        return router_pb2.BestWorkerIdRequest(
            token_ids=rng.choice((*self.prompts, self.prompts[0] + self.prompts[1], [], [2**31 - 1], [2000])),
            endpoint=rng.choice(("", "", *ENDPOINTS, "no.such.one", "?")),
            model=rng.choice(("", "", *MODELS, "unknown", "m" * 300)),
            request_id=rng.choice(("", "mine", "two words", "x" * 257, "é")),
        )

    async def answer(self, data: bytes) -> Any:
        try:
            reply = await self.service.best_worker_id(data, None)
        except RouterError as error:
            return type(error), str(error), error.metadata
        return router_pb2.BestWorkerIdResponse.FromString(reply)


def outcome(coroutine: Any) -> Any:
    """The result of a coroutine that does not wait, in a context of its own as every call has."""
    try:
        copy_context().run(coroutine.send, None)
    except StopIteration as done:
        return done.value
    raise AssertionError("a decision does not wait")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_the_short_way_decides_and_says_what_the_long_one_does(seed):
    short, long = Fleet(seed), Fleet(seed)
    taken = list[bytes | None]()
    plain = short.service._decide_plain
    short.service._decide_plain = lambda *args: taken.append(plain(*args)) or taken[-1]  # type: ignore[method-assign]
    rngs = random.Random(seed), random.Random(seed)
    for _ in range(8):
        short.change(rngs[0])
        long.change(rngs[1])
        data = short.request(rngs[0]).SerializeToString()
        assert long.request(rngs[1]).SerializeToString() == data
        said = outcome(short.answer(data))
        assert said == outcome(long.answer(data + UNKNOWN_FIELD))
        # Only what is refused, and what the call's metadata might say more about, may need both ways.
        decided = isinstance(said, router_pb2.BestWorkerIdResponse)
        assert (taken[-1] is not None) == (decided and not any(r.asks_for_session for r in short.routers.values()))


def test_a_router_that_shuts_down_takes_no_plain_request_either():
    fleet = Fleet(1)
    fleet.service.drain()
    kind, *_ = outcome(fleet.answer(router_pb2.BestWorkerIdRequest(token_ids=[1]).SerializeToString()))
    assert kind.__name__ == "DrainingError"
