"""The CUDA calls that torch does not offer in public, and its streams as lanes. Not run on a GPU yet.

Torch can share a storage between processes (`UntypedStorage._share_cuda_`, `torch.multiprocessing.reductions`), but
made for tensors that are sent once: private eight-tuples, a reference counter for exactly one receiver in a file of
the sender's, and a receiver that synchronises a stream without a deadline when it lets go. The CUDA runtime's own three
calls have been the same since CUDA 4: a handle of 64 bytes, opened and closed by whoever holds it, as often as they
like. They want memory from `cudaMalloc` itself, which a pool made once can have.

The library is the very file that torch has loaded, so that both agree on the current device; torch sees the memory
through `__cuda_array_interface__`, which is public. Knows nothing of pools or links.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from pdserve.kv_transfer.lane import Lane, Mark
from pdserve.proto.errors import StartupError, TransferFailed

HANDLE_BYTES = 64
_cuda: Any = torch.cuda  # torch types only part of it
_LAZY_ENABLE_PEER_ACCESS = 1


class Mapping(Protocol):
    """Memory of another process, mapped here."""

    tensor: torch.Tensor
    """Flat uint8. Not to be touched after `close`."""

    def close(self) -> None:
        """Unmap it. Nothing may be using it. Harmless when repeated."""


class Runtime(Protocol):
    """What pools and links need of a device. `CudaRuntime`, or a test's host memory."""

    def allocate(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Flat uint8 that can be exported, freed with the last tensor on it. Raises `StartupError`."""

    def export(self, memory: torch.Tensor) -> bytes:
        """A handle of `allocate`d memory for other processes. Raises `StartupError`."""

    def open(self, handle: bytes, num_bytes: int, device: torch.device) -> Mapping:
        """Memory that another process exported from `device`. Raises `TransferFailed`."""

    def uuid(self, device: torch.device) -> str:
        """The same for every process that sees this device."""

    def find(self, uuid: str) -> torch.device:
        """The device of that name. Raises `TransferFailed` if this process cannot see it."""

    def lane(self, device: torch.device) -> Lane:
        """A new lane."""


@functools.cache
def cuda_runtime() -> CudaRuntime:
    """The one of this process. Raises `StartupError` if it has none."""
    return CudaRuntime()


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


class _Memory:
    """A piece of device memory as torch takes it in; torch keeps this object as long as the tensor."""

    def __init__(self, pointer: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "strides": None,
            "version": 3,
        }


class CudaRuntime:
    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise StartupError("this torch sees no CUDA device: remove cuda_ipc and nccl from kv_transfer.links")
        _cuda.init()
        self._library = ctypes.CDLL(_loaded_library())
        pointer = ctypes.c_void_p
        for name, arguments in {
            "cudaMalloc": [ctypes.POINTER(pointer), ctypes.c_size_t],
            "cudaFree": [pointer],
            "cudaIpcGetMemHandle": [ctypes.POINTER(_Handle), pointer],
            "cudaIpcOpenMemHandle": [ctypes.POINTER(pointer), _Handle, ctypes.c_uint],
            "cudaIpcCloseMemHandle": [pointer],
            "cudaGetErrorString": [ctypes.c_int],
            "cudaGetLastError": [],
        }.items():
            function = getattr(self._library, name)
            function.argtypes = arguments
            function.restype = ctypes.c_char_p if name == "cudaGetErrorString" else ctypes.c_int

    def allocate(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        pointer = ctypes.c_void_p()
        with torch.cuda.device(device):
            problem = self._call("cudaMalloc", ctypes.byref(pointer), num_bytes)
        if problem or not pointer.value:
            raise StartupError(f"cannot allocate {num_bytes} bytes on {device} for KV: {problem}")
        memory = _Memory(pointer.value, num_bytes)
        # Not at exit: the driver frees everything then, and CUDA may be gone already.
        weakref.finalize(memory, self._call, "cudaFree", pointer).atexit = False
        return _tensor(memory, device)

    def export(self, memory: torch.Tensor) -> bytes:
        handle = _Handle()
        with torch.cuda.device(memory.device):
            problem = self._call("cudaIpcGetMemHandle", ctypes.byref(handle), memory.data_ptr())
        if problem:
            raise StartupError(f"cannot share KV memory of {memory.device}: {problem}: remove cuda_ipc from links")
        return bytes(handle)

    def open(self, handle: bytes, num_bytes: int, device: torch.device) -> Mapping:
        if len(handle) != HANDLE_BYTES:
            raise TransferFailed(f"a CUDA memory handle has {HANDLE_BYTES} bytes, not {len(handle)}")
        pointer = ctypes.c_void_p()
        with torch.cuda.device(device):
            given = _Handle.from_buffer_copy(handle)
            problem = self._call("cudaIpcOpenMemHandle", ctypes.byref(pointer), given, _LAZY_ENABLE_PEER_ACCESS)
        if problem or not pointer.value:
            raise TransferFailed(f"cannot open the peer's KV memory on {device}: {problem}")
        return _CudaMapping(self, pointer.value, num_bytes, device)

    def uuid(self, device: torch.device) -> str:
        return str(torch.cuda.get_device_properties(device).uuid)

    def find(self, uuid: str) -> torch.device:
        for index in range(torch.cuda.device_count()):
            device = torch.device("cuda", index)
            if self.uuid(device) == uuid:
                return device
        raise TransferFailed(f"GPU {uuid} is not visible to this process (CUDA_VISIBLE_DEVICES)")

    def lane(self, device: torch.device) -> Lane:
        return CudaLane(device)

    def unmap(self, pointer: int, device: torch.device) -> None:
        with torch.cuda.device(device):
            self._call("cudaIpcCloseMemHandle", pointer)

    def _call(self, name: str, *arguments: Any) -> str:
        """What went wrong, "" for nothing."""
        status: int = getattr(self._library, name)(*arguments)
        if status == 0:
            return ""
        self._library.cudaGetLastError()  # or torch would find it after its next kernel, and blame that
        text: bytes = self._library.cudaGetErrorString(status)
        return f"{name}: {text.decode(errors='replace')} ({status})"


class _CudaMapping:
    def __init__(self, runtime: CudaRuntime, pointer: int, num_bytes: int, device: torch.device) -> None:
        self._runtime = runtime
        self._pointer = pointer
        self._device = device
        self._is_open = True
        self.tensor = _tensor(_Memory(pointer, num_bytes), device)

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._runtime.unmap(self._pointer, self._device)


class CudaLane:
    """A stream of its own, so that a hand-off neither waits for the engine's next step nor holds it up."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _cuda.Stream(device)

    @contextmanager
    def current(self) -> Iterator[None]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.default_stream(self._device))

    def mark(self) -> Mark:
        mark: Mark = _cuda.Event()
        self._stream.record_event(mark)
        return mark

    def indices(self, block_ids: Sequence[int]) -> torch.Tensor:
        # From pageable memory the copy would wait for the stream.
        host = torch.tensor(block_ids, dtype=torch.int64, pin_memory=True)
        return host.to(self._device, non_blocking=True)


def _tensor(memory: _Memory, device: torch.device) -> torch.Tensor:
    with torch.cuda.device(device):
        return torch.as_tensor(memory, device=device)


def _loaded_library() -> str:
    """The CUDA runtime that torch brought into this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.partition("/")[1] + line.partition("/")[2]
        if Path(path).name.startswith("libcudart.so"):
            return path
    raise StartupError("torch has loaded no libcudart.so: remove cuda_ipc from kv_transfer.links")
