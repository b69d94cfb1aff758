"""Which load makes a worker take the steps that a profile needs: batches, contexts and chunks over their ranges. Pure.

A worker cannot be told to take a certain step; load is chosen so that its scheduler does. Streams that all decode give
steps of one batch and growing contexts; prompts alone give chunks; prompts beside streams give mixed steps. Knows
nothing of how load is sent, nor of what a fit makes of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pdserve.proto.errors import ConfigError

NUM_DECODE_STEPS = 24
KV_SHARE = 0.8
"""Of the pool: what decodes beyond it would preempt each other."""

MIN_MODEL_LEN = 64
SHORT_TOKENS = 8
BETWEEN_TOKENS = (64, 256, 1024, 4096, 16_384)
REPEATS = 4
FIRST_ROUNDS = 0.25, 0.5, 0.75
MAX_CROWD = 32


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What one worker can take. `chunk_tokens` is the limit of one step."""

    max_num_seqs: int
    chunk_tokens: int
    max_model_len: int
    kv_capacity_tokens: int


@dataclass(frozen=True, slots=True)
class Burst:
    """Load for one worker: streams that decode together, and prompts that are sent one after another beside them.

    Each stream answers `num_steps` tokens to `context_tokens` tokens; with prompts it goes on until they are through.
    """

    num_streams: int = 0
    context_tokens: int = 0
    num_steps: int = 0
    prompts: tuple[int, ...] = ()


def plan_bursts(limits: WorkerLimits) -> tuple[Burst, ...]:
    """One round over the grid, the cheapest first: what is cut off at the end of the budget are the longest contexts.

    Raises:
        ConfigError: the worker has no room for a grid.
    """
    if limits.max_model_len < MIN_MODEL_LEN or limits.kv_capacity_tokens < 2 * MIN_MODEL_LEN:
        raise ConfigError(
            f"engine: a context of {limits.max_model_len} tokens over {limits.kv_capacity_tokens} tokens of KV is too "
            f"small to profile; give at least {MIN_MODEL_LEN} and {2 * MIN_MODEL_LEN}"
        )
    bursts = [*_prefill_bursts(limits), *_decode_bursts(limits), *_mixed_bursts(limits)]
    return tuple(sorted(bursts, key=_num_tokens))


def growing_rounds(bursts: Sequence[Burst]) -> Iterator[Sequence[Burst]]:
    """Without end: over the first quarter, the first half, three quarters, then again and again over all.

    What is cheap is so measured at several moments, as a machine is not as fast at one as at another.
    """
    for share in FIRST_ROUNDS:
        yield bursts[: math.ceil(share * len(bursts))]
    while True:
        yield bursts


def _num_tokens(burst: Burst) -> int:
    """That prompts have: what takes the time."""
    return burst.num_streams * burst.context_tokens + sum(burst.prompts)


def doublings(largest: int, smallest: int = 1) -> tuple[int, ...]:
    """Powers of two from `smallest`, and the largest value itself."""
    values = []
    value = smallest
    while value < largest:
        values.append(value)
        value *= 2
    return (*values, largest)


def _longest_prompt(limits: WorkerLimits) -> int:
    return min(limits.max_model_len - 1, int(limits.kv_capacity_tokens * KV_SHARE))


def _prefill_bursts(limits: WorkerLimits) -> Iterator[Burst]:
    """Single chunks of every size, and long prompts that leave chunks behind long contexts."""
    longest = _longest_prompt(limits)
    for tokens in doublings(min(limits.chunk_tokens, longest), 8):
        yield Burst(
            prompts=(tokens, max(1, tokens * 7 // 8), max(1, tokens * 3 // 4), max(1, tokens * 5 // 8)) * REPEATS
        )
    for tokens in doublings(longest, min(2 * limits.chunk_tokens, longest)):
        yield Burst(prompts=(tokens, max(1, tokens - limits.chunk_tokens // 3)))
    for number in doublings(min(MAX_CROWD, limits.max_num_seqs), 4):  # several prompts to a step, as in a queue
        yield Burst(number, min(longest, max(1, limits.chunk_tokens * 3 // (2 * number))), 1)


def _num_steps(limits: WorkerLimits, batch: int, context_tokens: int) -> int:
    """Enough that the first to start is still there when the last one's prompt is computed."""
    return NUM_DECODE_STEPS + -(-batch * context_tokens // limits.chunk_tokens)


def _contexts(limits: WorkerLimits, batch: int) -> tuple[int, ...]:
    """From short to the longest prompts that a batch of so many can have, with room for its steps."""
    room = min(limits.max_model_len, int(limits.kv_capacity_tokens * KV_SHARE) // batch)
    longest = max(1, int((room - NUM_DECODE_STEPS - 1) / (1 + batch / limits.chunk_tokens)))
    between = (tokens for tokens in BETWEEN_TOKENS if SHORT_TOKENS < tokens < longest)
    return tuple(sorted({min(SHORT_TOKENS, longest), *between, longest}))


def _decode_bursts(limits: WorkerLimits) -> Iterator[Burst]:
    """Long contexts, whose prompts take the most time, only for every second batch."""
    batches = doublings(limits.max_num_seqs)
    for batch in batches:
        contexts = _contexts(limits, batch)
        is_long = batches.index(batch) % 2 == (len(batches) - 1) % 2 or batch == 1
        for context_tokens in contexts if is_long else contexts[:-1] or contexts:
            yield Burst(batch, context_tokens, _num_steps(limits, batch, context_tokens))


def _mixed_bursts(limits: WorkerLimits) -> Iterator[Burst]:
    chunks = [tokens for tokens in doublings(limits.chunk_tokens, 32) if tokens < _longest_prompt(limits)]
    for batch in doublings(limits.max_num_seqs)[1::2]:
        if batch == limits.max_num_seqs:
            continue  # no room for a prompt beside them
        for context_tokens in _contexts(limits, batch + 1)[1:3]:
            yield Burst(batch, context_tokens, prompts=tuple(chunks))
