"""Every error the project raises on purpose, and what it means to the outside.

    PdserveError                 code                 retry?
    ├── InvalidRequest           INVALID_ARGUMENT     no    names the field
    ├── NotFound                 NOT_FOUND            no    no such model
    ├── DuplicateRequest         ALREADY_EXISTS       no    request_id is in flight
    ├── Overloaded               RESOURCE_EXHAUSTED   yes   queue full; says when to retry
    ├── DeadlineExceeded         DEADLINE_EXCEEDED    no
    ├── RequestCancelled         CANCELLED            no
    ├── Unavailable              UNAVAILABLE          yes   no worker, or draining
    │   ├── WorkerLost           UNAVAILABLE          yes   a worker died under the request
    │   └── TransferFailed       UNAVAILABLE          yes   the KV did not arrive; the source is intact
    ├── CorruptKV                DATA_LOSS            yes   the KV arrived wrong: digest mismatch
    ├── StaleReference           FAILED_PRECONDITION  no    another generation, attempt or epoch
    ├── LayoutMismatch           FAILED_PRECONDITION  no    two workers' KV cannot be exchanged
    ├── WrongRole                FAILED_PRECONDITION  no    asked a worker for what its role does not do
    ├── InternalError            INTERNAL             no    a bug; carries an opaque id
    └── StartupError             (exit code 2)        no    refuse to start
        ├── ConfigError                                     names the key
        └── ModelError                                      names the file or the reason

Foreign exceptions are translated at one seam each: torch in the link, ray in the launcher, grpc in the
server. Asserts guard our own invariants and are never reachable from outside.
Imports nothing: the gRPC status is named by its string.
"""

from __future__ import annotations


class PdserveError(Exception):
    """Base of all; `code` is a gRPC status name, `retryable` whether trying again may help."""

    code = "INTERNAL"
    retryable = False

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else type(self).__name__


class InvalidRequest(PdserveError):
    """A field of a request is malformed or out of range."""

    code = "INVALID_ARGUMENT"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class NotFound(PdserveError):
    """The named model is not served here."""

    code = "NOT_FOUND"


class DuplicateRequest(PdserveError):
    """A request with this id is in flight."""

    code = "ALREADY_EXISTS"


class Overloaded(PdserveError):
    """A bounded queue is full. Nothing was started."""

    code = "RESOURCE_EXHAUSTED"
    retryable = True

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(PdserveError):
    """The request's deadline passed."""

    code = "DEADLINE_EXCEEDED"


class RequestCancelled(PdserveError):
    """The client went away."""

    code = "CANCELLED"


class Unavailable(PdserveError):
    """No worker can take the request now."""

    code = "UNAVAILABLE"
    retryable = True


class WorkerLost(Unavailable):
    """A worker died or became unreachable under the request."""


class TransferFailed(Unavailable):
    """The KV did not arrive."""


class CorruptKV(PdserveError):
    """The KV arrived, but is not what was sent."""

    code = "DATA_LOSS"
    retryable = True


class StaleReference(PdserveError):
    """A message names a generation, attempt or epoch that is no longer current."""

    code = "FAILED_PRECONDITION"


class LayoutMismatch(PdserveError):
    """Two workers' KV layouts differ."""

    code = "FAILED_PRECONDITION"


class WrongRole(PdserveError):
    """The worker's role does not do this."""

    code = "FAILED_PRECONDITION"


class InternalError(PdserveError):
    """A bug of ours. The message carries an opaque id that the log explains."""


class StartupError(PdserveError):
    """Refuse to start: one line to the user, exit code 2."""


class ConfigError(StartupError):
    """The configuration is wrong; the message names the key."""


class ModelError(StartupError):
    """The model cannot be served; the message names the file or the reason."""


BY_NAME: dict[str, type[PdserveError]] = {
    cls.__name__: cls
    for cls in (
        NotFound,
        DuplicateRequest,
        DeadlineExceeded,
        RequestCancelled,
        Unavailable,
        WorkerLost,
        TransferFailed,
        CorruptKV,
        StaleReference,
        LayoutMismatch,
        WrongRole,
        InternalError,
    )
}


def rebuild(kind: str, message: str) -> PdserveError:
    """The error that another process named; an unknown kind is a bug."""
    if kind == "InvalidRequest":
        field, _, problem = message.partition(": ")
        return InvalidRequest(field, problem)
    if kind == "Overloaded":
        return Overloaded(message)
    return BY_NAME.get(kind, InternalError)(message)
