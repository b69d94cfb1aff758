"""Device memory for KV that other processes on the host can open, and how they find it. Not run on a GPU yet.

The counterpart of `shared_pool` on a GPU. The memory begins with an identity, so that an address never leads to
another pool than it was made for: CUDA reuses addresses and handles. `close` wipes it, so that peers that have the pool
open notice. Knows nothing of blocks.
"""

from __future__ import annotations

import secrets
import struct
from contextlib import suppress
from dataclasses import dataclass

import torch

from pdserve.kv_transfer.cuda_runtime import Mapping, Runtime
from pdserve.kv_transfer.lane import translated, wait
from pdserve.kv_transfer.link import Deadline
from pdserve.proto.errors import StaleReference, TransferFailed

_MAGIC = b"PDKVCUDA"
_IDENTITY = struct.Struct("<8s16sQ")  # magic, nonce, num_bytes of data
_OFFSET = 512  # of the data, as aligned as what cudaMalloc returns
_OPEN_S = 60.0
_CLOSE_S = 2.0


class CudaPool:
    """`num_bytes` of zeroed memory of `device` as a flat uint8 tensor, to be viewed as the KV cache.

    `close` withdraws the address. The memory itself lives as long as the tensor; peers that still map it then read
    what CUDA calls undefined, notice that the identity is gone, and refuse what they read. Raises `StartupError` if
    the device has not that much memory or cannot share it.
    """

    def __init__(self, num_bytes: int, device: torch.device, runtime: Runtime) -> None:
        assert num_bytes > 0
        self._memory = runtime.allocate(_OFFSET + num_bytes, device).zero_()
        self._lane = runtime.lane(device)
        nonce = secrets.token_bytes(16)
        identity = torch.frombuffer(bytearray(_IDENTITY.pack(_MAGIC, nonce, num_bytes)), dtype=torch.uint8)
        self._memory[: identity.numel()].copy_(identity)
        handle = runtime.export(self._memory)
        self.tensor = self._memory[_OFFSET:]
        self.address = CudaAddress(runtime.uuid(device), handle, _OFFSET, num_bytes, nonce).text()
        self._is_open = True
        self.settle(_OPEN_S)

    def settle(self, timeout_s: float) -> None:
        """Return once all that the device's default stream has been given is done: blocks written before are there.

        The source calls it before it offers a part, from any thread, after the step that computed the part's last
        block. A digest of those blocks that has reached the host proves the same, if it was computed on the default
        stream. Raises `TransferFailed` if that takes longer.
        """
        with translated("the device failed"):
            self._lane.follow()
            mark = self._lane.mark()
        wait(mark, Deadline(timeout_s))

    def close(self) -> None:
        """Harmless when repeated."""
        if not self._is_open:
            return
        self._is_open = False
        # A device that fails here has no pool that anybody could read.
        with suppress(TransferFailed), translated("the pool could not be wiped"):
            with self._lane.current():
                self._memory[: _IDENTITY.size].zero_()
            wait(self._lane.mark(), Deadline(_CLOSE_S))


@dataclass(frozen=True, slots=True)
class CudaAddress:
    """Where a peer's pool is, as text: `<device uuid>:<handle>:<offset>:<num_bytes>:<nonce>`, bytes in hexadecimal."""

    device_uuid: str
    handle: bytes
    offset: int
    num_bytes: int
    nonce: bytes

    def text(self) -> str:
        return f"{self.device_uuid}:{self.handle.hex()}:{self.offset}:{self.num_bytes}:{self.nonce.hex()}"

    @classmethod
    def parse(cls, text: str) -> CudaAddress:
        """Raises `TransferFailed` if this is no such address."""
        try:
            device_uuid, handle, offset, num_bytes, nonce = text.split(":")
            address = cls(device_uuid, bytes.fromhex(handle), int(offset), int(num_bytes), bytes.fromhex(nonce))
        except ValueError as error:
            raise TransferFailed(f"not the address of a CUDA pool: {text[:80]!r}") from error
        if address.offset != _OFFSET or address.num_bytes <= 0 or len(address.nonce) != 16:
            raise TransferFailed(f"not the address of a CUDA pool: {text[:80]!r}")
        return address


class MappedPool:
    """A peer's pool in this process. `data` is its bytes, flat uint8, to be read only."""

    def __init__(self, address: CudaAddress, runtime: Runtime) -> None:
        """Raises `TransferFailed` if it cannot be opened. `check` before trusting it."""
        device = runtime.find(address.device_uuid)
        self._wanted = _IDENTITY.pack(_MAGIC, address.nonce, address.num_bytes)
        self._mapping: Mapping = runtime.open(address.handle, address.offset + address.num_bytes, device)
        self.data = self._mapping.tensor[address.offset :]

    def check(self) -> None:
        """Raises `StaleReference` unless this is still the pool of the address: not closed, not another in its place.

        Waits for what the current stream was given. Checked after a copy, it vouches for what was copied.
        """
        identity = self._mapping.tensor[: _IDENTITY.size].cpu().numpy().tobytes()
        if identity != self._wanted:
            raise StaleReference("the peer's KV pool is not the one announced, or not any more")

    def close(self) -> None:
        """Nothing may be reading it any more."""
        self._mapping.close()
