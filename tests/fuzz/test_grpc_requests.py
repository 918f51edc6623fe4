"""Requests of any content and bytes of any kind: an answer or a clear refusal, never a defect, never a leak."""

import json
import random
from contextlib import suppress

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError

from integration.server_rig import FAST, Worker, collect, serving, taken_apart, until
from kvrouter_grpc._gen import admin_pb2, router_pb2
from kvrouter_grpc.config import ServerConfig
from kvrouter_grpc.errors import InvalidRequestError
from kvrouter_grpc.server import duration
from kvrouter_grpc.server.hints import read_hints, read_override
from kvrouter_grpc.server.incoming import AskedReader
from kvrouter_grpc.server.opaque_json import read_object
from kvrouter_grpc.server.params import read_params
from kvrouter_grpc.server.prompt import read_prompt
from kvrouter_grpc.server.status import status_of
from kvrouter_grpc.server.violations import Violations
from kvrouter_grpc.server.worker_messages import read_spec
from kvrouter_grpc.types import Role

KINDS = (
    router_pb2.GenerateRequest,
    router_pb2.BestWorkerIdRequest,
    router_pb2.GetOverlapScoresRequest,
    admin_pb2.RegisterWorkerRequest,
)
CONFIG = ServerConfig(max_prompt_tokens=50, vocab_size=70_000)

FLOATS = (0.0, -0.0, 1.0, 0.5, -1.0, 2.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"))
TEXTS = ("", "a", "default", "dynamo", "mock", "dynamo.backend.generate", "a.b", "a\nb", "\x00", "ä€😀", "x" * 300)
JSONS = (
    "",
    "{}",
    "{",
    "[]",
    "null",
    '{"a": [1, {"b": null}]}',
    '{"n": 1}',
    '{"a": 1e400}',
    '{"vllm_xargs": 3}',
    "\u2028",
)


def integer(rng, bits, *, signed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return min(high, max(low, rng.choice((0, 1, 2, 5, 99, low, high, high // 2, rng.randint(low, high)))))


def value(rng, field, depth):
    kind = FieldDescriptor
    if field.type == kind.TYPE_MESSAGE:
        return message(rng, field.message_type, depth + 1)
    if field.type == kind.TYPE_ENUM:
        return rng.choice((0, 1, 2, 3, 77))
    if field.type == kind.TYPE_BOOL:
        return rng.random() < 0.5
    if field.type == kind.TYPE_STRING:
        return rng.choice(JSONS if "json" in field.name else TEXTS)
    if field.type == kind.TYPE_DOUBLE:
        return rng.choice(FLOATS)
    bits = 64 if field.cpp_type in (kind.CPPTYPE_INT64, kind.CPPTYPE_UINT64) else 32
    return integer(rng, bits, signed=field.cpp_type in (kind.CPPTYPE_INT32, kind.CPPTYPE_INT64))


def message(rng, descriptor, depth=0):
    """A random message, as a dict that its class takes."""
    found = {}
    for field in descriptor.fields:
        if rng.random() < (0.5 if depth else 0.3):
            continue
        entry = field.message_type is not None and field.message_type.GetOptions().map_entry
        if entry:
            key, item = field.message_type.fields
            found[field.name] = {value(rng, key, depth): value(rng, item, depth) for _ in range(rng.randrange(4))}
        elif field.is_repeated:
            found[field.name] = [value(rng, field, depth) for _ in range(rng.choice((0, 1, 2, 8, 70)))]
        else:
            found[field.name] = value(rng, field, depth)
    for oneof in descriptor.oneofs:
        given = [field.name for field in oneof.fields if field.name in found]
        for name in given[1:]:
            del found[name]
    return found


def tame(rng, request):
    """Make it likely that the request gets past its prompt, so that more of it is read."""
    if hasattr(request, "token_ids") and rng.random() < 0.7:
        request.text = ""
        request.token_ids[:] = [rng.randrange(70_000) for _ in range(rng.randrange(1, 50))]
    return request


def read(request):
    """What the services do with a request before they decide."""
    violations = Violations()
    if isinstance(request, admin_pb2.RegisterWorkerRequest):
        read_spec(request.spec, "a.b.c", violations)
        duration.read("ttl", request.ttl, violations)
        violations.raise_if_any()
        return
    if isinstance(request, router_pb2.GetOverlapScoresRequest):
        read_override(request, violations)
    else:
        read_hints(request, lambda: Role.PREFILL, violations)
    params = {}
    if isinstance(request, router_pb2.GenerateRequest):
        params = read_params(request, violations)
        read_object("kv_transfer_params_json", request.kv_transfer_params_json, violations)
    asked = AskedReader(type(request))(request.SerializeToString())
    read_prompt(asked, "", 16, CONFIG, violations, tokenizer=False)
    violations.raise_if_any()
    json.dumps(params, allow_nan=False)  # what is let through, an engine can be given


def test_any_content_is_read_or_refused():
    rng = random.Random(11)
    refused = passed = 0
    for _ in range(6000):
        kind = rng.choice(KINDS)
        request = tame(rng, kind(**message(rng, kind.DESCRIPTOR)))
        try:
            read(request)
            passed += 1
        except InvalidRequestError as error:
            refused += 1
            status = status_of(error, "r")
            assert 3 * len(status.message.encode()) + 4 * len(status.details) // 3 < 8192
    assert refused > 1000
    assert passed > 10


def test_any_bytes_are_read_or_refused():
    rng = random.Random(12)
    seeds = [kind(**message(rng, kind.DESCRIPTOR)).SerializeToString() for kind in KINDS for _ in range(25)]
    decoded = 0
    for _ in range(20_000):
        request = rng.choice(KINDS)()
        with suppress(DecodeError):
            request.ParseFromString(mutated(rng, rng.choice(seeds), rng.choice(seeds)))
            decoded += 1
            with suppress(InvalidRequestError):
                read(request)
    assert decoded > 1000


def mutated(rng, data, other):
    data = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        where = rng.randrange(len(data) + 1)
        move = rng.randrange(4)
        if move == 0 and where < len(data):
            data[where] = rng.randrange(256)
        elif move == 1:
            del data[where : where + rng.randrange(1, 8)]
        elif move == 2:
            data[where:where] = rng.randbytes(rng.randrange(1, 8))
        else:
            start = rng.randrange(len(other) + 1)
            data[where:where] = other[start : start + rng.randrange(1, 40)]
    return bytes(data)


async def test_the_server_survives_them_all():
    rng = random.Random(13)
    codes = set()
    async with serving(Worker(FAST), max_prompt_tokens=50) as rig:
        services = {
            "/kvrouter.v1.KvRouter/Generate": router_pb2.GenerateRequest,
            "/kvrouter.v1.KvRouter/BestWorkerId": router_pb2.BestWorkerIdRequest,
            "/kvrouter.v1.KvRouter/GetOverlapScores": router_pb2.GetOverlapScoresRequest,
            "/kvrouter.v1.KvRouter/MarkPrefillComplete": router_pb2.MarkPrefillCompleteRequest,
            "/kvrouter.v1.KvRouter/ReportOutput": router_pb2.ReportOutputRequest,
            "/kvrouter.v1.KvRouter/Free": router_pb2.FreeRequest,
            "/kvrouter.v1.KvRouterAdmin/ListWorkers": admin_pb2.ListWorkersRequest,
            "/kvrouter.v1.KvRouterAdmin/GetLoads": admin_pb2.GetLoadsRequest,
            "/kvrouter.v1.KvRouterAdmin/RenewWorker": admin_pb2.RenewWorkerRequest,
        }
        for _ in range(1500):
            path, kind = rng.choice(list(services.items()))
            request = tame(rng, kind(**message(rng, kind.DESCRIPTOR)))
            if hasattr(request, "routing") and rng.random() < 0.8:
                request.ClearField("routing")
            if hasattr(request, "stop_conditions"):
                request.stop_conditions.max_tokens = rng.randrange(5)
            data = request.SerializeToString()
            if rng.random() < 0.3:
                data = mutated(rng, data, data)
            try:
                if path.endswith("Generate"):
                    await collect(rig.channel.unary_stream(path)(data, timeout=20))
                else:
                    await rig.channel.unary_unary(path)(data, timeout=20)
                codes.add(grpc.StatusCode.OK)
            except grpc.aio.AioRpcError as error:
                codes.add(error.code())
                said = taken_apart(error)
                assert said.reason not in {"", "INTERNAL", "ROUTER_ERROR"}, (said, request)
        assert {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND} <= codes
        assert not codes & {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED}
        await until(lambda: rig.running() == 0)
