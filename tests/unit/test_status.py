"""The table of statuses and the details sent with it."""

import inspect

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from kvrouter_grpc import errors
from kvrouter_grpc.errors import (
    EngineRejectedError,
    InvalidRequestError,
    NoWorkersError,
    OverloadedError,
    RouterError,
    UnknownWorkerError,
)
from kvrouter_grpc.server.status import CODES, DOMAIN, Status, code_of, defect, status_of

ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, RouterError)]


def details(status: Status) -> dict[type, object]:
    message = status_pb2.Status.FromString(status.details)
    found = {}
    for packed in message.details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            if packed.Is(kind.DESCRIPTOR):
                found[kind] = kind.FromString(packed.value)
    assert len(found) == len(message.details)
    assert message.code == status.code.value[0]
    assert message.message == status.message
    return found


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_has_a_row_of_its_own(kind):
    assert kind in CODES


def test_the_table_has_no_rows_for_anything_else():
    assert set(CODES) == set(ERRORS)


def test_reasons_are_unique_and_stable_in_form():
    reasons = [kind.reason for kind in ERRORS]
    assert len(set(reasons)) == len(reasons)
    assert all(reason.isascii() and reason.upper() == reason and " " not in reason for reason in reasons)


def test_only_what_a_retry_can_cure_is_retryable():
    retryable = {kind for kind in ERRORS if kind.retry_after_s is not None}
    assert {CODES[kind] for kind in retryable} == {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }


def test_a_subclass_without_a_row_has_its_parents():
    class LocalError(UnknownWorkerError):
        pass

    assert code_of(LocalError("x")) is grpc.StatusCode.NOT_FOUND


def test_an_engine_that_does_not_know_the_model_means_not_found():
    refused = EngineRejectedError("no such model", metadata={"http_status": "404"})
    assert code_of(refused) is grpc.StatusCode.NOT_FOUND
    assert code_of(EngineRejectedError("bad", metadata={"http_status": "400"})) is grpc.StatusCode.INVALID_ARGUMENT


def test_error_info_names_the_reason_and_the_request():
    status = status_of(NoWorkersError("nobody", metadata={"endpoint": "a.b.c"}), "req-1")
    found = details(status)
    info = found[error_details_pb2.ErrorInfo]
    assert (info.domain, info.reason) == (DOMAIN, "NO_WORKERS")
    assert dict(info.metadata) == {"endpoint": "a.b.c", "request_id": "req-1"}
    assert found[error_details_pb2.RetryInfo].retry_delay.ToMilliseconds() == 1000
    assert error_details_pb2.BadRequest not in found


def test_the_retry_delay_of_an_error_wins_over_that_of_its_class():
    found = details(status_of(OverloadedError("full", retry_after_s=0.25), "r"))
    assert found[error_details_pb2.RetryInfo].retry_delay.ToMilliseconds() == 250


def test_violations_become_a_bad_request():
    status = status_of(InvalidRequestError([("a.b", "must be 1"), ("c", "is empty")]), "r")
    assert status.code is grpc.StatusCode.INVALID_ARGUMENT
    assert status.message == "a.b: must be 1; c: is empty"
    fields = details(status)[error_details_pb2.BadRequest].field_violations
    assert [(field.field, field.description) for field in fields] == [("a.b", "must be 1"), ("c", "is empty")]


def test_violations_beyond_the_bound_are_counted():
    status = status_of(InvalidRequestError([(f"f{n}", "x" * 200) for n in range(100)]), "r")
    fields = details(status)[error_details_pb2.BadRequest].field_violations
    assert fields[-1].field == ""
    assert fields[-1].description == f"and {100 - (len(fields) - 1)} more"


def test_a_defect_tells_nothing_but_where_to_look():
    status = defect("req-9")
    assert status.code is grpc.StatusCode.INTERNAL
    info = details(status)[error_details_pb2.ErrorInfo]
    assert (info.reason, dict(info.metadata)) == ("INTERNAL", {"request_id": "req-9"})


@given(
    st.text(max_size=3000),
    st.dictionaries(st.text(max_size=300), st.text(max_size=3000), max_size=20),
    st.text("abc-", min_size=1, max_size=256),
)
def test_a_status_fits_into_the_metadata_a_client_accepts(message, metadata, request_id):
    status = status_of(NoWorkersError(message, metadata=metadata), request_id)
    assert wire_size(status) < 8 * 1024
    assert details(status)[error_details_pb2.ErrorInfo].metadata["request_id"] == request_id


@given(st.lists(st.tuples(st.text(max_size=300), st.text(max_size=1000)), max_size=60))
def test_a_status_of_many_violations_fits_too(violations):
    assert wire_size(status_of(InvalidRequestError(violations), "r" * 256)) < 8 * 1024


def wire_size(status: Status) -> int:
    """Bytes of the status in trailing metadata: the message percent-encoded, the details in base64."""
    return 3 * len(status.message.encode()) + 4 * len(status.details) // 3
