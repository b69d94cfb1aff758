"""Link between two processes on one host whose KV is in GPU memory: the sink opens the source's pool and copies out.

One-sided, as `shm` is: the source takes no part, its lease protects the blocks meanwhile (and the digest, should the
lease be lost). It must have seen its blocks written before it offers them (`CudaPool.settle`). Bytes move on the
device, on a stream of the link's own, each read and written once; on two GPUs from one to the other, directly where
they can.

A copy and the check of the one before it are under way together. When `receive` ends, however it ends, the stream is
empty: nothing is written any more. A peer that dies leaves its memory mapped here until the link is closed, and what it
held then; digests decide what that is worth. Not run on a GPU yet.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from pdserve.kv_transfer.cuda_pool import CudaAddress, MappedPool
from pdserve.kv_transfer.cuda_runtime import Runtime
from pdserve.kv_transfer.device_copy import copy_blocks, slices
from pdserve.kv_transfer.lane import Lane, Mark, fence, translated, wait
from pdserve.kv_transfer.link import Deadline, Landing, LinkEnd, PartCheck, Transfer, check_block_ids
from pdserve.proto.errors import LayoutMismatch, TransferFailed

WAVE_BYTES = 512 << 20
"""Copied between two looks at the deadline; long enough (0.2 ms) to hide what the host does for the next."""


class CudaIpcSink:
    """`peer_address` is the `CudaPool.address` of the source."""

    def __init__(self, peer_address: str, layout_hash: int, link_epoch: int, runtime: Runtime) -> None:
        self._peer_address = peer_address
        self._end = LinkEnd(layout_hash, link_epoch)
        self._runtime = runtime
        self._in_use = threading.Lock()
        self._is_open = True
        self._pool: MappedPool | None = None
        self._lane: Lane | None = None

    @property
    def address(self) -> str:
        return ""

    def receive(
        self, transfer: Transfer, source_block_ids: Sequence[int], landing: Landing, check: PartCheck, timeout_s: float
    ) -> None:
        deadline = Deadline(timeout_s)
        self._end.check(transfer, landing.pool, landing.block_ids)
        try:
            with self._in_use:
                self._receive(transfer, source_block_ids, landing, check, deadline)
        finally:
            if not self._is_open:  # closed meanwhile, when the memory was in use
                self._let_go()

    def close(self) -> None:
        self._is_open = False
        self._let_go()

    def _receive(
        self,
        transfer: Transfer,
        source_block_ids: Sequence[int],
        landing: Landing,
        check: PartCheck,
        deadline: Deadline,
    ) -> None:
        self._look()
        lane = self._lane = self._lane or self._runtime.lane(landing.pool.device)
        try:
            with translated(f"{transfer.id}: the copy failed"), lane.current():
                self._copy(lane, transfer, source_block_ids, landing, check, deadline)
        finally:
            fence(lane)

    def _copy(
        self,
        lane: Lane,
        transfer: Transfer,
        source_block_ids: Sequence[int],
        landing: Landing,
        check: PartCheck,
        deadline: Deadline,
    ) -> None:
        pool, source = self._opened(transfer)
        check_block_ids(transfer, source_block_ids, source.shape[0])
        lane.follow()  # the landing's rows may have been cleared or read just now
        under_way: tuple[slice, Mark] | None = None
        for wave in slices(transfer.num_blocks, max(1, WAVE_BYTES // transfer.block_bytes)):
            copy_blocks(lane, source, source_block_ids[wave], landing.pool, landing.block_ids[wave])
            copied = lane.mark()
            if under_way is not None:
                self._verify(*under_way, landing, check, deadline)
            under_way = wave, copied
        if under_way is not None:
            self._verify(*under_way, landing, check, deadline)
        pool.check()

    def _verify(self, wave: slice, copied: Mark, landing: Landing, check: PartCheck, deadline: Deadline) -> None:
        self._look()
        deadline.left_s()
        wait(copied, deadline, self._look)
        check(wave.start, landing.pool, landing.block_ids[wave])

    def _look(self) -> None:
        if not self._is_open:
            raise TransferFailed("the link is closed")

    def _opened(self, transfer: Transfer) -> tuple[MappedPool, torch.Tensor]:
        """The peer's pool, and its blocks: `[num_blocks, block_bytes]`."""
        if self._pool is None:
            pool = MappedPool(CudaAddress.parse(self._peer_address), self._runtime)
            try:
                pool.check()
            except BaseException:
                pool.close()
                raise
            self._pool = pool
        if self._pool.data.numel() % transfer.block_bytes:
            raise LayoutMismatch(f"{transfer.id}: the peer's pool is no multiple of {transfer.block_bytes} bytes")
        return self._pool, self._pool.data.view(-1, transfer.block_bytes)

    def _let_go(self) -> None:
        """Unmap the peer's pool, unless a transfer is using it: then that does, when it is done."""
        if self._in_use.acquire(blocking=False):
            try:
                pool, self._pool = self._pool, None
                if pool is not None:
                    pool.close()
            finally:
                self._in_use.release()
