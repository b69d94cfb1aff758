"""What it means to a client that a worker refused something, of us or of another worker. Pure."""

from __future__ import annotations

from pdserve.proto.errors import (
    DuplicateRequest,
    InternalError,
    LayoutMismatch,
    PdserveError,
    StaleReference,
    Unavailable,
    WrongRole,
)


def as_told(worker_id: str, error: PdserveError) -> PdserveError:
    """`error` of a worker as a client may hear it."""
    if isinstance(error, (StaleReference, WrongRole, LayoutMismatch)):
        # Somebody's picture of the fleet or of a hand-off was out of date: not the client's fault, and gone on a
        # second try.
        return Unavailable(f"worker {worker_id} refused: {error.message}")
    if isinstance(error, DuplicateRequest):
        return InternalError(f"worker {worker_id}: {error.message}")
    return error
