"""Link inside one process: the sink copies from the source's pool to its own (which may be the same).

The baseline for what a hand-off costs without a wire, and the reference for the other links' tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pdserve.kv_transfer.link import Deadline, LinkEnd, Transfer, check_block_ids
from pdserve.kv_transfer.plan import copy_runs
from pdserve.proto.errors import TransferFailed


class LoopbackSink:
    """One-sided: there is no source object. Both pools are `[num_blocks, block_bytes]`."""

    def __init__(self, source: torch.Tensor, pool: torch.Tensor, layout_hash: int, link_epoch: int) -> None:
        self._source = LinkEnd(source, layout_hash, link_epoch)
        self._target = LinkEnd(pool, layout_hash, link_epoch)
        self._is_open = True

    @property
    def address(self) -> str:
        return ""

    def receive(
        self, transfer: Transfer, source_block_ids: Sequence[int], target_block_ids: Sequence[int], timeout_s: float
    ) -> None:
        if not self._is_open:
            raise TransferFailed(f"{transfer.id}: the link is closed")
        deadline = Deadline(timeout_s)
        self._target.check(transfer, target_block_ids)
        check_block_ids(transfer, source_block_ids, self._source.pool.shape[0])
        source, target = self._source.rows, self._target.rows
        for run in copy_runs(zip(source_block_ids, target_block_ids, strict=True)):
            deadline.left_s()
            target[run.target : run.target + run.num_blocks] = source[run.source : run.source + run.num_blocks]

    def close(self) -> None:
        self._is_open = False
