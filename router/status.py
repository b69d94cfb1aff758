"""The one seam between the error tree and the gRPC statuses that applications see.

An interceptor wraps every method of the server, health and reflection included, so that no request can end as
UNKNOWN: a message that cannot be parsed is INVALID_ARGUMENT, a typed error its own code with `google.rpc` details, a
bug INTERNAL with an opaque id that only the log explains. Knows nothing of what the methods do.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from pdserve.proto.errors import InternalError, InvalidRequest, Overloaded, PdserveError

LOG = logging.getLogger("pdserve.router")
# A peer that does not read cannot take its status either; it keeps the call no longer than this.
ABORT_TIMEOUT_S = 1.0


class Malformed:
    """Stands in for a request that could not be parsed."""


MALFORMED = Malformed()
OnError = Callable[[str, str], None]
Context = grpc.aio.ServicerContext[Any, Any]


def to_status(error: PdserveError) -> status_pb2.Status:
    """Code, sentence and details: the field of an InvalidRequest, the delay of an Overloaded."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=error.message)
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message.removeprefix(f"{error.field}: ")
        )
        _attach(status, error_details_pb2.BadRequest(field_violations=[violation]))
    elif isinstance(error, Overloaded):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(max(1, round(error.retry_after_s * 1e3)))
        _attach(status, error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def _attach(status: status_pb2.Status, detail: error_details_pb2.BadRequest | error_details_pb2.RetryInfo) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def public_error(error: Exception) -> PdserveError:
    """What may be told: typed errors as they are, bugs only by an id under which the log has the rest."""
    if isinstance(error, PdserveError) and not isinstance(error, InternalError):
        return error
    opaque = secrets.token_hex(6)
    LOG.error("internal error %s", opaque, exc_info=error)
    return InternalError(f"internal error {opaque}")


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """`on_error(method, status)` hears of every call that does not end well, cancelled ones included."""

    def __init__(self, on_error: OnError) -> None:
        self._on_error = on_error

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method)
        parse = _forgiving(handler.request_deserializer)
        make, inner = _shape(handler)
        return make(
            self._guarded(method, inner, handler.response_streaming),
            request_deserializer=parse,
            response_serializer=handler.response_serializer,
        )

    def _guarded(self, method: str, inner: Any, response_streaming: bool) -> Callable[[Any, Context], Awaitable[Any]]:
        async def behaviour(request: Any, context: Context) -> Any:
            try:
                incoming = _checked(request)
                if not response_streaming:
                    return await inner(incoming, context)
                if inspect.isasyncgenfunction(inner):
                    async for response in inner(incoming, context):
                        await context.write(response)
                    return None
                return await inner(incoming, context)
            except grpc.aio.AbortError:
                raise
            except asyncio.CancelledError:
                remaining_s = context.time_remaining()
                expired = remaining_s is not None and remaining_s <= 0
                self._on_error(method, "DEADLINE_EXCEEDED" if expired else "CANCELLED")
                raise
            except Exception as error:
                failure = public_error(error)
                self._on_error(method, failure.code)
                async with asyncio.timeout(ABORT_TIMEOUT_S):
                    await context.abort_with_status(rpc_status.to_status(to_status(failure)))

        return behaviour


def _shape(handler: Any) -> tuple[Any, Any]:
    """The constructor and the function of a handler, by its kind."""
    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler, handler.stream_stream
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler, handler.stream_unary
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler, handler.unary_stream
    return grpc.unary_unary_rpc_method_handler, handler.unary_unary


def _forgiving(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Raising in here would become UNKNOWN inside the library."""

    def parse_or_mark(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return MALFORMED

    return parse_or_mark


def _checked(request: Any) -> Any:
    """The request, or for a request stream one that checks each message. Raises InvalidRequest."""
    if hasattr(request, "__aiter__"):
        return _checked_stream(request)
    if request is MALFORMED:
        raise InvalidRequest("request", "not a valid protobuf message")
    return request


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)
