"""Host memory that another process of the same user on the same host can map, and how it finds it.

The memory is an anonymous file (`memfd_create`), reached through `/proc/<pid>/fd/<fd>`: it has no name that could be
left behind, and it goes when its last user does, killed or not. Its first page identifies it, so that a process that
reused the pid is never mistaken for the owner. Its size is sealed: it cannot shrink under a reader.

All pages are allocated at once. Otherwise a host short of memory would kill the worker (SIGBUS) at some later
write, and the first requests would pay the page faults. Knows nothing of blocks.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pdserve.kv_transfer.link import Bytes
from pdserve.proto.errors import StaleReference, StartupError, TransferFailed

_MAGIC = b"PDKVPOOL"
_IDENTITY = struct.Struct("<8s16sQ")  # magic, nonce, num_bytes
_OFFSET = mmap.PAGESIZE  # of the data: after the identity's page
_NAME = "pdserve-kv"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def host_id() -> str:
    """Equal for processes that can map each other's pools: same boot, pid namespace and user."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{os.getuid()}"


class SharedPool:
    """`num_bytes` of zeroed memory as a flat uint8 tensor, to be viewed as the KV cache.

    `close` withdraws the address: peers cannot map it any more. The memory itself lives as long as the tensor and
    the peers' mappings. Raises `StartupError` if the host has not that much memory.
    """

    def __init__(self, num_bytes: int) -> None:
        assert num_bytes > 0
        nonce = secrets.token_bytes(16)
        self._fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self._fd, 0, _OFFSET + num_bytes)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            # The tensor keeps the mapping alive; nobody else needs to.
            memory = mmap.mmap(self._fd, _OFFSET + num_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            os.close(self._fd)
            raise StartupError(f"cannot allocate {num_bytes} bytes of shared memory for KV: {error}") from error
        memory[: _IDENTITY.size] = _IDENTITY.pack(_MAGIC, nonce, num_bytes)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=_OFFSET)
        self.address = PoolAddress(os.getpid(), self._fd, num_bytes, nonce.hex()).text()
        self._is_open = True

    def close(self) -> None:
        """Harmless when repeated."""
        if self._is_open:
            self._is_open = False
            os.close(self._fd)


@dataclass(frozen=True, slots=True)
class PoolAddress:
    """Where a peer's pool is, as text: `<pid>:<fd>:<num_bytes>:<nonce>`."""

    pid: int
    fd: int
    num_bytes: int
    nonce: str

    def text(self) -> str:
        return f"{self.pid}:{self.fd}:{self.num_bytes}:{self.nonce}"

    @classmethod
    def parse(cls, text: str) -> PoolAddress:
        """Raises `TransferFailed` if this is no such address."""
        try:
            pid, fd, num_bytes, nonce = text.split(":")
            return cls(int(pid), int(fd), int(num_bytes), bytes.fromhex(nonce).hex())
        except ValueError as error:
            raise TransferFailed(f"not the address of a shared pool: {text!r}") from error


def map_pool(address: str) -> Bytes:
    """The bytes of a peer's pool, read-only. The mapping lives as long as the array.

    Raises `TransferFailed` if there is no such pool to be read, `StaleReference` if it is another pool than the address
    was made for (the peer has gone and its pid or descriptor serves something else).
    """
    wanted = PoolAddress.parse(address)
    path = f"/proc/{wanted.pid}/fd/{wanted.fd}"
    try:
        # Look before opening: opening some other process's pipe or device could wait or have effects.
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            raise StaleReference(f"{path} is no KV pool any more")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise TransferFailed(f"cannot open the peer's KV pool: {error}") from error
    try:
        return _map_open_file(fd, wanted)
    except OSError as error:
        raise TransferFailed(f"cannot map the peer's KV pool: {error}") from error
    finally:
        os.close(fd)


def _map_open_file(fd: int, wanted: PoolAddress) -> Bytes:
    status = os.fstat(fd)
    if status.st_uid != os.getuid() or status.st_size != _OFFSET + wanted.num_bytes:
        raise StaleReference("the peer's KV pool has another owner or size than announced")
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise StaleReference("the peer's KV pool is not sealed: it could shrink under the reader")
    memory = mmap.mmap(fd, status.st_size, mmap.MAP_SHARED, mmap.PROT_READ)
    identity = _IDENTITY.unpack(memory[: _IDENTITY.size])
    if identity != (_MAGIC, bytes.fromhex(wanted.nonce), wanted.num_bytes):
        raise StaleReference("the peer's KV pool is not the one announced")
    return np.frombuffer(memory, np.uint8, count=wanted.num_bytes, offset=_OFFSET)
