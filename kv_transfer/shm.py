"""Link on one host: the sink maps the source's pool read-only and copies straight out of it, each byte once.

One-sided: the source takes no part, its lease protects the blocks meanwhile (and the digest, should the lease be
lost). The mapping is made at the first transfer and kept until the link is closed; a mapped pool stays in memory even
after its owner died, so links to dead peers must be closed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pdserve.kv_transfer.link import Bytes, Deadline, LinkEnd, Transfer, check_block_ids
from pdserve.kv_transfer.plan import copy_runs
from pdserve.kv_transfer.shared_pool import map_pool
from pdserve.proto.errors import LayoutMismatch, TransferFailed

MAX_RUN_BYTES = 64 << 20
"""Longest copy between two looks at the deadline: some tens of milliseconds."""


class ShmSink:
    """`peer_address` is the `SharedPool.address` of the source. `pool` is `[num_blocks, block_bytes]`."""

    def __init__(self, peer_address: str, pool: torch.Tensor, layout_hash: int, link_epoch: int) -> None:
        self._peer_address = peer_address
        self._end = LinkEnd(pool, layout_hash, link_epoch)
        self._source: Bytes | None = None
        self._is_open = True

    @property
    def address(self) -> str:
        return ""

    def receive(
        self, transfer: Transfer, source_block_ids: Sequence[int], target_block_ids: Sequence[int], timeout_s: float
    ) -> None:
        deadline = Deadline(timeout_s)
        self._end.check(transfer, target_block_ids)
        source, target = self._mapped(transfer), self._end.rows
        check_block_ids(transfer, source_block_ids, source.shape[0])
        max_blocks = max(1, MAX_RUN_BYTES // transfer.block_bytes)
        for run in copy_runs(zip(source_block_ids, target_block_ids, strict=True)):
            for first in range(0, run.num_blocks, max_blocks):
                deadline.left_s()
                last = min(first + max_blocks, run.num_blocks)
                target[run.target + first : run.target + last] = source[run.source + first : run.source + last]

    def close(self) -> None:
        self._is_open = False
        self._source = None

    def _mapped(self, transfer: Transfer) -> Bytes:
        """The source's blocks, `[num_blocks, block_bytes]`."""
        if not self._is_open:
            raise TransferFailed(f"{transfer.id}: the link is closed")
        if self._source is None:
            memory = map_pool(self._peer_address)
            if memory.size % transfer.block_bytes:
                raise LayoutMismatch(f"{transfer.id}: the peer's pool is no multiple of {transfer.block_bytes} bytes")
            self._source = memory.reshape(-1, transfer.block_bytes)
        return self._source
