"""What an int8 block is made of, byte by byte, and what a row keeps of its numbers."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdserve.proto.kv_blocks import SCALE_DTYPE, TORCH_DTYPES, dequantise, elements, quantise, scales, widest_word
from pdserve.proto.types import DTYPE_BYTES, SCALE_BYTES, KVLayout

FLOATS = sorted(set(DTYPE_BYTES) - {"int8"})


def test_types_and_tensors_agree_on_sizes() -> None:
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == DTYPE_BYTES
    assert SCALE_DTYPE.itemsize == SCALE_BYTES


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 5))
def test_an_int8_block_is_its_elements_and_behind_them_aligned_scales(
    num_layers: int, num_kv_heads: int, head_dim: int, block_size: int
) -> None:
    layout = KVLayout("model", "int8", num_layers, num_kv_heads, head_dim, block_size)
    blocks = torch.zeros((2, layout.block_bytes), dtype=torch.uint8)
    data, scale = elements(blocks, layout), scales(blocks, layout)
    data.copy_(torch.arange(data.numel()).remainder(251).sub(125).to(torch.int8).view(data.shape))
    scale.copy_(torch.arange(1.0, scale.numel() + 1).view(scale.shape))
    num_rows = num_layers * 2 * block_size * num_kv_heads
    num_elements = num_rows * head_dim
    padding = -num_elements % 4
    for index in range(2):
        raw = struct.unpack(f"<{num_elements}b{padding}x{num_rows}f", bytes(blocks[index].tolist()))
        assert list(raw[:num_elements]) == data[index].flatten().tolist()
        assert list(raw[num_elements:]) == scale[index].flatten().tolist()


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_block_in_the_models_dtype_is_its_elements_alone(dtype: str) -> None:
    layout = KVLayout("model", dtype, 3, 2, 5, 7)
    assert layout.block_bytes == 3 * 2 * 7 * 2 * 5 * DTYPE_BYTES[dtype]


@given(st.sampled_from(FLOATS), st.floats(-44, 38), st.integers(1, 70), st.integers(0, 1 << 30))
def test_a_number_is_off_by_half_a_step_of_its_own_row_at_most(
    dtype: str, exponent: float, head_dim: int, seed: int
) -> None:
    numbers = torch.randn((6, head_dim), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = (numbers * 10.0**exponent).to(TORCH_DTYPES[dtype])
    rows = rows[torch.isfinite(rows).all(-1)].double()
    got = dequantise(*quantise(rows.to(TORCH_DTYPES[dtype])), torch.float32).double()
    largest = rows.abs().amax(-1, keepdim=True) if len(rows) else rows
    assert bool(((got - rows).abs() <= largest / 254 * (1 + 1e-4) + 1e-36).all())


@given(st.sampled_from(FLOATS), st.sampled_from(FLOATS), st.integers(1, 70), st.data())
def test_a_row_that_is_not_finite_reads_back_as_nan_and_spoils_no_other(
    dtype: str, read_as: str, head_dim: int, data: st.DataObject
) -> None:
    rows = torch.linspace(-3, 5, 9 * head_dim).view(9, head_dim).to(TORCH_DTYPES[dtype])
    bad = data.draw(st.sets(st.integers(0, 8)))
    for row in bad:
        rows[row, data.draw(st.integers(0, head_dim - 1))] = data.draw(
            st.sampled_from([float("nan"), float("inf"), float("-inf")])
        )
    got = dequantise(*quantise(rows), TORCH_DTYPES[read_as])
    for row in range(9):
        assert bool(torch.isnan(got[row]).all()) if row in bad else bool(torch.isfinite(got[row]).all())


def test_zeros_are_exact_and_look_like_cleared_memory() -> None:
    data, scale = quantise(torch.tensor([[0.0, -0.0, 0.0], [0.0, 1.0, 0.0]]))
    assert (data[0].tolist(), scale[0].item()) == ([0, 0, 0], 0.0)
    assert dequantise(data, scale, torch.float32).tolist() == [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def test_the_largest_half_precision_number_survives() -> None:
    largest = torch.finfo(torch.float16).max
    rows = torch.tensor([[largest, -largest, 1.0]], dtype=torch.float16)
    assert dequantise(*quantise(rows), torch.float16)[0, :2].tolist() == [largest, -largest]


@pytest.mark.parametrize(
    ("shape", "dtype", "word"),
    [
        ((3, 64), torch.int8, torch.int64),
        ((3, 6), torch.int8, torch.int16),
        ((3, 5), torch.int8, torch.int8),
        ((3, 3), torch.float32, torch.int32),
        ((3, 2), torch.float32, torch.int64),
    ],
)
def test_rows_are_copied_in_the_widest_words_that_they_are_made_of(
    shape: tuple[int, int], dtype: torch.dtype, word: torch.dtype
) -> None:
    rows = torch.zeros(shape, dtype=dtype)
    assert widest_word(rows) == word
    assert rows.view(word).shape[0] == 3
    shifted = torch.zeros((3, 9), dtype=torch.int8)[:, 1:]
    assert widest_word(shifted) == torch.int8, "eight bytes to a row, but at odd addresses"
