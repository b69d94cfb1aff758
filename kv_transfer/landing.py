"""Where a part's blocks land on the decode worker: straight in its pool, or in staging memory on the way to it.

Straight where both workers keep KV alike; then the link's copy is the only one. Where block size or dtype differ the
bytes land in staging, are verified there as they were sent, and only then converted into the pool. Staging is made for
each part and dropped after it: nothing of the wire outlives the transfer. Knows nothing of links or digests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from pdserve.kv_transfer.codec import convert
from pdserve.kv_transfer.link import Landing
from pdserve.proto.kv_blocks import elements, scales
from pdserve.proto.types import KVLayout, KVTicket


class Landings:
    """`blocks` is this worker's pool, uint8 `[num_blocks, block_bytes]` of `layout`."""

    def __init__(self, blocks: torch.Tensor, layout: KVLayout) -> None:
        self._blocks = blocks
        self._layout = layout

    @contextmanager
    def open(self, ticket: KVTicket, first: int, num_blocks: int, block_ids: Sequence[int]) -> Iterator[Landing]:
        """Where the source's blocks `first..first+num_blocks-1` of a hand-off go; verified when the block ends well.

        `block_ids` are ours for the whole hand-off.
        """
        if ticket.layout == self._layout:
            yield Landing(self._blocks, tuple(block_ids[first : first + num_blocks]))
            return
        staging = torch.empty((num_blocks, ticket.layout.block_bytes), dtype=torch.uint8, device=self._blocks.device)
        yield Landing(staging, tuple(range(num_blocks)))
        first_token = first * ticket.layout.block_size
        num_tokens = min(num_blocks * ticket.layout.block_size, ticket.num_tokens - first_token)
        convert(staging, ticket.layout, first_token, num_tokens, self._blocks, block_ids, self._layout)
        if first_token + num_tokens == ticket.num_tokens:
            self._clear_rest(block_ids[-1], ticket.num_tokens)

    def _clear_rest(self, block_id: int, num_tokens: int) -> None:
        """What an earlier use left behind the last token would spoil attention if it is not finite, masked or not."""
        slot = (num_tokens - 1) % self._layout.block_size + 1
        last = self._blocks[block_id : block_id + 1]
        elements(last, self._layout)[:, :, :, slot:].zero_()
        if self._layout.dtype == "int8":
            scales(last, self._layout)[:, :, :, slot:].zero_()
