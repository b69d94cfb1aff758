"""Work that a device does in order, and waits for it that end: what the links between GPUs need of CUDA streams.

Two kinds of wait. `wait` is the caller's: it ends at its deadline, at a CUDA error, or when `look` finds that there is
nothing left to wait for. `fence` is the memory's: it ends when nothing given to the lane can write any more, because it
is done or because the device is broken for good. Neither is a synchronise call: those cannot be ended.

`Lane` is a contract so that everything but CUDA itself runs in tests, over host memory. Knows nothing of links.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

from pdserve.kv_transfer.link import Deadline
from pdserve.proto.errors import TransferFailed

_SHORT_S = 300e-6  # copies of some hundred MB are done by then: give way to other threads, but do not sleep
_MAX_PAUSE_S = 1e-3


class Mark(Protocol):
    """A point in a lane's work."""

    def query(self) -> bool:
        """Whether everything before it is done. Raises RuntimeError on a device that failed."""


class Lane(Protocol):
    """One stream of one device; used by one thread at a time."""

    def current(self) -> AbstractContextManager[None]:
        """Tensor operations of this thread go to this lane meanwhile."""

    def follow(self) -> None:
        """What is given to the lane from now on runs after all that the device's default stream has been given."""

    def mark(self) -> Mark:
        """Behind everything the lane has been given."""

    def indices(self, block_ids: Sequence[int]) -> torch.Tensor:
        """int64 `[len(block_ids)]` on the device, without waiting for it."""


def nothing() -> None:
    """No reason to stop waiting."""


def wait(mark: Mark, deadline: Deadline, look: Callable[[], None] = nothing) -> None:
    """Return once `mark` is reached; raises `TransferFailed` at the deadline, and whatever `look` raises."""
    start_s, pause_s = time.monotonic(), 0.0
    with translated("the device failed"):
        while not mark.query():
            deadline.left_s()
            look()
            if time.monotonic() - start_s > _SHORT_S:
                pause_s = min(pause_s + 20e-6, _MAX_PAUSE_S)
            time.sleep(pause_s)


def fence(lane: Lane) -> None:
    """Return once nothing that the lane was given writes any more.

    No deadline: until then the memory is not the caller's to give away. What a link gives to its lane waits for no peer
    and is bounded in size, so only a device that hangs keeps this waiting, and its worker has to be replaced anyway.
    """
    try:
        mark = lane.mark()
        while not mark.query():
            time.sleep(_MAX_PAUSE_S)
    except RuntimeError:
        return  # a failed device runs nothing of this process any more


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Errors of torch, CUDA and NCCL end here."""
    try:
        yield
    except (
        RuntimeError,
        OSError,
    ) as error:  # torch's AcceleratorError, OutOfMemoryError and DistError are RuntimeErrors
        first_line = str(error).partition("\n")[0]
        raise TransferFailed(f"{what}: {first_line}") from error
