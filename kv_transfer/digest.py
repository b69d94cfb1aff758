"""Digests of KV blocks: what left the prefill worker is what the decode worker computes from, or it fails.

Each block's digest is bound to the hand-off and to the block's position in it, not to where the block lies in either
pool. It guards against accidents (late writes, swapped or reused blocks, bit flips), not against a peer that
forges: 64 bits, not keyed. Knows nothing of links or devices: the blocks are readable bytes of this process.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from xxhash import xxh3_64_intdigest

from pdserve.proto.errors import CorruptKV
from pdserve.proto.types import HandoffId

Blocks = npt.NDArray[np.uint8] | torch.Tensor


def block_digests(handoff: HandoffId, blocks: Blocks, block_ids: Sequence[int]) -> tuple[int, ...]:
    """One unsigned 64-bit digest for each of `block_ids`, in order.

    `blocks` is `[num_blocks, block_bytes]` of uint8, contiguous, in host memory. XXH3 (github.com/Cyan4973/xxHash).
    """
    return tuple(_digests(handoff, blocks, block_ids))


def verify(handoff: HandoffId, blocks: Blocks, block_ids: Sequence[int], expected: Sequence[int]) -> None:
    """Raises `CorruptKV` naming the first position whose bytes are not what was offered; a missing digest is one."""
    if len(expected) != len(block_ids):
        raise CorruptKV(f"{handoff}: {len(block_ids)} blocks but {len(expected)} digests")
    for position, found in enumerate(_digests(handoff, blocks, block_ids)):
        if found != expected[position]:
            raise CorruptKV(f"{handoff}: block at position {position} of {len(block_ids)} differs from what was sent")


def _digests(handoff: HandoffId, blocks: Blocks, block_ids: Sequence[int]) -> Iterator[int]:
    rows = blocks.numpy() if isinstance(blocks, torch.Tensor) else blocks
    assert rows.dtype == np.uint8
    assert rows.ndim == 2
    base = xxh3_64_intdigest(str(handoff).encode())
    for position, block_id in enumerate(block_ids):
        seed = xxh3_64_intdigest(struct.pack("<Q", position), seed=base)
        yield xxh3_64_intdigest(rows[block_id].data, seed=seed)
