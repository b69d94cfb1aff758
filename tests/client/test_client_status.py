"""Statuses back onto the error tree, with and without the standard details."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from pdserve.client.status import error_from_status
from pdserve.proto import errors

CLASSES = {
    "INVALID_ARGUMENT": errors.InvalidRequest,
    "NOT_FOUND": errors.NotFound,
    "ALREADY_EXISTS": errors.DuplicateRequest,
    "RESOURCE_EXHAUSTED": errors.Overloaded,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "CANCELLED": errors.RequestCancelled,
    "UNAVAILABLE": errors.Unavailable,
    "DATA_LOSS": errors.CorruptKV,
    "INTERNAL": errors.InternalError,
}


def details(*parts: object) -> list[tuple[str, bytes]]:
    status = status_pb2.Status(code=1, message="m")
    for part in parts:
        status.details.add().Pack(part)
    return [("grpc-status-details-bin", status.SerializeToString())]


@pytest.mark.parametrize("code", [code.name for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_becomes_an_error_that_carries_its_code(code: str) -> None:
    error = error_from_status(code, "field: what", [])
    assert isinstance(error, CLASSES.get(code, errors.PdserveError))
    assert error.code == code
    assert "what" in error.message


def test_codes_outside_the_tree_do_not_leak_into_the_class() -> None:
    error_from_status("UNAUTHENTICATED", "no token", [])
    assert errors.PdserveError.code == "INTERNAL"
    assert error_from_status("ABORTED", "x", []).retryable
    assert not error_from_status("UNAUTHENTICATED", "x", []).retryable


def test_an_empty_message_still_says_something() -> None:
    assert error_from_status("UNAVAILABLE", "", []).message == "UNAVAILABLE"
    assert error_from_status("UNIMPLEMENTED", "", []).message == "UNIMPLEMENTED"


def test_the_field_is_read_from_the_message_or_the_details() -> None:
    plain = error_from_status("INVALID_ARGUMENT", "top_p: must be at most 1", [])
    assert isinstance(plain, errors.InvalidRequest)
    assert (plain.field, plain.message) == ("top_p", "top_p: must be at most 1")
    violation = error_details_pb2.BadRequest.FieldViolation(field="seed", description="too big")
    rich = error_from_status(
        "INVALID_ARGUMENT", "bad", details(error_details_pb2.BadRequest(field_violations=[violation]))
    )
    assert isinstance(rich, errors.InvalidRequest)
    assert (rich.field, rich.message) == ("seed", "seed: too big")
    bare = error_from_status("INVALID_ARGUMENT", "nonsense", [])
    assert isinstance(bare, errors.InvalidRequest)
    assert bare.field == "request"


def test_the_retry_delay_is_read_from_the_details_or_the_metadata() -> None:
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMilliseconds(2500)
    for trailing, expected in (
        (details(info), 2.5),
        ([("grpc-retry-pushback-ms", "750")], 0.75),
        ([("grpc-retry-pushback-ms", "-1")], 1.0),
        ([], 1.0),
    ):
        error = error_from_status("RESOURCE_EXHAUSTED", "queue full", trailing)
        assert isinstance(error, errors.Overloaded)
        assert error.retry_after_s == pytest.approx(expected)


@pytest.mark.parametrize("name", ["WorkerLost", "TransferFailed", "StaleReference", "LayoutMismatch", "WrongRole"])
def test_a_named_reason_picks_the_subclass(name: str) -> None:
    cls = errors.BY_NAME[name]
    error = error_from_status(cls.code, "m", details(error_details_pb2.ErrorInfo(reason=name, domain="pdserve")))
    assert type(error) is cls


def test_a_reason_that_contradicts_the_code_is_not_believed() -> None:
    trailing = details(error_details_pb2.ErrorInfo(reason="CorruptKV"))
    assert type(error_from_status("UNAVAILABLE", "m", trailing)) is errors.Unavailable


def test_unreadable_details_do_not_hide_the_error() -> None:
    assert isinstance(error_from_status("NOT_FOUND", "m", [("grpc-status-details-bin", b"\xff\xff")]), errors.NotFound)


def test_a_message_over_the_size_limit_is_not_an_overload() -> None:
    error = error_from_status("RESOURCE_EXHAUSTED", "CLIENT: Sent message larger than max (5 vs. 4)", [])
    assert isinstance(error, errors.InvalidRequest)
