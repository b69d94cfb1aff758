"""Packed linear layers compute what plain ones do."""

from __future__ import annotations

import pytest
import torch
from engine_runs import FamilyDir, tiny_engine
from torch import nn

from pdserve.engine.packed_linear import PackedLinear, can_pack, pack_linears

needs_packing = pytest.mark.skipif(not can_pack(), reason="this torch cannot pack weights")


@needs_packing
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, 8, 33, 300])
@torch.inference_mode()
def test_any_number_of_rows_gives_the_plain_result(num_rows: int, bias: bool) -> None:
    torch.manual_seed(num_rows)
    plain = nn.Linear(48, 80, bias=bias)
    rows = torch.randn(1, num_rows, 48)
    torch.testing.assert_close(PackedLinear(plain)(rows), plain(rows), atol=1e-5, rtol=1e-5)


@needs_packing
def test_nested_layers_are_replaced_and_others_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4)))
    assert pack_linears(model) == 2
    assert [type(module).__name__ for module in model.modules()][1:] == [
        "PackedLinear",
        "Sequential",
        "ReLU",
        "Linear",
        "PackedLinear",
    ]


def test_packing_can_be_switched_off(family_dir: FamilyDir) -> None:
    assert tiny_engine(family_dir("llama"), pack_weights=False).loaded.num_packed_linears == 0
    packed = tiny_engine(family_dir("llama")).loaded.num_packed_linears
    assert packed == (2 * 7 + 1 if can_pack() else 0)
