"""Errors to one line on stderr and an exit code: 1 it failed, 2 wrong usage, configuration or input, 130 Ctrl-C.

The one place where a command's exceptions end. Never a traceback: an exception outside the tree is a bug, reported by
its name, and its traceback goes to the debug log.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import grpc
import typer

from pdserve.cluster import early_interrupt
from pdserve.cluster.early_interrupt import INTERRUPTED
from pdserve.proto.errors import InvalidRequest, NotFound, Overloaded, PdserveError, StartupError

P = ParamSpec("P")
R = TypeVar("R")

FAILED = 1
WRONG_INPUT = 2

log = logging.getLogger(__name__)


def one_line_errors(command: Callable[P, R]) -> Callable[P, R]:
    """The command with its errors translated; signature and help stay as they are."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            early_interrupt.raise_again()
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            log.debug("command failed", exc_info=True)
            cause = _sole_cause(error)
            if isinstance(cause, BrokenPipeError):
                _silence_stdout()
                raise typer.Exit(FAILED) from None
            typer.echo(f"error: {error_line(cause)}", err=True)
            raise typer.Exit(exit_code(cause)) from None

    return wrapped


def exit_code(error: Exception) -> int:
    """2 when asking differently would help, else 1."""
    return WRONG_INPUT if isinstance(error, InvalidRequest | NotFound | StartupError) else FAILED


def error_line(error: Exception) -> str:
    """One line that says what happened, and when to try again if that is known."""
    if isinstance(error, Overloaded):
        text = f"{error.message} (try again in {error.retry_after_s:g} s)"
    elif isinstance(error, PdserveError):
        text = error.message
    elif isinstance(error, grpc.RpcError) and isinstance(error, grpc.Call):
        text = f"{error.code().name}: {error.details()}"
    elif isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    else:
        text = f"unexpected {type(error).__name__}: {error}"
    return " ".join(text.split()) or type(error).__name__


def error_object(error: PdserveError) -> dict[str, object]:
    """The error for machines: stable keys, absent ones left out."""
    found: dict[str, object] = {"code": error.code, "message": error.message, "retryable": error.retryable}
    if isinstance(error, InvalidRequest):
        found["field"] = error.field
    if isinstance(error, Overloaded):
        found["retry_after_s"] = error.retry_after_s
    return found


def _sole_cause(error: Exception) -> Exception:
    """What a task group wrapped, if it wrapped one thing."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _silence_stdout() -> None:
    """Nobody reads us any more: keep the interpreter from complaining when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
