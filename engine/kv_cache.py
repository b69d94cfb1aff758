"""The memory of the KV pool, block-major, so that a block is one contiguous run of bytes.

    [num_blocks, num_layers, 2 (key, value), block_size, num_kv_heads, head_dim], in int8 with scales behind each block

Knows which bytes a block is, never who owns it (that is `BlockPool`). The memory may be somebody else's (shared).
"""

from __future__ import annotations

from typing import TypeAlias

import torch

from pdserve.proto.kv_blocks import dequantise, elements, quantise, scales, widest_word
from pdserve.proto.types import KVLayout

# Where new tokens go, and which blocks are read: made by a cache, once per step, for its own use in every layer.
WriteIndex: TypeAlias = tuple[torch.Tensor, torch.Tensor]
ReadIndex: TypeAlias = torch.Tensor


class KVCache:
    """KV blocks of `layout` on `device`, in `buffer` if given: flat uint8 of exactly `required_bytes`.

    In int8 what is read is not quite what was written; otherwise it is.
    """

    def __init__(
        self, layout: KVLayout, num_blocks: int, device: torch.device | str = "cpu", buffer: torch.Tensor | None = None
    ) -> None:
        num_bytes = self.required_bytes(layout, num_blocks)
        if buffer is None:
            buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        assert buffer.dtype == torch.uint8, "the buffer must be flat uint8"
        assert buffer.shape == (num_bytes,), f"the buffer has shape {tuple(buffer.shape)}, wanted ({num_bytes},)"
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = buffer.device
        self._bytes = buffer
        self.tensor = elements(self.bytes_view(), layout)
        self.is_exact = layout.dtype != "int8"
        self._pages: _PlainPages | _Int8Pages = (
            _PlainPages(self.tensor) if self.is_exact else _Int8Pages(self.tensor, scales(self.bytes_view(), layout))
        )

    @staticmethod
    def required_bytes(layout: KVLayout, num_blocks: int) -> int:
        return num_blocks * layout.block_bytes

    def bytes_view(self) -> torch.Tensor:
        """The pool as uint8 `[num_blocks, block_bytes]`, sharing its memory."""
        return self._bytes.view(self.num_blocks, self.layout.block_bytes)

    def write_index(self, slots: torch.Tensor) -> WriteIndex:
        """For tokens that go to flat `slots` (block id * block_size + offset)."""
        return self._pages.write_index(slots)

    def read_index(self, block_ids: torch.Tensor) -> ReadIndex:
        """For all of these blocks, in their order."""
        return self._pages.read_index(block_ids.flatten())

    def write(self, layer: int, index: WriteIndex, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store `key` and `value`, both `[num_tokens, num_kv_heads, head_dim]`."""
        self._pages.write(layer, index, key, value)

    def gather(self, layer: int, index: ReadIndex, dtype: torch.dtype) -> torch.Tensor:
        """Copies of the indexed blocks, first all keys and then all values.

        Returns `[2 * num_indexed, block_size, num_kv_heads, head_dim]` in `dtype`: the layout's, unless that is int8.
        """
        return self._pages.gather(layer, index, dtype)

    def clear(self, block_ids: torch.Tensor) -> None:
        """Zero whole blocks, all layers."""
        # A block of any dtype is a multiple of four bytes, and filling floats is what torch does fastest.
        self.bytes_view().view(torch.float32).index_fill_(0, block_ids, 0.0)


class _PlainPages:
    """Blocks of `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]` in the model's own dtype.

    One layer's keys and values of a token are two *rows* of `[num_kv_heads, head_dim]`; of a block, two *block rows* of
    `[block_size, num_kv_heads, head_dim]`. Row numbers are the same for all layers: each layer looks at the pool
    through a view that starts at its own first row, so that indices are made once per step.
    """

    def __init__(self, blocks: torch.Tensor) -> None:
        _, self._num_layers, _, self._block_size, num_kv_heads, head_dim = blocks.shape
        self._blocks = blocks
        rows = blocks.view(-1, num_kv_heads, head_dim)
        block_rows = blocks.view(-1, self._block_size, num_kv_heads, head_dim)
        self._layer_rows = [rows[layer * 2 * self._block_size :] for layer in range(self._num_layers)]
        self._layer_block_rows = [block_rows[layer * 2 :] for layer in range(self._num_layers)]

    def write_index(self, slots: torch.Tensor) -> WriteIndex:
        """Rows of the keys; of the values."""
        blocks = torch.div(slots, self._block_size, rounding_mode="floor")
        key_rows = slots + blocks * ((2 * self._num_layers - 1) * self._block_size)
        return key_rows, key_rows + self._block_size

    def read_index(self, block_ids: torch.Tensor) -> ReadIndex:
        """Block rows `[2 * num_blocks]` of the keys, then of the values."""
        key_rows = block_ids * (2 * self._num_layers)
        return torch.cat((key_rows, key_rows + 1))

    def write(self, layer: int, index: WriteIndex, key: torch.Tensor, value: torch.Tensor) -> None:
        rows, (key_rows, value_rows) = self._layer_rows[layer], index
        rows.index_copy_(0, key_rows, key)
        rows.index_copy_(0, value_rows, value)

    def gather(self, layer: int, index: ReadIndex, dtype: torch.dtype) -> torch.Tensor:
        assert dtype == self._blocks.dtype
        return self._layer_block_rows[layer].index_select(0, index)


class _Int8Pages:
    """int8 `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]` and scales, without the last dimension.

    Every row of every token has a scale of its own: a new token changes nothing that is there already.
    """

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self._block_size = data.shape[3]
        self._layer_data = data.unbind(1)  # each [num_blocks, 2, block_size, num_kv_heads, head_dim]
        self._layer_scales = scale.unbind(1)
        # The same by tokens, [num_blocks, block_size, 2, num_kv_heads, ...], to be written word by word.
        self._data_word, self._scale_word = widest_word(data), widest_word(scale)
        self._token_data = [layer.view(self._data_word).transpose(1, 2) for layer in self._layer_data]
        self._token_scales = [layer.view(self._scale_word).transpose(1, 2) for layer in self._layer_scales]

    def write_index(self, slots: torch.Tensor) -> WriteIndex:
        """Blocks; slots in them."""
        return torch.div(slots, self._block_size, rounding_mode="floor"), torch.remainder(slots, self._block_size)

    def read_index(self, block_ids: torch.Tensor) -> ReadIndex:
        return block_ids

    def write(self, layer: int, index: WriteIndex, key: torch.Tensor, value: torch.Tensor) -> None:
        data, scale = quantise(torch.stack((key, value), dim=1))  # [num_tokens, 2, num_kv_heads, head_dim]
        self._token_data[layer].index_put_(index, data.view(self._data_word))
        self._token_scales[layer].index_put_(index, scale.view(self._scale_word))

    def gather(self, layer: int, index: ReadIndex, dtype: torch.dtype) -> torch.Tensor:
        data = self._layer_data[layer].index_select(0, index).transpose(0, 1)  # [2, num_indexed, block_size, ...]
        scale = self._layer_scales[layer].index_select(0, index).transpose(0, 1)
        return dequantise(data, scale, dtype).flatten(0, 1)
