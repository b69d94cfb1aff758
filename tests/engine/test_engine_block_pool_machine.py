"""The block pool against a model of plain dicts and lists, in any order of takes, claims, labels and releases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.engine.block_pool import BlockPool, BlockState

FREE, CACHED = BlockState.FREE, BlockState.CACHED
RUNNING, LEASED = BlockState.RUNNING, BlockState.LEASED
RECEIVING, QUARANTINED = BlockState.RECEIVING, BlockState.QUARANTINED
STRONGEST_FIRST = (QUARANTINED, RECEIVING, LEASED, RUNNING)
MOVES = ((RUNNING, LEASED), (RECEIVING, RUNNING), (RECEIVING, QUARANTINED), (LEASED, QUARANTINED))
NUM_BLOCKS = 7
KEYS = [bytes([number]) for number in range(9)]


class PoolMachine(RuleBasedStateMachine):
    """`claims` counts each block's claims; `content` is what a block is known to hold, by key."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.claims: dict[int, Counter[BlockState]] = {block: Counter() for block in range(NUM_BLOCKS)}
        self.content: dict[int, bytes] = {}
        self.free = list(range(NUM_BLOCKS))  # the next one to be had first
        self.cached: list[int] = []
        self.num_reserved = 0

    def claimed(self, *states: BlockState) -> list[int]:
        return [block for block, claims in self.claims.items() if any(claims[state] for state in states)]

    def expected_state(self, block: int) -> BlockState:
        for state in STRONGEST_FIRST:
            if self.claims[block][state]:
                return state
        return CACHED if block in self.content else FREE

    def give_up(self, blocks: list[int], state: BlockState) -> None:
        for block in blocks:
            self.claims[block][state] -= 1
        idle = [block for block in blocks if not self.claims[block].total()]
        self.free += [block for block in idle if block not in self.content]
        self.cached += [block for block in reversed(idle) if block in self.content]

    def forget(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if self.content.pop(block, None) is not None and block in self.cached:
                self.cached.remove(block)
                self.free.append(block)

    @rule(num_blocks=st.integers(0, NUM_BLOCKS), state=st.sampled_from(STRONGEST_FIRST))
    def take(self, num_blocks: int, state: BlockState) -> None:
        available = self.free + self.cached
        assert self.pool.can_take(num_blocks) == (num_blocks <= len(available))
        if num_blocks > len(available):
            with pytest.raises(AssertionError, match="blocks of"):
                self.pool.take(num_blocks, state)
            return
        taken = self.pool.take(num_blocks, state)
        assert taken == available[:num_blocks]
        self.free, self.cached = self.free[num_blocks:], self.cached[max(0, num_blocks - len(self.free)) :]
        evicted = [self.content.pop(block) for block in taken if block in self.content]
        assert all(self.pool.find([key]) == [] for key in evicted)
        for block in taken:
            self.claims[block][state] += 1

    @rule(data=st.data(), state=st.sampled_from([RUNNING, LEASED]))
    @precondition(lambda self: self.content)
    def share(self, data: st.DataObject, state: BlockState) -> None:
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.content)), unique=True))
        self.pool.share(blocks, state)
        self.cached = [block for block in self.cached if block not in blocks]
        for block in blocks:
            self.claims[block][state] += 1

    @rule(data=st.data(), state=st.sampled_from([RUNNING, LEASED]))
    def share_what_nobody_knows(self, data: st.DataObject, state: BlockState) -> None:
        unknown = [block for block in self.claims if block not in self.content]
        if unknown:
            with pytest.raises(AssertionError, match="is not known"):
                self.pool.share([*self.content, data.draw(st.sampled_from(unknown))], state)

    @rule(data=st.data(), arrow=st.sampled_from(MOVES))
    def move(self, data: st.DataObject, arrow: tuple[BlockState, BlockState]) -> None:
        source, target = arrow
        if not self.claimed(source):
            return
        blocks = data.draw(st.lists(st.sampled_from(self.claimed(source)), unique=True))
        self.pool.move(blocks, source, target)
        for block in blocks:
            self.claims[block][source] -= 1
            self.claims[block][target] += 1

    @rule(data=st.data(), state=st.sampled_from(STRONGEST_FIRST))
    def release(self, data: st.DataObject, state: BlockState) -> None:
        if self.claimed(state):
            blocks = data.draw(st.lists(st.sampled_from(self.claimed(state)), unique=True))
            self.pool.release(blocks, state)
            self.give_up(blocks, state)

    @rule(data=st.data(), state=st.sampled_from(STRONGEST_FIRST))
    def release_what_is_not_claimed(self, data: st.DataObject, state: BlockState) -> None:
        strangers = [block for block in self.claims if not self.claims[block][state]]
        if strangers:
            wrong = [*self.claimed(state), data.draw(st.sampled_from(strangers))]
            with pytest.raises(AssertionError, match=f"not {state}"):
                self.pool.release(wrong, state)
            with pytest.raises(AssertionError, match=f"not {state}"):
                self.pool.move(wrong, state, QUARANTINED)

    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def label(self, data: st.DataObject, key: bytes) -> None:
        block = data.draw(st.sampled_from(range(NUM_BLOCKS)))
        is_read = block in self.claimed(RUNNING, LEASED)
        if not is_read or self.content.get(block, key) != key:
            with pytest.raises(AssertionError, match="label" if is_read else "vouch"):
                self.pool.label(block, key)
            return
        self.pool.label(block, key)
        if key not in self.content.values():
            self.content[block] = key

    @rule(blocks=st.lists(st.integers(0, NUM_BLOCKS - 1), unique=True))
    def unlabel(self, blocks: list[int]) -> None:
        self.pool.unlabel(blocks)
        self.forget(blocks)

    @rule(keys=st.lists(st.sampled_from(KEYS), unique=True))
    def find(self, keys: list[bytes]) -> None:
        found = self.pool.find(keys)
        assert [self.content[block] for block in found] == keys[: len(found)]
        assert len(found) == len(keys) or keys[len(found)] not in self.content.values()

    @rule(num_blocks=st.integers(0, 2 * NUM_BLOCKS))
    def reserve(self, num_blocks: int) -> None:
        self.pool.reserve(num_blocks)
        self.num_reserved += num_blocks

    @rule(num_blocks=st.integers(0, 2 * NUM_BLOCKS))
    def unreserve(self, num_blocks: int) -> None:
        if num_blocks > self.num_reserved:
            with pytest.raises(AssertionError):
                self.pool.unreserve(num_blocks)
            return
        self.pool.unreserve(num_blocks)
        self.num_reserved -= num_blocks

    @invariant()
    def the_pool_is_what_the_model_says(self) -> None:
        self.pool.check_integrity()
        for block, claims in self.claims.items():
            assert self.pool.state(block) is self.expected_state(block)
            assert self.pool.num_claims(block) == claims.total()
            assert not (claims.total() and block in self.free + self.cached), "a claimed block can be had"
            assert not claims[RECEIVING] or (claims.total() == 1 and block not in self.content)
        assert (self.pool.num_free, self.pool.num_cached) == (len(self.free) + len(self.cached), len(self.cached))
        assert sum(self.pool.count(state) for state in BlockState) == NUM_BLOCKS
        assert self.pool.num_reserved == self.num_reserved
        for block, key in self.content.items():
            assert self.pool.find([key]) == [block]

    def teardown(self) -> None:
        for state in STRONGEST_FIRST:
            while blocks := self.claimed(state):
                self.pool.release(blocks, state)
                self.give_up(blocks, state)
        self.the_pool_is_what_the_model_says()
        assert self.pool.num_free == NUM_BLOCKS
        taken = self.pool.take(NUM_BLOCKS, RUNNING)
        assert sorted(taken) == list(range(NUM_BLOCKS)), "a block was lost"


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


def test_cached_blocks_lose_their_content_last_block_first_and_longest_unused_first() -> None:
    pool = BlockPool(4)
    old, new = pool.take(2, RUNNING), pool.take(2, RUNNING)
    for block, key in zip(old + new, KEYS, strict=False):
        pool.label(block, key)
    pool.release(old, RUNNING)
    pool.release(new, RUNNING)
    assert [pool.take(1, RUNNING) for _ in range(4)] == [[old[1]], [old[0]], [new[1]], [new[0]]]
    assert pool.find(KEYS) == []


def test_free_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(3)
    kept = pool.take(2, RUNNING)
    pool.label(kept[0], KEYS[0])
    pool.release(kept, RUNNING)
    assert (pool.num_free, pool.num_cached, pool.count(FREE)) == (3, 1, 2)
    assert kept[0] not in pool.take(2, RUNNING)
    assert pool.find(KEYS) == kept[:1]


def test_the_second_block_with_the_same_content_stays_unlabelled_and_is_free_in_the_end() -> None:
    pool = BlockPool(2)
    first, second = pool.take(2, RUNNING)
    pool.label(first, KEYS[0])
    pool.label(second, KEYS[0])
    pool.release([first, second], RUNNING)
    assert (pool.state(first), pool.state(second)) == (CACHED, FREE)


def test_a_block_that_is_leased_and_running_is_counted_once_as_the_stronger_of_the_two() -> None:
    pool = BlockPool(1)
    (block,) = pool.take(1, RUNNING)
    pool.label(block, KEYS[0])
    pool.share([block], RUNNING)
    pool.move([block], RUNNING, LEASED)
    assert (pool.state(block), pool.count(RUNNING), pool.count(LEASED)) == (LEASED, 0, 1)
    pool.move([block], LEASED, QUARANTINED)
    assert pool.state(block) is QUARANTINED
    pool.release([block], QUARANTINED)
    assert pool.state(block) is RUNNING


def test_a_block_that_is_written_to_from_outside_is_never_shared_nor_vouched_for() -> None:
    pool = BlockPool(1)
    (block,) = pool.take(1, RECEIVING)
    with pytest.raises(AssertionError, match="vouch"):
        pool.label(block, KEYS[0])
    with pytest.raises(AssertionError, match="is not known"):
        pool.share([block], RUNNING)
    pool.move([block], RECEIVING, RUNNING)
    with pytest.raises(AssertionError, match="unknown content"):
        pool.move([block], RUNNING, RECEIVING)
    with pytest.raises(AssertionError, match="nobody shares"):
        pool.share([block], RECEIVING)
