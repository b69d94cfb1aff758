"""What the bytes of KV blocks mean: their elements as tensors, and how a row of numbers becomes int8 and back.

A block is one run of bytes: its elements, `[num_layers, 2 (key, value), block_size, num_kv_heads, head_dim]`. In int8
the scales follow, one for each row of `head_dim` elements; a number is its int8 times its row's scale. So writing a
token touches no other, and a block travels with all that it needs to be read.

Imports torch, so only for those who hold KV. Knows nothing of pools, of links or of where a block lies.
"""

from __future__ import annotations

import math

import torch

from pdserve.proto.types import KVLayout

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# In float32 the scale of every row of every dtype is exact to rounding. float16 would save 2 bytes in a row; it costs
# rows below 0.001 their precision (measured: six times the error at 0.0001) and rows above 8 million their value.
SCALE_DTYPE = torch.float32
LARGEST_INT8 = 127


def elements(blocks: torch.Tensor, layout: KVLayout) -> torch.Tensor:
    """The elements of `blocks` (uint8 `[num_blocks, block_bytes]`), sharing memory.

    Returns `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`.
    """
    shape = (layout.num_layers, 2, layout.block_size, layout.num_kv_heads, layout.head_dim)
    return blocks[:, : layout.element_bytes].view(TORCH_DTYPES[layout.dtype]).view(len(blocks), *shape)


def scales(blocks: torch.Tensor, layout: KVLayout) -> torch.Tensor:
    """The scales of int8 `blocks`, sharing memory: `[num_blocks, num_layers, 2, block_size, num_kv_heads]`."""
    assert layout.dtype == "int8"
    shape = (layout.num_layers, 2, layout.block_size, layout.num_kv_heads)
    return blocks[:, layout.scales_at_bytes :].view(SCALE_DTYPE).view(len(blocks), *shape)


def widest_word(*tensors: torch.Tensor) -> torch.dtype:
    """The widest integer dtype that the rows of each tensor, contiguous in its last dimension, can be viewed as.

    What is only copied is copied in these: half the time and less.
    """
    units = [
        number * tensor.element_size()
        for tensor in tensors
        for number in (tensor.storage_offset(), tensor.shape[-1], *tensor.stride()[:-1])
    ]
    return _WORDS[math.gcd(8, *units)]


def quantise(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 `[..., head_dim]` and scales `[...]` of `rows` `[..., head_dim]`: off by half a scale at most.

    (By less than 1e-36 where the scale itself is subnormal.) The scale of a row with a NaN or an infinity is not finite
    either, and all that is read back from it is NaN.
    """
    rows = rows.to(SCALE_DTYPE)
    scale = rows.abs().amax(-1, keepdim=True) / LARGEST_INT8
    steps = (rows / scale).nan_to_num_(0.0, 0.0, 0.0)  # zeros where the scale is zero or not finite
    return steps.round_().to(torch.int8), scale.squeeze(-1)


def dequantise(data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers `[..., head_dim]` that int8 `data` and its scales `[...]` stand for, rounded once."""
    return torch.empty(data.shape, dtype=dtype, device=data.device).copy_(data).mul_(scale[..., None])
