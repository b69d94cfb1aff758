"""KV blocks from one layout into another: another dtype (int8 included), another block size, or both.

The tokens of a hand-off lie densely in its source blocks; token `t` belongs in slot `t % block_size` of the hand-off's
target block `t // block_size`. Both sides' blocks are cut into *pieces* of as many tokens as their sizes' greatest
common divisor: no piece crosses a block of either side, so pieces move whole, but for a last one that is not full.
Where dtypes are equal the bits stay as they are, scales included; otherwise a number is rounded once.

Pure functions over bytes. Knows nothing of links, of digests or of who owns a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch

from pdserve.proto.kv_blocks import TORCH_DTYPES, dequantise, elements, quantise, scales, widest_word
from pdserve.proto.types import DTYPE_BYTES, KVLayout

# Source bytes that are converted at a time, so that what is made on the way stays in the processor's cache.
GROUP_BYTES = 1 << 20
# Elements `[num_pieces, num_layers, 2, piece_tokens, num_kv_heads, head_dim]`, and their scales where they are int8.
Pieces: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]


def unbridgeable(source: KVLayout, target: KVLayout) -> list[str]:
    """`field: ours != theirs` for each difference that `convert` cannot bridge. Empty: it can."""
    unknown = [f"dtype: {dtype} is unknown" for dtype in (source.dtype, target.dtype) if dtype not in DTYPE_BYTES]
    bridged = ("dtype:", "block_size:")
    return unknown + [line for line in source.differences(target) if not line.startswith(bridged)]


def convert(
    source_blocks: torch.Tensor,
    source: KVLayout,
    first_token: int,
    num_tokens: int,
    target_blocks: torch.Tensor,
    target_block_ids: Sequence[int],
    target: KVLayout,
) -> None:
    """Write tokens `first_token..first_token+num_tokens-1` of a hand-off to their places; all other slots stay.

    `source_blocks`, uint8 `[num_source_blocks, source.block_bytes]`, hold these tokens densely from their first slot
    on: `first_token` begins a source block, not always a target block. Rows `target_block_ids` of `target_blocks`,
    uint8 `[num_rows, target.block_bytes]`, are the target blocks of the whole hand-off, its first one first.
    """
    assert not unbridgeable(source, target), "the layouts were not compared"
    assert first_token % source.block_size == 0
    assert source.num_blocks(num_tokens) <= len(source_blocks)
    assert target.num_blocks(first_token + num_tokens) <= len(target_block_ids)
    group_blocks = max(1, GROUP_BYTES // source.block_bytes)
    places = _Places(target_blocks, target_block_ids, target, math.gcd(source.block_size, target.block_size))
    for block in range(0, source.num_blocks(num_tokens), group_blocks):
        group = source_blocks[block : block + group_blocks]
        token = block * source.block_size
        pieces = _recoded(_pieces(group, source, places.piece_tokens), source, target)
        places.write(pieces, first_token + token, min(num_tokens - token, len(group) * source.block_size))


def _pieces(blocks: torch.Tensor, layout: KVLayout, piece_tokens: int) -> Pieces:
    """The blocks' contents, cut by tokens, in their order."""
    data = _cut(elements(blocks, layout), piece_tokens).flatten(0, 1)
    return data, _cut(scales(blocks, layout), piece_tokens).flatten(0, 1) if layout.dtype == "int8" else None


def _cut(tensor: torch.Tensor, piece_tokens: int) -> torch.Tensor:
    """`[blocks, layers, 2, block_size, ...]` as `[blocks, pieces of a block, layers, 2, piece_tokens, ...]`, a view."""
    *outer, block_size = tensor.shape[:4]
    pieces = tensor.view(*outer, block_size // piece_tokens, piece_tokens, *tensor.shape[4:])
    return pieces.movedim(3, 1)


def _recoded(pieces: Pieces, source: KVLayout, target: KVLayout) -> Pieces:
    data, scale = pieces
    if source.dtype == target.dtype:
        return pieces
    if scale is not None:
        return dequantise(data, scale, TORCH_DTYPES[target.dtype]), None
    return quantise(data) if target.dtype == "int8" else (data.to(TORCH_DTYPES[target.dtype]), None)


class _Places:
    """Where the pieces of a hand-off belong: views of the target blocks, cut as the pieces are."""

    def __init__(self, blocks: torch.Tensor, block_ids: Sequence[int], layout: KVLayout, piece_tokens: int) -> None:
        self.piece_tokens = piece_tokens
        self._block_size = layout.block_size
        self._ids = torch.tensor(list(block_ids), dtype=torch.int64, device=blocks.device)
        self._data = _cut(elements(blocks, layout), piece_tokens)
        self._scale = _cut(scales(blocks, layout), piece_tokens) if layout.dtype == "int8" else None

    def write(self, pieces: Pieces, first_token: int, num_tokens: int) -> None:
        """The first `num_tokens` tokens of `pieces`, which lie in the hand-off from `first_token` on."""
        starts = torch.arange(first_token, first_token + num_tokens, self.piece_tokens, device=self._ids.device)
        blocks = self._ids[starts.div(self._block_size, rounding_mode="floor")]
        places = starts.remainder(self._block_size).div(self.piece_tokens, rounding_mode="floor")
        num_full, rest = divmod(num_tokens, self.piece_tokens)
        for target, source in zip((self._data, self._scale), pieces, strict=True):
            if target is None or source is None:
                continue
            _put(target, (blocks[:num_full], places[:num_full]), source[:num_full])
            if rest:
                # The piece that ends the hand-off: behind it is nothing of ours.
                index = blocks[num_full:], places[num_full:]
                _put(target[:, :, :, :, :rest], index, source[num_full : num_full + 1, :, :, :rest])


def _put(target: torch.Tensor, index: tuple[torch.Tensor, torch.Tensor], source: torch.Tensor) -> None:
    """`target[index] = source`, bit by bit."""
    assert target.dtype == source.dtype
    word = widest_word(target, source)
    target.view(word).index_put_(index, source.view(word))
