"""An NCCL group of exactly two, outside torch's default group. The one module that touches torch's NCCL names.

Not run on a GPU yet. What it rests on, read in torch's sources (2.13's headers, a recent ProcessGroupNCCL.cpp):
- `config.blocking = 0` makes calls return that would wait for the peer, but torch then polls NCCL itself, for up to
  `TORCH_NCCL_NONBLOCKING_TIMEOUT`: every call is made in a thread of the pair's own, and waited for with our deadline;
- connected eagerly, sends and receives use that one communicator; otherwise the first of them opens another;
- by default the watchdog ends the process when an operation fails or times out, and a monitor when the watchdog hangs;
- `abort` waits until NCCL's kernels have left the device, for as long as that takes: it has a thread of its own, which
  holds the memory of unfinished messages until then (`close`);
- `Work.is_success` raises, `Work.wait` throws what went wrong and waits no longer once `is_completed`;
- two ranks on one GPU need NCCL 2.30 and a setting that NCCL reads once, when it is first used.

The store is our own connection, as for Gloo (see `process_group`). Foreign exceptions end here. Knows nothing of
blocks.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, MutableMapping
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pdserve.kv_transfer.lane import Lane, translated
from pdserve.kv_transfer.link import Deadline
from pdserve.kv_transfer.mailbox import Mailbox
from pdserve.proto.errors import StartupError, TransferFailed

MULTI_RANK_NCCL = (2, 30)
_MULTI_RANK_CTAS = 4  # both ranks' kernels must fit on the GPU at once, beside the engine's
_GROUP_TIMEOUT = timedelta(minutes=30)  # torch's own; our deadlines come long before

_REQUIRED = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_BLOCKING_WAIT": "0",
    "TORCH_NCCL_DESYNC_DEBUG": "0",
}
"""Any other value ends the process, or waits without a deadline, when a peer fails."""
_USUAL = {
    "TORCH_NCCL_NONBLOCKING_TIMEOUT": "120",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "0",
}

_log = logging.getLogger(__name__)
_fenced: list[object] = []  # memory that a failed abort may have left in use: never given back

# Names that a build without CUDA lacks, and torch's stubs in part: see `check_torch`.
_Store: Any = getattr(dist, "Store", object)
_Nccl: Any = getattr(dist, "ProcessGroupNCCL", None)
_NCCL_NAMES = ("Options", "send", "recv", "abort", "eager_connect_single_device")

T = TypeVar("T")


def check_torch() -> None:
    """Raises `StartupError` if this torch has no NCCL groups as we need them."""
    if _Nccl is None:
        raise StartupError(f"torch {torch.__version__} lacks ProcessGroupNCCL: remove nccl from kv_transfer.links")
    missing = [f"ProcessGroupNCCL.{name}" for name in _NCCL_NAMES if not hasattr(_Nccl, name)]
    if not missing and not hasattr(getattr(_Nccl.Options(), "config", None), "blocking"):
        missing.append("ProcessGroupNCCL.Options.config.blocking")
    if missing:
        raise StartupError(f"torch {torch.__version__} lacks {', '.join(missing)}: remove nccl from kv_transfer.links")


def set_environment(environment: MutableMapping[str, str], version: tuple[int, ...]) -> None:
    """Before NCCL is first used in the process. Raises `StartupError` if the operator has set what would end it."""
    for name, value in _REQUIRED.items():
        if environment.setdefault(name, value) != value:
            raise StartupError(f"{name}={environment[name]}: links over NCCL need {value}")
    for name, value in _USUAL.items():
        environment.setdefault(name, value)
    if version >= MULTI_RANK_NCCL:
        environment.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")


def nccl_version() -> tuple[int, ...]:
    nccl: Any = torch.cuda.nccl
    version: tuple[int, ...] = nccl.version()
    return version


class Message:
    """One message under way; a `lane.Mark`."""

    def __init__(self, work: Any, lane: Lane) -> None:
        self._work = work
        self._lane = lane

    def query(self) -> bool:
        """Whether NCCL is done with its memory, well or not."""
        done: bool = self._work.is_completed()
        return done

    def finish(self) -> None:
        """After `query`: raises `TransferFailed` if it failed. What the lane is given then runs after it."""
        with translated("the message failed"), self._lane.current():
            self._work.wait()


class NcclPair:
    """This end of two, on one device. Opening blocks until the other end does the same."""

    def __init__(self, mailbox: Mailbox, rank: int, device: torch.device, device_uuid: str, deadline: Deadline) -> None:
        """Raises `TransferFailed`, or `StartupError` where the process cannot have NCCL links at all.

        The other end's device may be the same one: then `TransferFailed` if this NCCL is too old.
        """
        check_torch()
        version = nccl_version()
        set_environment(os.environ, version)
        self._peer = 1 - rank
        self._group: Any = None
        mailbox.put("device", device_uuid.encode(), deadline)
        on_one_device = mailbox.take("device", deadline).decode(errors="replace") == device_uuid
        self._caller = _Caller()
        try:
            with translated("the link could not be opened"):
                self._group = _Nccl(_MailboxStore(mailbox, deadline), rank, 2, _options(on_one_device, version))
                self._caller.call(lambda: self._group.eager_connect_single_device(device), deadline)
        except BaseException:
            self.close(None)
            raise

    def send(self, data: torch.Tensor, lane: Lane, deadline: Deadline) -> Message:
        """`data`: contiguous uint8 on the device, read after what the lane was given, until the message is done."""
        return self._post(lambda: self._group.send([data], self._peer, 0), lane, deadline)

    def recv(self, data: torch.Tensor, lane: Lane, deadline: Deadline) -> Message:
        """As `send`, but written."""
        return self._post(lambda: self._group.recv([data], self._peer, 0), lane, deadline)

    def close(self, memory: object) -> None:
        """Abort, in a thread that keeps `memory`, which messages may be using, until it has returned. Does not wait."""
        threading.Thread(target=self._abort, args=(memory,), name="nccl-abort", daemon=True).start()

    def _abort(self, memory: object) -> None:
        try:
            if self._group is not None:
                self._group.abort()
        except RuntimeError as error:
            _log.error("NCCL could not abort a link, its memory stays in use: %s", str(error).partition("\n")[0])
            _fenced.append(memory)
        finally:
            self._caller.stop()

    def _post(self, call: Callable[[], Any], lane: Lane, deadline: Deadline) -> Message:
        def post() -> Any:
            with lane.current():  # of the thread that calls
                return call()

        with translated("the message could not be sent"):
            return Message(self._caller.call(post, deadline), lane)


def _options(on_one_device: bool, version: tuple[int, ...]) -> Any:
    options = _Nccl.Options()
    options._timeout = _GROUP_TIMEOUT
    options.config.blocking = 0
    if on_one_device:
        if version < MULTI_RANK_NCCL:
            found, wanted = ".".join(map(str, version)), ".".join(map(str, MULTI_RANK_NCCL))
            raise TransferFailed(f"both ends are on one GPU: NCCL {found} cannot, {wanted} can; cuda_ipc can too")
        if hasattr(options.config, "max_ctas"):
            options.config.max_ctas = _MULTI_RANK_CTAS
    return options


class _MailboxStore(_Store):  # type: ignore[misc]
    """The key-value store that torch wants, spread over both ends: what one sets, the other can get. One use."""

    def __init__(self, mailbox: Mailbox, deadline: Deadline) -> None:
        super().__init__()
        self._mailbox = mailbox
        self._deadline = deadline
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes | str) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._values[key] = data
        self._mailbox.put(key, data, self._deadline)

    def get(self, key: str) -> bytes:
        if key not in self._values:
            self._values[key] = self._mailbox.take(key, self._deadline)
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values or self._mailbox.has(key) for key in keys)


class _Caller:
    """Makes calls one after another in a thread of its own: one that blocks costs its caller the deadline, no more."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="nccl-calls", daemon=True).start()

    def call(self, function: Callable[[], T], deadline: Deadline) -> T:
        """Its result or error. Raises `TransferFailed` at the deadline; the call itself may still be going on."""
        answer: Future[T] = Future()
        self._jobs.put((answer, function))
        try:
            return answer.result(deadline.left_s())
        except TimeoutError as error:
            raise TransferFailed("NCCL did not answer in time") from error

    def stop(self) -> None:
        """After the call in progress."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            answer, function = job
            try:
                answer.set_result(function())
            except BaseException as error:
                answer.set_exception(error)
