"""The one seam between the error tree and gRPC statuses for calls inside the cluster.

The error's class name travels in trailing metadata, so that the caller gets back the class that was raised. The public
API has its own seam in the router, with details for applications. Knows nothing of what the calls do.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc

from pdserve.proto.errors import InternalError, PdserveError, WorkerLost, rebuild

logger = logging.getLogger(__name__)
KIND_KEY = "pdserve-error"

Request = TypeVar("Request")
Response = TypeVar("Response")


async def answer(
    context: grpc.aio.ServicerContext[Any, Any], handler: Callable[[Request], Awaitable[Response]], request: Request
) -> Response:
    """Run a unary handler; a typed error becomes its status, anything else INTERNAL with an opaque id."""
    try:
        return await handler(request)
    except Exception as error:
        failure = as_typed(error)
    metadata = ((KIND_KEY, type(failure).__name__),)
    await context.abort(grpc.StatusCode[failure.code], failure.message, metadata)
    raise AssertionError("abort returned")


def as_typed(error: Exception) -> PdserveError:
    """`error` itself if it is one of ours; anything else is a bug: logged, and told as an opaque id."""
    if isinstance(error, PdserveError):
        return error
    opaque = secrets.token_hex(6)
    logger.error("internal error %s", opaque, exc_info=error)
    return InternalError(f"internal error {opaque}")


def error_from_call(error: grpc.aio.AioRpcError, who: str) -> PdserveError:
    """The error that the other side raised, or `WorkerLost` when it could not be asked."""
    for key, value in error.trailing_metadata() or ():
        if key == KIND_KEY:
            return rebuild(str(value), error.details() or "")
    return WorkerLost(f"{who} did not answer ({error.code().name})")
