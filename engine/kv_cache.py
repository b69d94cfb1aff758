"""The memory of the KV pool: one tensor, block-major, so that a block is one contiguous run of bytes.

    [num_blocks, num_layers, 2 (key, value), block_size, num_kv_heads, head_dim]

Knows which bytes a block is, never who owns it (that is `BlockPool`). The memory may be somebody else's (shared).
"""

from __future__ import annotations

import torch

from pdserve.proto.types import KVLayout

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KVCache:
    """KV blocks of `layout` on `device`, in `buffer` if given: flat uint8 of exactly `required_bytes`.

    One layer's keys and values of a token are two *rows* of `[num_kv_heads, head_dim]`; of a block, two *block rows* of
    `[block_size, num_kv_heads, head_dim]`. Row numbers are the same for all layers: each layer looks at the pool
    through a view that starts at its own first row, so that indices are made once per step.
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
        block = (layout.num_layers, 2, layout.block_size, layout.num_kv_heads, layout.head_dim)
        self.tensor = buffer.view(TORCH_DTYPES[layout.dtype]).view(num_blocks, *block)
        rows = self.tensor.view(-1, layout.num_kv_heads, layout.head_dim)
        block_rows = self.tensor.view(-1, layout.block_size, layout.num_kv_heads, layout.head_dim)
        self._layer_rows = [rows[layer * 2 * layout.block_size :] for layer in range(layout.num_layers)]
        self._layer_block_rows = [block_rows[layer * 2 :] for layer in range(layout.num_layers)]

    @staticmethod
    def required_bytes(layout: KVLayout, num_blocks: int) -> int:
        return num_blocks * layout.block_bytes

    def bytes_view(self) -> torch.Tensor:
        """The pool as uint8 `[num_blocks, block_bytes]`, sharing its memory."""
        return self._bytes.view(self.num_blocks, self.layout.block_bytes)

    def key_rows(self, slots: torch.Tensor) -> torch.Tensor:
        """Rows of the keys of flat `slots` (block id * block_size + offset); values: `block_size` further on."""
        size = self.layout.block_size
        blocks = torch.div(slots, size, rounding_mode="floor")
        return slots + blocks * ((2 * self.layout.num_layers - 1) * size)

    def block_rows(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Block rows `[2, *block_ids.shape]` of the keys and the values of blocks."""
        key_rows = block_ids * (2 * self.layout.num_layers)
        return torch.stack((key_rows, key_rows + 1))

    def write(
        self, layer: int, key_rows: torch.Tensor, value_rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Store `key` and `value`, both `[num_tokens, num_kv_heads, head_dim]`."""
        rows = self._layer_rows[layer]
        rows.index_copy_(0, key_rows, key)
        rows.index_copy_(0, value_rows, value)

    def gather(self, layer: int, block_rows: torch.Tensor) -> torch.Tensor:
        """Copies of the blocks named by flat `block_rows`: `[len(block_rows), block_size, num_kv_heads, head_dim]`."""
        return self._layer_block_rows[layer].index_select(0, block_rows)

    def clear(self, block_ids: torch.Tensor) -> None:
        """Zero whole blocks, all layers."""
        self.tensor.index_fill_(0, block_ids, 0)
