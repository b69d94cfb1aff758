"""A block pool that knows how many blocks are in which state, and not which: all that decisions depend on.

Without prefix caching no decision looks at a block's id: what fits, who is evicted and what is offered go by numbers.
The fast mode of the simulator spares the lists behind them. Every block that it hands out is called `ANY_BLOCK`. Knows
nothing of content: nothing can be labelled, found or shared here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized

from pdserve.engine.block_pool import CLAIMS, BlockPool, BlockState

ANY_BLOCK = 0


class CountingPool(BlockPool):
    """Giving back what was not taken asserts, in sum and not for each block."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(1)
        self.num_blocks = num_blocks
        self._counts[BlockState.FREE] = num_blocks

    @property
    def num_free(self) -> int:
        return self._counts[BlockState.FREE]

    def can_take(self, num_blocks: int) -> bool:
        return num_blocks <= self._counts[BlockState.FREE]

    def take(self, num_blocks: int, state: BlockState) -> list[int]:
        assert 0 <= num_blocks <= self.num_free, f"took {num_blocks} blocks of {self.num_free} free ones"
        self._counts[BlockState.FREE] -= num_blocks
        self._counts[state] += num_blocks
        return [ANY_BLOCK] * num_blocks

    def move(self, block_ids: Iterable[int], source_state: BlockState, target_state: BlockState) -> None:
        assert isinstance(block_ids, Sized)
        num_blocks = len(block_ids)
        assert num_blocks <= self._counts[source_state], f"{num_blocks} blocks were not {source_state}"
        self._counts[source_state] -= num_blocks
        self._counts[target_state] += num_blocks

    def release(self, block_ids: Iterable[int], state: BlockState) -> None:
        self.move(block_ids, state, BlockState.FREE)

    def share(self, block_ids: Iterable[int], state: BlockState) -> None:
        assert not list(block_ids), "nothing is known here that could be shared"

    def label(self, block_id: int, key: bytes) -> None:
        raise AssertionError("nothing is known here that could be found")

    def check_integrity(self) -> None:
        assert all(self._counts[state] >= 0 for state in CLAIMS)
        assert sum(self._counts.values()) == self.num_blocks
        assert self._num_reserved >= 0
