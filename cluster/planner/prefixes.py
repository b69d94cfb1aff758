"""Which prompts begin alike: system prompts that requests share, and the ids of shared blocks.

A prefix id stands for a block of `HASH_BLOCK_TOKENS` tokens (Mooncake's convention) and for all blocks before it. Ids
are whole numbers below 2^63, and what does not share has different ones:

    namespace (7 bits) | session (32 bits) | epoch (6) | block (18)        conversations
    namespace (7 bits) | 1 | prompt (37)               | block (18)        system prompts
    the trace's own id XOR the mask of its copy                            replayed traces

Knows nothing of caches and of who holds what.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pdserve.cluster.arrivals import HASH_BLOCK_TOKENS
from pdserve.cluster.planner.processes import CHUNK

BLOCK_BITS = 18
EPOCH_BITS = 6
SHARED_BIT = 1 << 55
NAMESPACE_BITS = 56
MASK_64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SharedPrompt:
    """Text that many prompts begin with. The part of it that does not fill a block is not known to be shared."""

    num_tokens: int
    prefix_ids: tuple[int, ...]


def shared_prompts(lengths: tuple[int, ...], namespace: int) -> list[SharedPrompt]:
    found = []
    for number, num_tokens in enumerate(lengths):
        first = namespace << NAMESPACE_BITS | SHARED_BIT | number << BLOCK_BITS
        found.append(SharedPrompt(num_tokens, tuple(range(first, first + num_tokens // HASH_BLOCK_TOKENS))))
    return found


def chosen_prompts(
    prompts: list[SharedPrompt], zipf: float, share: float, random: np.random.Generator
) -> Iterator[SharedPrompt | None]:
    """The system prompt of each request: `None` for 1 - `share` of them, the k-th with weight k^-zipf for the rest."""
    weights = np.arange(1, len(prompts) + 1, dtype=float) ** -zipf
    edges = np.cumsum(weights / weights.sum()) * share
    edges[-1] = share  # rounding must not leave a crack
    choices: list[SharedPrompt | None] = [*prompts, None]
    while True:
        for choice in np.searchsorted(edges, random.random(CHUNK), side="right").tolist():
            yield choices[choice]


def history_ids(namespace: int, session: int, epoch: int, first_block: int, num_blocks: int) -> tuple[int, ...]:
    """Ids of a conversation's own blocks."""
    epoch %= 1 << EPOCH_BITS
    base = namespace << NAMESPACE_BITS | session << (BLOCK_BITS + EPOCH_BITS) | epoch << BLOCK_BITS
    return tuple(range(base + first_block, base + num_blocks))


def scatter(number: int) -> int:
    """63 bits that look random but always the same for a number (splitmix64)."""
    mixed = number * 0x9E3779B97F4A7C15 & MASK_64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & MASK_64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & MASK_64
    return (mixed ^ mixed >> 31) >> 1


def copy_mask(copy: int) -> int:
    """What the ids of a copy of a trace are XORed with: its users are others. Copy 0 keeps its ids."""
    return scatter(copy) if copy else 0
