"""Copy blocks between two pools of device memory: few launches, each byte read and written once where that can be.

Long runs are plain copies. Many short ones would cost a launch each (about 5 microseconds, in which the device copies
about 10 MB), so they are gathered and scattered by index: in one pass if either side is one run, else through a
temporary of bounded size. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from pdserve.kv_transfer.lane import Lane
from pdserve.kv_transfer.plan import copy_runs

LONG_RUN_BYTES = 8 << 20
"""Runs of at least this many bytes on average are worth a launch each."""
MAX_GATHER_BYTES = 64 << 20
"""Largest temporary of a copy that is scattered on both sides."""


def copy_blocks(
    lane: Lane,
    source: torch.Tensor,
    source_block_ids: Sequence[int],
    target: torch.Tensor,
    target_block_ids: Sequence[int],
) -> None:
    """Give the lane, which must be current, the copy of rows of `source` to rows of `target`.

    Both are uint8 `[num_rows, block_bytes]`. On two devices each run is a copy, peer to peer where the devices can.
    """
    block_bytes = source.shape[1]
    runs = copy_runs(zip(source_block_ids, target_block_ids, strict=True))
    if source.device != target.device or len(source_block_ids) * block_bytes >= len(runs) * LONG_RUN_BYTES:
        for run in runs:
            rows = target[run.target : run.target + run.num_blocks]
            rows.copy_(source[run.source : run.source + run.num_blocks], non_blocking=True)
        return
    for part in slices(len(source_block_ids), max(1, MAX_GATHER_BYTES // block_bytes)):
        _gather(lane, _wide(source), source_block_ids[part], _wide(target), target_block_ids[part])


def slices(num_blocks: int, max_blocks: int) -> Iterator[slice]:
    """0..num_blocks in parts of at most `max_blocks`."""
    for first in range(0, num_blocks, max_blocks):
        yield slice(first, min(first + max_blocks, num_blocks))


def _gather(
    lane: Lane,
    source: torch.Tensor,
    source_block_ids: Sequence[int],
    target: torch.Tensor,
    target_block_ids: Sequence[int],
) -> None:
    first = target_block_ids[0]
    if list(target_block_ids) == list(range(first, first + len(target_block_ids))):
        rows = target[first : first + len(target_block_ids)]
        torch.index_select(source, 0, lane.indices(source_block_ids), out=rows)
        return
    first = source_block_ids[0]
    if list(source_block_ids) == list(range(first, first + len(source_block_ids))):
        rows = source[first : first + len(source_block_ids)]
    else:
        rows = source.index_select(0, lane.indices(source_block_ids))
    target.index_copy_(0, lane.indices(target_block_ids), rows)


def _wide(pool: torch.Tensor) -> torch.Tensor:
    """The same rows in 8-byte elements where they divide: kernels by index move an element per thread."""
    if pool.shape[1] % 8 or pool.data_ptr() % 8 or pool.storage_offset() % 8:
        return pool
    return pool.view(torch.int64)
