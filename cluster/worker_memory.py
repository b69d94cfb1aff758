"""The memory that a worker keeps its KV in, and the links that reach it: host memory, or a GPU's.

Which kinds of link a worker has follows from where its KV is: `shm` and `gloo` move host memory, `cuda_ipc` and `nccl`
move device memory. Knows nothing of blocks, leases or peers. The device side has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from pdserve.kv_transfer.config import KVTransferConfig
from pdserve.kv_transfer.cuda_ipc import CudaIpcSink
from pdserve.kv_transfer.cuda_pool import CudaPool
from pdserve.kv_transfer.cuda_runtime import Runtime
from pdserve.kv_transfer.digest import KEYED, ON_DEVICE, Digester
from pdserve.kv_transfer.gloo import GlooSink, GlooSource
from pdserve.kv_transfer.link import LinkSink, LinkSource
from pdserve.kv_transfer.nccl import NcclSink, NcclSource
from pdserve.kv_transfer.shared_pool import SharedPool
from pdserve.kv_transfer.shm import ShmSink
from pdserve.proto.errors import ConfigError, TransferFailed


class WorkerMemory(Protocol):
    """Owner of what was allocated. Peers reach the memory that was allocated last."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Zeroed, flat uint8, readable by peers. Raises `StartupError`."""

    def addresses(self) -> Mapping[str, str]:
        """What a ticket says about reaching it, by kind of link, in order of preference."""

    def digester(self) -> Digester:
        """By the algorithm that vouches for blocks in this memory."""

    def settle(self) -> None:
        """Return when everything that was computed into it is there for peers to read. Raises `TransferFailed`."""

    def open_sink(self, kind: str, peer_address: str, layout_hash: int, link_epoch: int) -> LinkSink:
        """The receiving end of a link; `peer_address` is what the source's ticket says for this kind."""

    def open_source(
        self, kind: str, address: str, blocks: torch.Tensor, layout_hash: int, link_epoch: int
    ) -> LinkSource:
        """The sending end of a link to the sink at `address`. Raises `TransferFailed` for a kind without one."""

    def close(self) -> None:
        """Withdraw every address."""


class HostMemory:
    """Shared memory of this host."""

    def __init__(self, config: KVTransferConfig) -> None:
        self._config = config
        self._pools: list[SharedPool] = []

    def allocate(self, num_bytes: int) -> torch.Tensor:
        self._pools.append(SharedPool(num_bytes))
        return self._pools[-1].tensor

    def addresses(self) -> Mapping[str, str]:
        known = {"shm": self._pools[-1].address, "gloo": self._config.host}
        return {kind: known[kind] for kind in self._config.links if kind in known}

    def digester(self) -> Digester:
        key = self._config.digest_key_bytes
        return Digester(KEYED if key else "xxh3", key)

    def settle(self) -> None:
        """A processor's writes are there when the step that made them has returned."""

    def open_sink(self, kind: str, peer_address: str, layout_hash: int, link_epoch: int) -> LinkSink:
        if kind == "shm":
            return ShmSink(peer_address, layout_hash, link_epoch)
        assert kind == "gloo"
        return GlooSink(layout_hash, link_epoch, self._config.host, self._config.max_message_bytes)

    def open_source(
        self, kind: str, address: str, blocks: torch.Tensor, layout_hash: int, link_epoch: int
    ) -> LinkSource:
        if kind != "gloo":
            raise TransferFailed(f"cannot send over {kind!r} from host memory")
        limit = self._config.max_message_bytes
        return GlooSource(address, blocks, layout_hash, link_epoch, self._config.host, limit)

    def close(self) -> None:
        for pool in self._pools:
            pool.close()


class DeviceMemory:
    """Memory of one CUDA device. Raises `ConfigError` for what needs host memory."""

    def __init__(self, config: KVTransferConfig, device: torch.device, runtime: Runtime) -> None:
        if config.digest_key:
            raise ConfigError("kv_transfer.digest_key: keyed digests are computed in host memory, KV is on a GPU")
        self._config = config
        self._device = device
        self._runtime = runtime
        self._pools: list[CudaPool] = []

    def allocate(self, num_bytes: int) -> torch.Tensor:
        self._pools.append(CudaPool(num_bytes, self._device, self._runtime))
        return self._pools[-1].tensor

    def addresses(self) -> Mapping[str, str]:
        known = {"cuda_ipc": self._pools[-1].address, "nccl": self._config.host}
        return {kind: known[kind] for kind in self._config.links if kind in known}

    def digester(self) -> Digester:
        return Digester(ON_DEVICE)

    def settle(self) -> None:
        self._pools[-1].settle(self._config.transfer_timeout_s)

    def open_sink(self, kind: str, peer_address: str, layout_hash: int, link_epoch: int) -> LinkSink:
        if kind == "cuda_ipc":
            return CudaIpcSink(peer_address, layout_hash, link_epoch, self._runtime)
        assert kind == "nccl"
        limit = self._config.max_message_bytes
        return NcclSink(layout_hash, link_epoch, self._config.host, limit, self._runtime)

    def open_source(
        self, kind: str, address: str, blocks: torch.Tensor, layout_hash: int, link_epoch: int
    ) -> LinkSource:
        if kind != "nccl":
            raise TransferFailed(f"cannot send over {kind!r} from device memory")
        limit = self._config.max_message_bytes
        return NcclSource(address, blocks, layout_hash, link_epoch, limit, self._runtime)

    def close(self) -> None:
        for pool in self._pools:
            pool.close()
