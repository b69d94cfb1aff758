"""Linear layers whose weights oneDNN has laid out for itself, once: for float32 on a CPU.

The plain path leaves the layout to each call, which costs most where decode lives, at 2 to 16 rows (measured: a factor
of two, and of four for two rows of a vocabulary's layer). Where there is little to multiply the plain way is faster, as
a matrix-vector product; so both layouts are kept, at twice the memory. Touches two private operators of torch, here
and nowhere else. Knows no models beyond `nn.Linear`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# The number of rows that the layout is chosen for; others run on it just as well.
PACKED_FOR_ROWS = 8
MAX_PLAIN_PRODUCTS = 1 << 19
"""Multiplications up to which a call's fixed part, some 10 us more for the packed way, decides."""


def can_pack() -> bool:
    """Whether this torch has the two operators and a CPU library behind them."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    mkldnn: Any = torch.backends.mkldnn
    return mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


class PackedLinear(nn.Module):
    """Computes what `linear` does, to rounding."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), PACKED_FOR_ROWS)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if rows.numel() * self.out_features <= MAX_PLAIN_PRODUCTS:
            return F.linear(rows, self.weight, self.bias)
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        return output


@torch.no_grad()
def pack_linears(model: nn.Module) -> int:
    """Replace every float32 CPU `nn.Linear` below `model`. Returns how many."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.weight.dtype == torch.float32 and child.weight.device.type == "cpu"
    ]
    for parent, name, child in found:
        setattr(parent, name, PackedLinear(child))
    return len(found)
