"""The `kvrouter explain` command."""

import json
import sys
from pathlib import Path
from typing import Any

import click
import grpc
from google.protobuf import json_format
from rich.console import Console

from kvrouter_grpc._gen import admin_pb2, admin_pb2_grpc, router_pb2
from kvrouter_grpc.explain import screen

MAX_MESSAGE = 64 << 20
WIDE = 500  # columns


@click.command("explain")
@click.argument("request_id", required=False)
@click.option("--address", default="127.0.0.1:50051", show_default=True, help="Where KvRouterAdmin listens.")
@click.option("--endpoint", default="", help="Endpoint, if the router serves several.")
@click.option("--last", type=click.IntRange(1, 100), help="Explain so many of the last decisions.")
@click.option("--tokens", help="Explain where a prompt would go: token ids, separated by commas or spaces, or @FILE.")
@click.option("--text", help="The same for a text, on endpoints with a tokenizer.")
@click.option("--model", default="", help="Model or LoRA adapter of that request.")
@click.option("--request", help="The same for any BestWorkerIdRequest, as JSON or @FILE; may have routing hints.")
@click.option("--prefilled", is_flag=True, help="Of that request another worker computes the prompt.")
@click.option("--json", "as_json", is_flag=True, help="Print the ExplainResponse as JSON.")
@click.option("--timeout", default=10.0, show_default=True, type=click.FloatRange(min=0.1), help="Seconds to wait.")
def explain_command(
    request_id: str | None,
    address: str,
    endpoint: str,
    last: int | None,
    tokens: str | None,
    text: str | None,
    model: str,
    request: str | None,
    prefilled: bool,
    as_json: bool,
    timeout: float,
) -> None:
    """Ask a running router why a request went where it did, or where one would go.

    With a REQUEST_ID that request is explained, with every attempt; with --tokens, --text or --request one that nobody
    has sent; otherwise the last decision. The router remembers as many decisions as --decision-log-size says.
    """
    given = [request_id, last, tokens, text, request]
    if sum(each is not None for each in given) > 1:
        raise click.UsageError("give one of REQUEST_ID, --last, --tokens, --text and --request")
    question = admin_pb2.ExplainRequest(endpoint=endpoint)
    if request_id is not None:
        question.request_id = request_id
    elif (tokens, text, request) == (None, None, None):
        question.recent = last or 1
    else:
        question.request.CopyFrom(_request(tokens, text, request))
        question.request.endpoint = question.request.endpoint or endpoint
        question.request.model = question.request.model or model
        question.request.prefilled = question.request.prefilled or prefilled
    answer = _ask(address, question, timeout)
    if as_json:
        click.echo(json_format.MessageToJson(answer, preserving_proto_field_name=True))
        return
    # Without a terminal lines are not broken: pipes have no width.
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    for number, decision in enumerate(answer.decisions):
        if number:
            console.print()
        console.print(screen.explanation(decision), highlight=False)


def _request(tokens: str | None, text: str | None, request: str | None) -> router_pb2.BestWorkerIdRequest:
    """The request that is described.

    Raises:
        UsageError: It cannot be read.
    """
    message = router_pb2.BestWorkerIdRequest()
    if request is not None:
        try:
            json_format.Parse(_content("--request", request), message)
        except json_format.ParseError as error:
            raise click.UsageError(f"--request is no BestWorkerIdRequest: {error}") from None
    elif tokens is not None:
        try:
            message.token_ids.extend(_token_ids(_content("--tokens", tokens)))
        except (TypeError, ValueError):
            raise click.UsageError("--tokens must be token ids from 0 to 2^31 - 1, such as 1,2,3") from None
    elif text is not None:
        message.text = text
    return message


def _token_ids(text: str) -> list[int]:
    """Numbers with anything common between them: a list in JSON, commas, spaces."""
    text = text.strip()
    if text.startswith("["):
        ids: Any = json.loads(text)
        return list(ids)
    return [int(word) for word in text.replace(",", " ").split()]


def _content(option: str, value: str) -> str:
    """The value itself, or what is in the file that it names."""
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{option}: {value[1:]} cannot be read: {error}") from None


def _ask(address: str, question: admin_pb2.ExplainRequest, timeout: float) -> admin_pb2.ExplainResponse:
    with grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", MAX_MESSAGE)]) as channel:
        stub = admin_pb2_grpc.KvRouterAdminStub(channel)
        try:
            answer: admin_pb2.ExplainResponse = stub.Explain(question, timeout=timeout)
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            raise click.ClickException(f"{address}: {code.name}: {details}") from None
    return answer
