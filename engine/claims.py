"""What sequences claim in the pool: blocks found and shared, blocks taken, labelled when full, handed over, released.

    prefix --> grow --> [computed] --> label --> hand_over --> release

A block is labelled when it is full *and* computed, prompt and output alike; from then on it never changes, and whoever
begins with the same tokens shares it. What was handed over belongs to whoever got the part. Knows which blocks a
sequence has, never when it runs. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from pdserve.engine.block_pool import BlockPool, BlockState
from pdserve.engine.prefix import block_keys
from pdserve.engine.sequence import Sequence


class Claims:
    """The RUNNING claims of one scheduler's sequences."""

    def __init__(self, pool: BlockPool, block_size: int, prefix_caching: bool) -> None:
        self._pool = pool
        self._block_size = block_size
        self.prefix_caching = prefix_caching

    def prefix(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the first tokens of a sequence without blocks. The last token is left to be computed."""
        if not self.prefix_caching:
            return []
        return self._pool.find(sequence.keys((sequence.num_tokens - 1) // self._block_size))

    def needed_blocks(self, sequence: Sequence, prefix: Items[int] = ()) -> int:
        """By how much the pool's `num_free` shrinks if the sequence gets room for all that it knows.

        Shared blocks cost nothing while others claim them; but who takes them out of the cache takes them from it.
        """
        num_cached = sum(self._pool.state(block_id) is BlockState.CACHED for block_id in prefix)
        return sequence.table.missing_blocks(sequence.num_tokens) - len(prefix) + num_cached

    def grow(self, sequence: Sequence, prefix: Items[int] = ()) -> None:
        """Blocks for every token that the sequence knows, `prefix` first: that much is computed."""
        if prefix:
            self._pool.share(prefix, BlockState.RUNNING)
            sequence.inherit(prefix)
        missing = sequence.table.missing_blocks(sequence.num_tokens)
        if missing:  # most steps of most sequences need none
            sequence.table.extend(self._pool.take(missing, BlockState.RUNNING))

    def label(self, sequence: Sequence) -> None:
        """Let others find what became full and computed since the last time."""
        if not self.prefix_caching:
            return
        num_full = sequence.num_full_blocks
        if num_full == sequence.num_labelled_blocks:  # most steps of most sequences fill none
            return
        keys = sequence.keys(num_full)
        for place in range(sequence.num_labelled_blocks, num_full):
            self._pool.label(sequence.block_ids[place], keys[place])
        sequence.num_labelled_blocks = num_full

    def hand_over(self, sequence: Sequence, end: int) -> tuple[int, ...]:
        """Lease the blocks before place `end` that are not handed over yet, to whoever gets to know of them."""
        block_ids = tuple(sequence.block_ids[sequence.num_handed_blocks : end])
        self._pool.move(block_ids, BlockState.RUNNING, BlockState.LEASED)
        sequence.num_handed_blocks = end
        return block_ids

    def forget(self, sequence: Sequence) -> None:
        """Give up all that the sequence has, to be found or computed again later."""
        self._pool.release(sequence.forget(), BlockState.RUNNING)

    def release(self, sequence: Sequence) -> None:
        """Give up what the sequence has and has not handed over."""
        num_handed = sequence.num_handed_blocks
        self._pool.release(sequence.table.clear()[num_handed:], BlockState.RUNNING)

    def hold(self, token_ids: Items[int]) -> list[int]:
        """Blocks of the longest known prefix of full blocks of `token_ids`, claimed for the caller."""
        if not self.prefix_caching:
            return []
        block_ids = self._pool.find(block_keys(token_ids, self._block_size))
        self._pool.share(block_ids, BlockState.RUNNING)
        return block_ids
