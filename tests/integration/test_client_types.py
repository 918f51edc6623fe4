"""The client's types and the contract: no field and no enum value of the messages is forgotten."""

import dataclasses
import inspect
import re
from enum import StrEnum
from typing import Any

import pytest
from google.protobuf.message import Message

import kvrouter_client as client
from kvrouter_client import fleet, loads, replies
from kvrouter_client._gen import admin_pb2, common_pb2, router_pb2

# Field of a message to the attribute that carries it, where the two differ.
RENAMED = {
    "reservation_ttl": "reservation_ttl_s",
    "registration_ttl": "registration_ttl_s",
    "last_event_age": "last_event_age_s",
    "longest_wait": "longest_wait_s",
    "estimated_wait": "estimated_wait_s",
    "queued": "queued_s",
    "kv_transfer_params_json": "kv_transfer_params",
    "extra_args_json": "extra_args",
    "stop_string": "stop_reason",
    "stop_token_id": "stop_reason",
}
NESTED_LOAD = {"active_requests": "load", "queued_prefill_tokens": "load", "active_blocks": "load"}

PAIRS: list[tuple[type[Any], type[Message], dict[str, str]]] = [
    (replies.WorkerChoice, router_pb2.BestWorkerIdResponse, RENAMED),
    (replies.GenerateChunk, router_pb2.GenerateResponse, RENAMED),
    (replies.RoutingData, router_pb2.RoutingData, RENAMED),
    (replies.PrefillData, router_pb2.PrefillData, {}),
    (replies.Usage, router_pb2.Usage, {}),
    (replies.TokenLogprob, router_pb2.TokenLogprob, {}),
    (replies.TargetLoad, router_pb2.TargetLoad, {}),
    (replies.OverlapScores, router_pb2.GetOverlapScoresResponse, {}),
    (replies.OverlapScore, router_pb2.OverlapScore, {}),
    (replies.Overlap, common_pb2.Overlap, {}),
    (replies.Candidate, common_pb2.Candidate, {}),
    (fleet.Fleet, admin_pb2.ListWorkersResponse, {}),
    (fleet.WorkerStatus, admin_pb2.WorkerStatus, RENAMED),
    (fleet.WorkerSpec, admin_pb2.WorkerSpec, {}),
    (fleet.StreamStatus, admin_pb2.StreamStatus, RENAMED),
    (loads.Loads, admin_pb2.GetLoadsResponse, {}),
    (loads.WorkerLoad, admin_pb2.WorkerLoad, NESTED_LOAD),
    (fleet.FreshnessParts, admin_pb2.FreshnessParts, {}),
    (fleet.HitPrediction, admin_pb2.HitPrediction, {}),
    (loads.EngineReport, admin_pb2.EngineReport, {}),
    (loads.PrefillCount, admin_pb2.PrefillCount, {}),
    (loads.QueueStatus, admin_pb2.QueueStatus, RENAMED),
    (loads.QueueClass, admin_pb2.QueueClass, RENAMED),
    (loads.Thresholds, admin_pb2.Thresholds, {}),
    (loads.ForeignLoad, admin_pb2.ForeignLoad, {}),
    (loads.IndexStats, admin_pb2.IndexStats, {}),
    (client.Explanation, admin_pb2.Explanation, {}),
]


@pytest.mark.parametrize(("kind", "message", "renamed"), PAIRS, ids=lambda value: getattr(value, "__name__", ""))
def test_type_carries_every_field_of_its_message(
    kind: type[Any], message: type[Message], renamed: dict[str, str]
) -> None:
    told = {renamed.get(field.name, field.name) for field in message.DESCRIPTOR.fields}
    assert {field.name for field in dataclasses.fields(kind)} == told


@pytest.mark.parametrize(
    ("enum", "prefix", "values"),
    [
        (client.FinishReason, "FINISH_REASON_", router_pb2.FinishReason),
        (client.WorkerState, "WORKER_STATE_", common_pb2.WorkerState),
        (client.StreamState, "STREAM_STATE_", common_pb2.StreamState),
        (client.WorkerRole, "WORKER_ROLE_", common_pb2.WorkerRole),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_enum_has_every_value_of_the_contract(enum: type[StrEnum], prefix: str, values: Any) -> None:
    told = {name.removeprefix(prefix) for name in values.keys()} - {"UNSPECIFIED"}  # noqa: SIM118 - a protobuf enum
    assert {each.name for each in enum} - {"UNKNOWN"} == told


def test_worker_specification_survives_the_round_trip() -> None:
    spec = client.WorkerSpec(
        url="http://w:8000",
        name="w",
        endpoint="a.b.c",
        models=("m", "lora"),
        events="tcp://w:5557",
        replay="tcp://w:5562",
        topic="kv",
        kv_events=False,
        dp_size=2,
        block_size=32,
        role=client.WorkerRole.DECODE,
        taints=("big",),
        total_kv_blocks=1000,
        max_num_batched_tokens=8192,
    )
    assert all(getattr(spec, each.name) != each.default for each in dataclasses.fields(spec))
    assert client.WorkerSpec.from_proto(spec.to_proto()) == spec


def test_fields_left_out_stay_left_out() -> None:
    message = client.WorkerSpec(url="http://w:8000").to_proto()
    assert not message.HasField("dp_size")
    assert not message.HasField("kv_events")
    assert client.WorkerSpec.from_proto(message) == client.WorkerSpec(url="http://w:8000")


RESERVATION = {"MarkPrefillComplete", "ReportOutput", "Free"}
NAMED = {"Explain": ("explain", "decisions"), "Free": ("__aexit__",)}


@pytest.mark.parametrize(
    ("service", "kind"),
    [
        (router_pb2.DESCRIPTOR.services_by_name["KvRouter"], client.KvRouterClient),
        (admin_pb2.DESCRIPTOR.services_by_name["KvRouterAdmin"], client.KvRouterAdminClient),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_every_rpc_has_its_method(service: Any, kind: type[Any]) -> None:
    for rpc in service.methods:
        snake = re.sub("(?<=[a-z])(?=[A-Z])", "_", rpc.name).lower()
        owner = client.Reservation if rpc.name in RESERVATION else kind
        for name in NAMED.get(rpc.name, (snake,)):
            assert callable(getattr(owner, name, None)), f"{owner.__name__} has no {name}"


def test_methods_that_ask_take_all_that_a_request_says() -> None:
    fields = {field.name for field in router_pb2.BestWorkerIdRequest.DESCRIPTOR.fields}
    fields -= {"token_ids", "text", "reserve", "request_id", "ttl"}
    for method in (client.KvRouterClient.best_worker_id, client.KvRouterClient.reserve):
        assert fields <= inspect.signature(method).parameters.keys()
    fields = {field.name.removesuffix("_json") for field in router_pb2.GenerateRequest.DESCRIPTOR.fields}
    assert fields - {"token_ids", "text"} <= inspect.signature(client.KvRouterClient.generate).parameters.keys()


def test_every_public_name_exists() -> None:
    assert all(hasattr(client, name) for name in client.__all__)
    assert client.__all__ == sorted(client.__all__)
