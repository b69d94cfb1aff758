"""What one engine step computes, as far as its duration depends on it. Knows no hardware and no model.

The attention of a chunk of `n` tokens that follows `c` tokens of context reads `n * (c + n / 2)` pairs of a query and a
key; a decode reads one pair for each token of its context.
"""

from __future__ import annotations

from typing import NamedTuple


class StepShape(NamedTuple):
    """Sums over the sequences of one step. A step with both kinds is mixed."""

    num_prefill_tokens: int
    prefill_pairs: float
    num_decodes: int
    decode_context_tokens: int


def chunk_pairs(num_tokens: int, context_tokens: int) -> float:
    """Attention work of a prefill chunk: `num_tokens` queries behind `context_tokens` computed tokens."""
    return num_tokens * (context_tokens + num_tokens / 2)
