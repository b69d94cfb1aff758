"""gRPC statuses back to the error tree: the client's one seam for foreign exceptions.

A status may carry the standard details (`google.rpc.BadRequest`, `RetryInfo`, `ErrorInfo` whose reason is the class
name in the tree) or plain trailing metadata (`grpc-retry-pushback-ms`); with neither, the code and the message
decide. A code that the tree has no class for becomes a `PdserveError` that carries it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import grpc
from google.protobuf.message import DecodeError, Message

from pdserve.client.standard import MESSAGES
from pdserve.proto.errors import (
    BY_NAME,
    CorruptKV,
    DeadlineExceeded,
    DuplicateRequest,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    PdserveError,
    RequestCancelled,
    Unavailable,
    rebuild,
)

BY_CODE: dict[str, type[PdserveError]] = {
    cls.code: cls
    for cls in (NotFound, DuplicateRequest, DeadlineExceeded, RequestCancelled, Unavailable, CorruptKV, InternalError)
}
RETRYABLE_WITHOUT_CLASS = frozenset({"ABORTED"})
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
DEFAULT_RETRY_AFTER_S = 1.0

# gRPC's own refusal of a message over the size limit shares its code with overload, but waiting will not help.
TOO_LARGE = "larger than max"


@contextmanager
def typed_errors() -> Iterator[None]:
    """Raise what the tree calls the gRPC error of the body."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_from_rpc(error) from error


def error_from_rpc(error: grpc.RpcError) -> PdserveError:
    """The typed error of an exception that is also a call, sync or async."""
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    code = error.code()
    name = "UNKNOWN" if code is None else code.name
    return error_from_status(name, error.details() or "", error.trailing_metadata() or ())


def error_from_status(code: str, message: str, trailing: Iterable[tuple[str, str | bytes]]) -> PdserveError:
    """The typed error of a status: code name, message and trailing metadata."""
    metadata = dict(trailing)
    details = _details(metadata.get(DETAILS_KEY))
    message = message or code
    if code == "INVALID_ARGUMENT":
        return _invalid(message, details)
    if code == "RESOURCE_EXHAUSTED":
        if TOO_LARGE in message:
            return InvalidRequest("prompt", message)
        return Overloaded(message, _retry_after_s(metadata, details))
    named = getattr(details.get("ErrorInfo"), "reason", "")
    if named in BY_NAME and BY_NAME[named].code == code:
        return rebuild(named, message)
    if code in BY_CODE:
        return BY_CODE[code](message)
    error = PdserveError(f"{code}: {message}" if message != code else code)
    error.code, error.retryable = code, code in RETRYABLE_WITHOUT_CLASS
    return error


def _details(encoded: str | bytes | None) -> dict[str, Message]:
    """The first detail of each kind that we know; unreadable details only cost precision, never the error."""
    found: dict[str, Message] = {}
    if isinstance(encoded, bytes):
        try:
            for detail in MESSAGES["Status"].FromString(encoded).details:
                kind = detail.type_url.rpartition("/google.rpc.")[2]
                if kind in MESSAGES:
                    found.setdefault(kind, MESSAGES[kind].FromString(detail.value))
        except DecodeError:
            return found
    return found


def _invalid(message: str, details: dict[str, Message]) -> InvalidRequest:
    violations = getattr(details.get("BadRequest"), "field_violations", ())
    if violations:
        return InvalidRequest(violations[0].field, violations[0].description)
    field, separator, problem = message.partition(": ")
    return InvalidRequest(field, problem) if separator else InvalidRequest("request", message)


def _retry_after_s(metadata: dict[str, str | bytes], details: dict[str, Message]) -> float:
    retry_info = details.get("RetryInfo")
    if retry_info is not None:
        delay = getattr(retry_info, "retry_delay")  # noqa: B009 - the message class is declared at run time
        return float(delay.seconds + delay.nanos * 1e-9)
    pushback = metadata.get(PUSHBACK_KEY)
    if pushback is not None and str(pushback).isdecimal():
        return int(pushback) / 1e3
    return DEFAULT_RETRY_AFTER_S
