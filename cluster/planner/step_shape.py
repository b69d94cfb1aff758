"""What one engine step computes, as far as its duration depends on it. Knows no hardware and no model.

The attention of a chunk of `n` tokens that follows `c` tokens of context reads `n * (c + n / 2)` pairs of a query and a
key; a decode reads one pair for each token of its context.
"""

from __future__ import annotations

from typing import NamedTuple

from pdserve.engine.plan import StepPlan


class StepShape(NamedTuple):
    """Sums over the sequences of one step. A step with both kinds is mixed."""

    num_prefill_tokens: int
    prefill_pairs: float
    num_decodes: int
    decode_context_tokens: int


class Company(NamedTuple):
    """Which share of the machine's other workers compute meanwhile: prompts, maybe beside decodes, or decodes alone."""

    prefill: float = 0.0
    decode: float = 0.0


ALONE = Company()


def chunk_pairs(num_tokens: int, context_tokens: int) -> float:
    """Attention work of a prefill chunk: `num_tokens` queries behind `context_tokens` computed tokens."""
    return num_tokens * (context_tokens + num_tokens / 2)


def shape_of(plan: StepPlan) -> StepShape:
    """What the step's duration depends on."""
    num_prefill_tokens = num_decodes = context_tokens = 0
    pairs = 0.0
    for item in plan.scheduled:
        if item.num_tokens == 1 and item.start >= item.sequence.num_prompt_tokens:
            num_decodes += 1
            context_tokens += item.start + 1
        else:
            num_prefill_tokens += item.num_tokens
            pairs += chunk_pairs(item.num_tokens, item.start)
    return StepShape(num_prefill_tokens, pairs, num_decodes, context_tokens)
