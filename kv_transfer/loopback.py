"""Link inside one process: the sink copies from the source's pool to the landing (which may be in the same pool).

The baseline for what a hand-off costs without a wire, and the reference for the other links' tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pdserve.kv_transfer.link import Deadline, Landing, LinkEnd, PartCheck, Transfer, check_block_ids, host_rows
from pdserve.kv_transfer.plan import copy_runs
from pdserve.proto.errors import TransferFailed


class LoopbackSink:
    """One-sided: there is no source object. `source_pool` is `[num_rows, block_bytes]`."""

    def __init__(self, source_pool: torch.Tensor, layout_hash: int, link_epoch: int) -> None:
        self._source = host_rows(source_pool)
        self._end = LinkEnd(layout_hash, link_epoch)
        self._is_open = True

    @property
    def address(self) -> str:
        return ""

    def receive(
        self, transfer: Transfer, source_block_ids: Sequence[int], landing: Landing, check: PartCheck, timeout_s: float
    ) -> None:
        if not self._is_open:
            raise TransferFailed(f"{transfer.id}: the link is closed")
        deadline = Deadline(timeout_s)
        self._end.check(transfer, landing.pool, landing.block_ids)
        check_block_ids(transfer, source_block_ids, len(self._source))
        target = host_rows(landing.pool)
        first = 0
        for run in copy_runs(zip(source_block_ids, landing.block_ids, strict=True)):
            deadline.left_s()
            target[run.target : run.target + run.num_blocks] = self._source[run.source : run.source + run.num_blocks]
            check(first, landing.pool, range(run.target, run.target + run.num_blocks))
            first += run.num_blocks

    def close(self) -> None:
        self._is_open = False
