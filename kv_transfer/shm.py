"""Link on one host: the sink maps the source's pool read-only and copies straight out of it, each byte once.

One-sided: the source takes no part, its lease protects the blocks meanwhile (and the check, should the lease be lost).
Blocks are copied and checked in groups that fit in a core's cache, so that a digest reads what the copy has just
written. The mapping is made at the first transfer and kept until the link is closed; a mapped pool stays in memory even
after its owner died, so links to dead peers must be closed.
"""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.kv_transfer.link import (
    Bytes,
    Deadline,
    Landing,
    LinkEnd,
    PartCheck,
    Transfer,
    check_block_ids,
    host_rows,
)
from pdserve.kv_transfer.plan import copy_runs
from pdserve.kv_transfer.shared_pool import map_pool
from pdserve.proto.errors import LayoutMismatch, TransferFailed

GROUP_BYTES = 512 << 10
"""Of a group, or one block if that is larger. Half of a usual L2 cache: less pays Python's overhead more often, more
reads the blocks from memory again (and lets memcpy pass the caches by)."""


class ShmSink:
    """`peer_address` is the `SharedPool.address` of the source."""

    def __init__(self, peer_address: str, layout_hash: int, link_epoch: int) -> None:
        self._peer_address = peer_address
        self._end = LinkEnd(layout_hash, link_epoch)
        self._source: Bytes | None = None
        self._is_open = True

    @property
    def address(self) -> str:
        return ""

    def receive(
        self, transfer: Transfer, source_block_ids: Sequence[int], landing: Landing, check: PartCheck, timeout_s: float
    ) -> None:
        deadline = Deadline(timeout_s)
        self._end.check(transfer, landing.pool, landing.block_ids)
        source, target = self._mapped(transfer), host_rows(landing.pool)
        check_block_ids(transfer, source_block_ids, len(source))
        max_blocks = max(1, GROUP_BYTES // transfer.block_bytes)
        for first in range(0, transfer.num_blocks, max_blocks):
            deadline.left_s()
            group = slice(first, first + max_blocks)
            block_ids = landing.block_ids[group]
            for run in copy_runs(zip(source_block_ids[group], block_ids, strict=True)):
                target[run.target : run.target + run.num_blocks] = source[run.source : run.source + run.num_blocks]
            check(first, landing.pool, block_ids)

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
