"""Who claims which KV block, and which blocks hold something that is worth finding again.

    take     FREE, CACHED -> RUNNING, RECEIVING    a sequence computes into it; another worker writes into it
    share    -> RUNNING, LEASED                    one more claim on a block whose content is known
    move     RUNNING -> LEASED                     another worker may read it
             RECEIVING -> RUNNING                  what came is verified
             LEASED, RECEIVING -> QUARANTINED      nobody uses it, the wire may still do
    release  one claim less; a block without claims is CACHED if its content is known, and FREE otherwise

A *label* says that a block's content is final, and under which key it can be found; such a block may be claimed many
times over, for nobody writes to it. A block that is being received is claimed once and has no label. For accounting a
block is in one state: that of its strongest claim (QUARANTINED > RECEIVING > LEASED > RUNNING), else CACHED or FREE.
CACHED blocks can be had like free ones; the least recently used one loses its content first.

Knows nothing of sequences, of memory, of time or of what a key stands for; block ids are indices into whatever the
owner allocated. Giving up a claim that nobody has (a double free, a stale reference) is our own bug and asserts.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple


class BlockState(StrEnum):
    """Where a block is in its life."""

    FREE = "free"
    CACHED = "cached"
    RUNNING = "running"
    LEASED = "leased"
    RECEIVING = "receiving"
    QUARANTINED = "quarantined"


# States that are claims, strongest first.
CLAIMS = (BlockState.QUARANTINED, BlockState.RECEIVING, BlockState.LEASED, BlockState.RUNNING)
READING = (BlockState.RUNNING, BlockState.LEASED)


class PoolCounts(NamedTuple):
    """Blocks by state; they sum to `total`, but for `cached`, which is a part of `free`.

    `reserved` is promised, not taken.
    """

    total: int
    free: int
    cached: int
    running: int
    leased: int
    receiving: int
    quarantined: int
    reserved: int


class BlockPool:
    """Claims and labels of `num_blocks` blocks. Free ones are handed out in the order in which they became free."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._claims = {state: array("H", bytes(2 * num_blocks)) for state in CLAIMS}
        # Their sums: most blocks have one claim, and need no look at the others.
        self._num_claims = array("H", bytes(2 * num_blocks))
        self._next_fresh = 0  # this block and all behind it have never been taken; they go before those in `_free`
        self._free = deque[int]()
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._keys: dict[int, bytes] = {}
        self._blocks: dict[bytes, int] = {}  # the same, by key
        self._counts = dict.fromkeys(BlockState, 0)
        self._counts[BlockState.FREE] = num_blocks
        self._num_reserved = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be had: those that are free, and those that are only cached."""
        return self.num_blocks - self._next_fresh + len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """The part of `num_free` that would cost something to lose."""
        return len(self._cached)

    @property
    def num_reserved(self) -> int:
        """Blocks promised and not yet taken. Promises are soft: they do not lessen `num_free`."""
        return self._num_reserved

    def count(self, state: BlockState) -> int:
        return self._counts[state]

    def counts(self) -> PoolCounts:
        """All of them at once: asked for after every turn."""
        counts = self._counts
        return PoolCounts(
            self.num_blocks,
            self.num_free,
            len(self._cached),
            counts[BlockState.RUNNING],
            counts[BlockState.LEASED],
            counts[BlockState.RECEIVING],
            counts[BlockState.QUARANTINED],
            self._num_reserved,
        )

    def state(self, block_id: int) -> BlockState:
        for state in CLAIMS:
            if self._claims[state][block_id]:
                return state
        return BlockState.CACHED if block_id in self._keys else BlockState.FREE

    def num_claims(self, block_id: int) -> int:
        return self._num_claims[block_id]

    def can_take(self, num_blocks: int) -> bool:
        return num_blocks <= self.num_free

    def take(self, num_blocks: int, state: BlockState) -> list[int]:
        """`num_blocks` blocks of unknown content, each with one claim: free ones, then what was cached."""
        assert num_blocks >= 0
        assert state in CLAIMS, f"{state} is no claim"
        assert self.can_take(num_blocks), f"took {num_blocks} blocks of {self.num_free} free ones"
        fresh = range(self._next_fresh, min(self._next_fresh + num_blocks, self.num_blocks))
        self._next_fresh += len(fresh)
        num_freed = min(num_blocks - len(fresh), len(self._free))
        block_ids = [*fresh, *[self._free.popleft() for _ in range(num_freed)]]
        block_ids += [self._evict() for _ in range(num_blocks - len(block_ids))]
        claims, num_claims = self._claims[state], self._num_claims
        for block_id in block_ids:
            claims[block_id] = num_claims[block_id] = 1
        self._count_change(BlockState.FREE, state, num_blocks)
        return block_ids

    def share(self, block_ids: Iterable[int], state: BlockState) -> None:
        """One more claim on each of these blocks of known content."""
        shared = list(block_ids)
        assert state in READING, f"nobody shares blocks that are {state}"
        self._check_ids(shared)
        for block_id in shared:
            assert block_id in self._keys, f"the content of block {block_id} is not known"
        for block_id in shared:
            self._claim(block_id, state, 1)

    def move(self, block_ids: Iterable[int], source_state: BlockState, target_state: BlockState) -> None:
        """Hand one claim on each of these blocks over to the next owner."""
        moved = list(block_ids)
        assert target_state in CLAIMS, f"{target_state} is no claim"
        assert target_state is not BlockState.RECEIVING, "only blocks of unknown content are written to: take them"
        self._check_claimed(moved, source_state)
        if source_state is target_state:
            return
        source, target, num_single = self._claims[source_state], self._claims[target_state], 0
        for block_id in moved:
            if self._num_claims[block_id] == 1:
                source[block_id], target[block_id] = 0, 1
                num_single += 1
            else:
                self._claim(block_id, target_state, 1)
                self._claim(block_id, source_state, -1)
        self._count_change(source_state, target_state, num_single)

    def release(self, block_ids: Iterable[int], state: BlockState) -> None:
        """Give up one claim on each of these blocks. What they hold is lost in the reverse order."""
        released = list(block_ids)
        self._check_claimed(released, state)
        claims, num_claims, freed = self._claims[state], self._num_claims, list[int]()
        if not self._keys and max(map(num_claims.__getitem__, released), default=0) == 1:
            for block_id in released:  # nothing is shared or known: the usual case without prefix caching
                claims[block_id] = num_claims[block_id] = 0
            self._count_change(state, BlockState.FREE, len(released))
            self._free.extend(released)
            return
        for block_id in reversed(released):
            if num_claims[block_id] == 1 and block_id not in self._keys:
                claims[block_id] = num_claims[block_id] = 0
                freed.append(block_id)
            else:
                self._claim(block_id, state, -1)
        self._count_change(state, BlockState.FREE, len(freed))
        freed.reverse()
        self._free.extend(freed)

    def label(self, block_id: int, key: bytes) -> None:
        """The block's content is final and can be found by `key`, unless another block can already."""
        self._check_ids([block_id])
        claims = [state for state in READING if self._claims[state][block_id]]
        assert claims, f"block {block_id} is {self.state(block_id)}: its content is nobody's to vouch for"
        assert self._keys.get(block_id, key) == key, f"block {block_id} has another label: its content has changed"
        if key not in self._blocks:
            self._blocks[key] = block_id
            self._keys[block_id] = key

    def unlabel(self, block_ids: Iterable[int]) -> None:
        """Nobody finds these blocks' content from now on; who claims them keeps them."""
        for block_id in block_ids:
            key = self._keys.pop(block_id, None)
            if key is None:
                continue
            del self._blocks[key]
            if block_id in self._cached:
                self._uncache(block_id)
                self._free.append(block_id)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks of the longest prefix of `keys` that is known. No key behind the first unknown one is drawn."""
        found = []
        for key in keys:
            block_id = self._blocks.get(key)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def reserve(self, num_blocks: int) -> None:
        assert num_blocks >= 0
        self._num_reserved += num_blocks

    def unreserve(self, num_blocks: int) -> None:
        assert 0 <= num_blocks <= self._num_reserved
        self._num_reserved -= num_blocks

    def check_integrity(self) -> None:
        """Raise AssertionError, saying what is wrong, unless every block is in one state and counted once."""
        states = [self.state(block_id) for block_id in range(self.num_blocks)]
        free = {*self._free, *range(self._next_fresh, self.num_blocks)}
        assert len(free) == self.num_free - self.num_cached, "a block is twice in the free list"
        for block_id, state in enumerate(states):
            assert (state is BlockState.FREE) == (block_id in free), f"block {block_id} is {state}, free list disagrees"
            is_cached = block_id in self._cached
            assert (state is BlockState.CACHED) == is_cached, f"block {block_id} is {state}: cache disagrees"
            claims = [of_state[block_id] for of_state in self._claims.values()]
            assert all(claim >= 0 for claim in claims), f"block {block_id} owes a claim"
            assert sum(claims) == self._num_claims[block_id], f"block {block_id}: claims counted wrong"
            if self._claims[BlockState.RECEIVING][block_id]:
                assert self.num_claims(block_id) == 1, f"block {block_id} is being written to and is shared"
                assert block_id not in self._keys, f"block {block_id} is being written to and has a label"
        for state in BlockState:
            actual = states.count(state)
            assert actual == self._counts[state], f"{actual} blocks are {state}, counted {self._counts[state]}"
        assert {block_id: key for key, block_id in self._blocks.items()} == self._keys, "labels and keys disagree"
        assert self._num_reserved >= 0, f"{self._num_reserved} blocks reserved"

    def _claim(self, block_id: int, state: BlockState, change: int) -> None:
        """One claim more or less. Where a block leaves or enters the free list is the caller's part."""
        before = self.state(block_id)
        self._claims[state][block_id] += change
        self._num_claims[block_id] += change
        after = self.state(block_id)
        if before is after:
            return
        self._count_change(before, after, 1)
        if before is BlockState.CACHED:
            del self._cached[block_id]
        elif after is BlockState.CACHED:
            self._cached[block_id] = None

    def _count_change(self, before: BlockState, after: BlockState, num_blocks: int) -> None:
        self._counts[before] -= num_blocks
        self._counts[after] += num_blocks

    def _evict(self) -> int:
        """The least recently used cached block, free now and not in the free list."""
        block_id = next(iter(self._cached))
        del self._blocks[self._keys.pop(block_id)]
        self._uncache(block_id)
        return block_id

    def _uncache(self, block_id: int) -> None:
        del self._cached[block_id]
        self._counts[BlockState.CACHED] -= 1
        self._counts[BlockState.FREE] += 1

    def _check_ids(self, block_ids: list[int]) -> None:
        assert len(set(block_ids)) == len(block_ids), f"a block is named twice in {block_ids}"
        if block_ids:
            assert min(block_ids) >= 0, f"block {min(block_ids)} does not exist"
            assert max(block_ids) < self.num_blocks, f"block {max(block_ids)} does not exist"

    def _check_claimed(self, block_ids: list[int], state: BlockState) -> None:
        assert state in CLAIMS, f"{state} is no claim"
        self._check_ids(block_ids)
        if not all(map(self._claims[state].__getitem__, block_ids)):
            wrong = next(block_id for block_id in block_ids if not self._claims[state][block_id])
            raise AssertionError(f"block {wrong} is {self.state(wrong)}, not {state}")
