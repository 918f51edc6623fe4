"""The recipes of clients/grpcurl: every rpc has them, both forms say the same, and each works as it stands."""

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from kvrouter_grpc._gen import admin_pb2, router_pb2
from pages import ROOT, blocks
from programs import Fleet, environment, fleet

PAGE = ROOT / "clients/grpcurl/README.md"
ADDRESS = "127.0.0.1:50051"
SERVICES = [
    router_pb2.DESCRIPTOR.services_by_name["KvRouter"],
    admin_pb2.DESCRIPTOR.services_by_name["KvRouterAdmin"],
]


@dataclass(frozen=True)
class Recipe:
    command: str
    data: str
    method: str


def recipes(pattern: str) -> list[Recipe]:
    """Every command of one form, in the order of the page."""
    shell = (block.text.strip() for block in blocks(PAGE) if block.language == "shell")
    matches = (re.fullmatch(pattern, command) for command in shell)
    return [Recipe(match[0], match["data"], match["method"]) for match in matches if match]


GRPCURL = recipes(rf"grpcurl -plaintext -d (?P<data>.+) {ADDRESS} (?P<method>\S+)")
BUF = recipes(rf"buf curl --http2-prior-knowledge --protocol grpc -d (?P<data>.+) http://{ADDRESS}/(?P<method>\S+)")


@pytest.fixture(scope="module")
def running() -> Iterator[Fleet]:
    with fleet(2) as running:
        yield running


def run(command: str, address: str) -> list[dict[str, Any]]:
    """The JSON messages that a recipe answers."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command.replace(ADDRESS, address)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    decoder, text, messages = json.JSONDecoder(), done.stdout.strip(), []
    while text:
        message, end = decoder.raw_decode(text)
        messages.append(message)
        text = text[end:].lstrip()
    return messages


def test_page_holds_nothing_but_pairs() -> None:
    shell = [block for block in blocks(PAGE) if block.language == "shell"]
    assert len(shell) == len(GRPCURL) + len(BUF)
    assert [(each.data, each.method) for each in GRPCURL] == [(each.data, each.method) for each in BUF]


def test_every_rpc_has_a_recipe() -> None:
    rpcs = {f"{service.full_name}/{method.name}" for service in SERVICES for method in service.methods}
    assert rpcs | {"grpc.health.v1.Health/Check"} == {each.method for each in BUF}


def test_every_recipe_works_in_the_order_of_the_page(running: Fleet) -> None:
    answers: dict[str, list[list[dict[str, Any]]]] = {}
    for recipe in BUF:
        answers.setdefault(recipe.method.rpartition("/")[2], []).append(run(recipe.command, running.address))

    generated, decided = answers["Generate"]
    assert "routing" in generated[0]
    assert generated[-1]["finishReason"] == "FINISH_REASON_LENGTH"
    assert sum(len(message.get("tokenIds", [])) for message in generated) == 8
    assert [list(message) for message in decided] == [["routing"]]

    plain, explained, dynamo, reserved = (messages[0] for messages in answers["BestWorkerId"])
    assert plain["workerName"] in running.workers
    assert len(explained["candidates"]) == 2
    assert {term["name"] for term in dynamo["candidates"][0]["terms"]} == {"prefill", "decode", "active_requests"}
    assert 29 <= float(reserved["reservationTtl"].removesuffix("s")) <= 30

    first, second, refused = answers["BestWorkerIdBatch"][0][0]["results"]
    assert {first["response"]["workerName"], second["response"]["workerName"]} <= running.workers.keys()
    assert refused["status"]["code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert refused["status"]["details"][0]["reason"] == "INVALID_REQUEST"
    assert [len(batch["results"]) for batch in answers["BestWorkerIdStream"][0]] == [1, 2]

    assert [each["workerName"] for each in answers["GetOverlapScores"][0][0]["workers"]]
    assert answers["MarkPrefillComplete"] == answers["ReportOutput"] == answers["Free"] == [[{}]]
    assert [each["spec"]["name"] for each in answers["ListWorkers"][0][0]["workers"]] == ["w0", "w1"]
    assert "workerId" in answers["RegisterWorker"][0][0]
    assert answers["RenewWorker"] == [[{"ttl": "60s"}]]
    assert answers["DrainWorker"] == [[{}]]  # no requests left, and 0 is not written
    assert answers["DeregisterWorker"] == [[{}]]
    assert [each["workerName"] for each in answers["GetLoads"][0][0]["loads"]] == ["w0", "w1"]
    assert answers["SetThresholds"] == [[{}]]
    assert answers["GetThresholds"][0][0]["endpoints"][0]["thresholds"] == {"activeDecodeBlocks": 0.95}
    (last,), (asked,) = answers["Explain"]
    assert {each["workerName"] for each in (last["decisions"][0], asked["decisions"][0])} <= running.workers.keys()
    assert answers["StreamSnapshot"][0][0]["data"]
    assert answers["Check"] == [[{"status": "SERVING"}]]


def test_wrong_request_is_told_in_full(running: Fleet) -> None:
    command = next(each.command for each in BUF if each.method.endswith("BestWorkerId"))
    done = subprocess.run(
        ["bash", "-c", command.replace(ADDRESS, running.address).replace("{1..100}", "4294967295")],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=30,
        check=False,
    )
    assert done.returncode != 0
    assert "INVALID_REQUEST" in done.stderr or "token_ids[0]" in done.stderr
