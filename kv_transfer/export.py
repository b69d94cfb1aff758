"""What a worker shows to its peers: the memory from which its KV blocks are read, and the layout of their bytes.

Usually the pool itself. Where KV travels in int8 but is kept in a wider dtype, a second memory of the same block ids:
`prepare` fills it when blocks become final, before anybody is told of them. Knows nothing of leases or links.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from pdserve.kv_transfer.codec import convert
from pdserve.proto.types import KVLayout


class Export:
    """`blocks` is uint8 `[num_blocks, block_bytes]` of `layout`: the pool. `settle` waits for writes to it."""

    def __init__(self, blocks: torch.Tensor, layout: KVLayout, settle: Callable[[], None]) -> None:
        assert blocks.shape[1] == layout.block_bytes
        self.blocks = blocks
        self.layout = layout
        self._settle = settle
        self.is_ready = blocks.device.type == "cpu"
        """Whether `prepare` has nothing to do."""

    def prepare(self, block_ids: Sequence[int]) -> None:
        """These blocks are final in the pool: make them so here. Raises `TransferFailed`."""
        self._settle()


class QuantisedExport(Export):
    """Shows `pool`, of `pool_layout`, in int8: `blocks` is memory for as many int8 blocks."""

    def __init__(
        self, blocks: torch.Tensor, pool: torch.Tensor, pool_layout: KVLayout, settle: Callable[[], None]
    ) -> None:
        super().__init__(blocks, quantised(pool_layout), settle)
        assert len(blocks) == len(pool)
        self.is_ready = False
        self._pool = pool
        self._pool_layout = pool_layout

    def prepare(self, block_ids: Sequence[int]) -> None:
        rows = self._pool[torch.as_tensor(block_ids)]  # uint8 [len(block_ids), pool block_bytes]
        num_tokens = len(block_ids) * self.layout.block_size
        convert(rows, self._pool_layout, 0, num_tokens, self.blocks, block_ids, self.layout)
        self._settle()


def quantised(layout: KVLayout) -> KVLayout:
    """The same blocks in int8."""
    return replace(layout, dtype="int8")
