"""Who owns which KV block: a block is in exactly one state, and leaves it only by a named move.

    FREE -> RUNNING      a sequence computes into it                RUNNING -> FREE, LEASED
    FREE -> RECEIVING    another worker writes into it              RECEIVING -> RUNNING, FREE, QUARANTINED
    LEASED               another worker may read it                 LEASED -> FREE, QUARANTINED
    QUARANTINED          nobody uses it, the wire may still do      QUARANTINED -> FREE

Knows nothing of sequences, of memory or of time; block ids are indices into whatever the owner allocated.
A move from a state that the block is not in is our own bug (a double free, a stale reference) and asserts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from enum import StrEnum


class BlockState(StrEnum):
    """Where a block is in its life."""

    FREE = "free"
    RUNNING = "running"
    LEASED = "leased"
    RECEIVING = "receiving"
    QUARANTINED = "quarantined"


class BlockPool:
    """States of `num_blocks` blocks. Free blocks are handed out in the order in which they became free."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._states = [BlockState.FREE] * num_blocks
        self._free = deque(range(num_blocks))
        self._counts = dict.fromkeys(BlockState, 0)
        self._counts[BlockState.FREE] = num_blocks
        self._num_reserved = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_reserved(self) -> int:
        """Blocks promised and not yet taken. Promises are soft: they do not lessen `num_free`."""
        return self._num_reserved

    def count(self, state: BlockState) -> int:
        return self._counts[state]

    def state(self, block_id: int) -> BlockState:
        return self._states[block_id]

    def can_take(self, num_blocks: int) -> bool:
        return num_blocks <= len(self._free)

    def take(self, num_blocks: int, state: BlockState) -> list[int]:
        """`num_blocks` free blocks, now in `state`."""
        assert num_blocks >= 0
        assert self.can_take(num_blocks), f"took {num_blocks} blocks of {self.num_free} free ones"
        block_ids = [self._free.popleft() for _ in range(num_blocks)]
        self._set(block_ids, BlockState.FREE, state)
        return block_ids

    def move(self, block_ids: Iterable[int], source_state: BlockState, target_state: BlockState) -> None:
        """Hand blocks over from one owner to the next. Neither state may be FREE: that is `take` and `release`."""
        assert BlockState.FREE not in (source_state, target_state)
        self._set(list(block_ids), source_state, target_state)

    def release(self, block_ids: Iterable[int], state: BlockState) -> None:
        """Give back blocks that are in `state`."""
        freed = list(block_ids)
        self._set(freed, state, BlockState.FREE)
        self._free.extend(freed)

    def reserve(self, num_blocks: int) -> None:
        assert num_blocks >= 0
        self._num_reserved += num_blocks

    def unreserve(self, num_blocks: int) -> None:
        assert 0 <= num_blocks <= self._num_reserved
        self._num_reserved -= num_blocks

    def check_integrity(self) -> None:
        """Raise AssertionError, saying what is wrong, unless every block is in one state and counted once."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is twice in the free list"
        for block_id, state in enumerate(self._states):
            assert (state is BlockState.FREE) == (block_id in free), f"block {block_id} is {state}, free list disagrees"
        for state in BlockState:
            actual = self._states.count(state)
            assert actual == self._counts[state], f"{actual} blocks are {state}, counted {self._counts[state]}"
        assert self._num_reserved >= 0, f"{self._num_reserved} blocks reserved"

    def _set(self, block_ids: list[int], source_state: BlockState, target_state: BlockState) -> None:
        """All or nothing."""
        assert len(set(block_ids)) == len(block_ids), f"a block is named twice in {block_ids}"
        for block_id in block_ids:
            assert 0 <= block_id < self.num_blocks, f"block {block_id} does not exist"
            actual = self._states[block_id]
            assert actual is source_state, f"block {block_id} is {actual}, not {source_state}"
        for block_id in block_ids:
            self._states[block_id] = target_state
        self._counts[source_state] -= len(block_ids)
        self._counts[target_state] += len(block_ids)
