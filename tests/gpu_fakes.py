"""The seam of the GPU links without a GPU: device memory, streams and NCCL played by host memory and a socket.

`HostRuntime` stands in for the CUDA runtime: its memory can be opened by other processes, its lanes run everything at
once but call it done only when they are told so. `SocketNccl` stands in for torch's NCCL group, with NCCL's manners:
calls that block while connecting, messages that never say that the peer died, an abort that takes its time.
"""

from __future__ import annotations

import mmap
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
from link_contract import BLOCK_BYTES, LAYOUT, NUM_BLOCKS, Ends, random_pool

from pdserve.kv_transfer.cuda_ipc import CudaIpcSink
from pdserve.kv_transfer.cuda_pool import CudaPool
from pdserve.kv_transfer.digest import ON_DEVICE, Digester
from pdserve.kv_transfer.nccl import NcclSink, NcclSource
from pdserve.proto.errors import TransferFailed

CPU = torch.device("cpu")
HOST = "127.0.0.1"
MESSAGE_BYTES = 3 * BLOCK_BYTES + 1  # a transfer of all blocks takes more messages than travel at a time


class HostRuntime:
    """`slow_queries`: how often a mark is asked in vain. `is_stuck`: set, no mark is reached. `is_broken`: all fail."""

    def __init__(self, uuid: str = "host-0", slow_queries: int = 2) -> None:
        self.own_uuid = uuid
        self.slow_queries = slow_queries
        self.is_stuck = threading.Event()
        self.is_broken = threading.Event()
        self.num_open = 0
        self._exported: dict[int, int] = {}  # address in this process to file descriptor

    def allocate(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        fd = os.memfd_create("pdserve-fake-gpu", os.MFD_CLOEXEC)
        os.ftruncate(fd, num_bytes)
        memory = torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)
        self._exported[memory.data_ptr()] = fd
        return memory

    def export(self, memory: torch.Tensor) -> bytes:
        return f"/proc/{os.getpid()}/fd/{self._exported[memory.data_ptr()]}".encode()

    def open(self, handle: bytes, num_bytes: int, device: torch.device) -> HostMapping:
        try:
            with open(handle.decode(), "r+b") as file:
                memory = mmap.mmap(file.fileno(), num_bytes)
        except (OSError, ValueError) as error:
            raise TransferFailed(f"cannot open the peer's KV memory: {error}") from error
        self.num_open += 1
        return HostMapping(self, torch.frombuffer(memory, dtype=torch.uint8))

    def uuid(self, device: torch.device) -> str:
        return self.own_uuid

    def find(self, uuid: str) -> torch.device:
        if uuid != self.own_uuid:
            raise TransferFailed(f"GPU {uuid} is not visible to this process")
        return CPU

    def lane(self, device: torch.device) -> HostLane:
        return HostLane(self)

    def close(self) -> None:
        for fd in self._exported.values():
            os.close(fd)
        self._exported.clear()


class HostMapping:
    def __init__(self, runtime: HostRuntime, tensor: torch.Tensor) -> None:
        self._runtime = runtime
        self.tensor = tensor
        self._is_open = True

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._runtime.num_open -= 1


class HostLane:
    def __init__(self, runtime: HostRuntime) -> None:
        self._runtime = runtime

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    def follow(self) -> None:
        pass

    def mark(self) -> HostMark:
        return HostMark(self._runtime)

    def indices(self, block_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(block_ids)


class HostMark:
    def __init__(self, runtime: HostRuntime) -> None:
        self._runtime = runtime
        self._left = runtime.slow_queries

    def query(self) -> bool:
        if self._runtime.is_broken.is_set():
            raise RuntimeError("CUDA error: unspecified launch failure")
        self._left -= 1
        return self._left < 0 and not self._runtime.is_stuck.is_set()


class _Options:
    def __init__(self) -> None:
        self._timeout = timedelta(0)
        self.config = SimpleNamespace(blocking=1, max_ctas=0)


class SocketNccl:
    """As `ProcessGroupNCCL`, over host memory. Classes made by `manners` can be held up."""

    Options = _Options
    connect_gate: threading.Event | None = None  # connecting waits for it
    abort_gate: threading.Event | None = None  # aborting waits for it
    abort_error: str = ""
    opened: list[SocketNccl]

    def __init__(self, store: Any, rank: int, size: int, options: _Options) -> None:
        assert size == 2
        assert options.config.blocking == 0
        assert options._timeout > timedelta(0)
        self.options = options
        self.is_aborted = False
        self._store = store
        self._rank = rank
        self._socket: socket.socket | None = None
        self._kernels: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.opened.append(self)

    def eager_connect_single_device(self, device: torch.device) -> None:
        if self.connect_gate is not None:
            self.connect_gate.wait(60)
        if self._rank == 0:
            with socket.create_server((HOST, 0)) as server:
                self._store.set("0", str(server.getsockname()[1]))
                server.settimeout(20)
                self._socket = server.accept()[0]
        else:
            self._socket = socket.create_connection((HOST, int(self._store.get("0"))))
        self._socket.settimeout(None)
        threading.Thread(target=self._run, daemon=True).start()

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> _Work:
        return self._launch(peer, lambda: self._connection.sendall(tensors[0].numpy().data))

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> _Work:
        def fill() -> None:
            left = tensors[0].numpy().data.cast("B")
            while len(left):
                num_bytes = self._connection.recv_into(left)
                if not num_bytes:
                    raise OSError("the peer is gone")
                left = left[num_bytes:]

        return self._launch(peer, fill)

    def abort(self) -> None:
        self.is_aborted = True
        if self.abort_gate is not None:
            self.abort_gate.wait(60)
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._kernels.put(None)
        if self.abort_error:
            raise RuntimeError(self.abort_error)

    @property
    def _connection(self) -> socket.socket:
        assert self._socket is not None
        return self._socket

    def _launch(self, peer: int, kernel: Callable[[], None]) -> _Work:
        assert peer == 1 - self._rank
        work = _Work(self)

        def run() -> None:
            kernel()
            work.is_done = True

        self._kernels.put(run)
        return work

    def _run(self) -> None:
        """Kernels one after the other. A dead peer is no news to them: they spin until somebody aborts them."""
        with self._connection:
            while (kernel := self._kernels.get()) is not None:
                with suppress(OSError):
                    kernel()


def manners(**attributes: Any) -> type[SocketNccl]:
    """A class of its own, so that tests do not see each other's groups."""
    return type("SocketNccl", (SocketNccl,), {"opened": [], **attributes})


class _Work:
    """NCCL's work: it is over when its kernel is, aborted ones too; `is_success` is there and of no use."""

    def __init__(self, group: SocketNccl) -> None:
        self._group = group
        self.is_done = False

    def is_completed(self) -> bool:
        return self.is_done or self._group.is_aborted

    def is_success(self) -> bool:
        raise NotImplementedError("WorkNCCL::isSuccess() is deprecated")

    def wait(self) -> bool:
        assert self.is_completed()
        return True


# Both ends of each kind in this process, for the contract's cases.


def open_cuda_ipc(link_epoch: int = 1) -> Ends:
    runtime = HostRuntime()
    pool = CudaPool(NUM_BLOCKS * BLOCK_BYTES, CPU, runtime)
    rows = pool.tensor.view(NUM_BLOCKS, BLOCK_BYTES)
    rows.copy_(random_pool(1))

    def release() -> None:
        pool.close()
        runtime.close()

    sink = CudaIpcSink(pool.address, LAYOUT, link_epoch, runtime)
    return Ends(rows, random_pool(1000), sink, None, Digester(ON_DEVICE), release)


def open_nccl(link_epoch: int = 1) -> Ends:
    """The test has put a class of `manners` in the place of torch's."""
    source_pool = random_pool(1)
    sink = NcclSink(LAYOUT, link_epoch, HOST, MESSAGE_BYTES, HostRuntime("gpu-0"))

    def source(layout_hash: int, link_epoch: int) -> NcclSource:
        limit = MESSAGE_BYTES + BLOCK_BYTES  # the two ends need not agree
        return NcclSource(sink.address, source_pool, layout_hash, link_epoch, limit, HostRuntime("gpu-1"))

    ends = Ends(source_pool, random_pool(1000), sink, source(LAYOUT, link_epoch), Digester(ON_DEVICE))
    ends.another_source = source
    return ends
