"""Every token lands in its place with its numbers, whatever the two layouts and however the hand-off is cut."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdserve.kv_transfer.codec import GROUP_BYTES, convert, unbridgeable
from pdserve.proto.kv_blocks import TORCH_DTYPES, dequantise, elements, quantise, scales
from pdserve.proto.types import DTYPE_BYTES, KVLayout

DTYPES = st.sampled_from(sorted(DTYPE_BYTES))
SIZES = st.integers(1, 12)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of one layout; those of a hand-off are rows `ids`."""

    bytes: torch.Tensor
    ids: Sequence[int]
    layout: KVLayout

    def rows(self, token: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of one token: elements `[layers, 2, heads, head_dim]`, and scales `[layers, 2, heads]` or nothing."""
        block, slot = self.ids[token // self.layout.block_size], token % self.layout.block_size
        data = elements(self.bytes, self.layout)[block, :, :, slot]
        return data, scales(self.bytes, self.layout)[block, :, :, slot] if self.layout.dtype == "int8" else data[:0]

    def numbers(self, token: int) -> torch.Tensor:
        data, scale = self.rows(token)
        return dequantise(data, scale, torch.float32) if self.layout.dtype == "int8" else data.float()


@st.composite
def shapes(draw: st.DrawFn) -> KVLayout:
    layers, heads, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 17))
    return KVLayout("model", draw(DTYPES), layers, heads, head_dim, draw(SIZES))


def noise(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Rows of very different sizes; here and there zeros, NaN and infinities."""
    rows = torch.randn(shape, generator=generator)
    rows *= 10 ** torch.empty((*shape[:-1], 1)).uniform_(-4, 4, generator=generator)
    kind = torch.rand(shape[:-1], generator=generator)
    rows[kind < 0.1] = 0.0
    rows[kind > 0.95, 0] = float("nan")
    rows[kind > 0.98, 0] = float("-inf")
    return rows


def filled(layout: KVLayout, num_blocks: int, ids: Sequence[int], seed: int) -> Blocks:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (num_blocks, layout.block_bytes), dtype=torch.uint8, generator=generator)
    data = elements(blocks, layout)
    rows = noise(generator, *data.shape)
    if layout.dtype == "int8":
        quantised, scale = quantise(rows)
        data.copy_(quantised)
        scales(blocks, layout).copy_(scale)
    else:
        data.copy_(rows)
    return Blocks(blocks, ids, layout)


def as_bytes(tensor: torch.Tensor) -> list[int]:
    values: list[int] = tensor.contiguous().view(torch.uint8).flatten().tolist()
    return values


def expected_rows(source: Blocks, token: int, target: KVLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """One token in the target's dtype, converted by itself."""
    data, scale = source.rows(token)
    if source.layout.dtype == target.dtype:
        return data, scale
    if source.layout.dtype == "int8":
        numbers = dequantise(data, scale, TORCH_DTYPES[target.dtype])
        return numbers, numbers[:0]
    if target.dtype == "int8":
        return quantise(data)
    return data.to(TORCH_DTYPES[target.dtype]), data[:0].to(TORCH_DTYPES[target.dtype])


def alike(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Number by number, a NaN being like any other."""
    return torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.nan_to_num(), wanted.nan_to_num())


def hand_over(source: Blocks, target: Blocks, first_block: int, num_tokens: int) -> None:
    """A part: source blocks from `first_block` on that hold `num_tokens`."""
    size = source.layout.block_size
    rows = list(source.ids[first_block : first_block + source.layout.num_blocks(num_tokens)])
    part = source.bytes[rows]
    convert(part, source.layout, first_block * size, num_tokens, target.bytes, target.ids, target.layout)


def pair(source: KVLayout, target: KVLayout, num_tokens: int, seed: int) -> tuple[Blocks, Blocks]:
    """Random blocks on both sides with room for a hand-off of `num_tokens`, at random ids of larger pools."""
    draw = random.Random(seed)

    def side(layout: KVLayout, seed: int) -> Blocks:
        num_blocks = layout.num_blocks(num_tokens)
        ids = draw.sample(range(num_blocks + 3), num_blocks)
        return filled(layout, num_blocks + 3, ids, seed)

    return side(source, seed), side(target, seed + 1)


@given(st.data(), shapes(), DTYPES, SIZES, st.integers(0, 40), st.integers(0, 1 << 30))
def test_parts_in_any_order_land_token_by_token_and_touch_nothing_else(
    data: st.DataObject, source_layout: KVLayout, dtype: str, block_size: int, num_tokens: int, seed: int
) -> None:
    target_layout = replace(source_layout, dtype=dtype, block_size=block_size)
    source, target = pair(source_layout, target_layout, num_tokens, seed)
    before = Blocks(target.bytes.clone(), target.ids, target_layout)
    num_blocks = source_layout.num_blocks(num_tokens)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, num_blocks - 1)), max_size=3)) | {0, num_blocks})
    parts = [(first, last) for first, last in pairwise(cuts) if last <= num_blocks]
    for first, last in data.draw(st.permutations(parts)):
        first_token, end = first * source_layout.block_size, min(num_tokens, last * source_layout.block_size)
        hand_over(source, target, first, end - first_token)
    for token in range(num_tokens):
        for got, wanted in zip(target.rows(token), expected_rows(source, token, target_layout), strict=True):
            # Which NaN a NaN becomes in another dtype is the processor's choice.
            same = as_bytes(got) == as_bytes(wanted) or (dtype != source_layout.dtype and alike(got, wanted))
            assert same, f"token {token}: {got} is not {wanted}"
        for got, old in zip(target.rows(token), before.rows(token), strict=True):
            got.copy_(old)
    assert torch.equal(target.bytes, before.bytes), "something else was touched"


@given(shapes(), SIZES, st.integers(1, 40), st.integers(0, 1 << 30))
def test_there_and_back_between_block_sizes_every_bit_is_the_same(
    layout: KVLayout, block_size: int, num_tokens: int, seed: int
) -> None:
    source, target = pair(layout, replace(layout, block_size=block_size), num_tokens, seed)
    back = Blocks(torch.zeros_like(source.bytes), source.ids, layout)
    hand_over(source, target, 0, num_tokens)
    hand_over(target, back, 0, num_tokens)
    for token in range(num_tokens):
        for got, wanted in zip(back.rows(token), source.rows(token), strict=True):
            assert as_bytes(got) == as_bytes(wanted)


@given(shapes(), SIZES, st.integers(1, 40), st.integers(0, 1 << 30))
def test_through_int8_a_number_keeps_within_half_a_step_of_its_row(
    layout: KVLayout, block_size: int, num_tokens: int, seed: int
) -> None:
    source, target = pair(layout, replace(layout, dtype="int8", block_size=block_size), num_tokens, seed)
    hand_over(source, target, 0, num_tokens)
    for token in range(num_tokens):
        given_, got = source.numbers(token), target.numbers(token)
        largest = given_.abs().amax(-1, keepdim=True)
        bound = largest / 254 * (1 + 1e-4)
        finite = torch.isfinite(largest).expand_as(given_)
        assert bool(((given_ - got).abs() <= bound)[finite].all())
        assert bool(torch.isnan(got)[~finite].all()), "a row that is not finite became numbers"
        assert bool((got[(largest == 0).expand_as(got)] == 0).all())


def test_a_part_larger_than_what_is_converted_at_a_time_is_converted_whole() -> None:
    layout = KVLayout("model", "float32", 4, 4, 64, 16)
    target = replace(layout, dtype="int8", block_size=24)
    num_blocks = 2 * GROUP_BYTES // layout.block_bytes + 3
    num_tokens = num_blocks * 16 - 5
    source, landed = pair(layout, target, num_tokens, seed=1)
    hand_over(source, landed, 0, num_tokens)
    for token in (0, 23, 24, num_tokens // 2, num_tokens - 1):
        data, scale = quantise(source.rows(token)[0])
        assert as_bytes(landed.rows(token)[0]) == as_bytes(data)
        assert as_bytes(landed.rows(token)[1]) == as_bytes(scale)


LAYOUT = KVLayout("model", "float32", 2, 2, 8, 16)


@pytest.mark.parametrize(
    ("changed", "differences"),
    [
        ({}, []),
        ({"block_size": 4, "dtype": "int8"}, []),
        ({"dtype": "bfloat16"}, []),
        ({"model_hash": "other"}, ["model_hash: model != other"]),
        ({"num_layers": 3, "head_dim": 9}, ["num_layers: 2 != 3", "head_dim: 8 != 9"]),
        ({"num_kv_heads": 1}, ["num_kv_heads: 2 != 1"]),
        ({"dtype": "int4"}, ["dtype: int4 is unknown"]),
    ],
)
def test_only_what_changes_the_meaning_of_a_row_cannot_be_bridged(
    changed: dict[str, str | int], differences: list[str]
) -> None:
    other = replace(LAYOUT, **changed)  # type: ignore[arg-type]
    assert unbridgeable(LAYOUT, other) == differences
