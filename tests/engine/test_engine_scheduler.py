"""The scheduler and the pool, with a pretend model: budgets, order, preemption, and nothing lost or leaked."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_runs import BLOCK, Memory, execute, fresh, prompt, redeemed, scheduler, spans

from pdserve.engine.block_pool import BlockPool, BlockState
from pdserve.engine.plan import ComputedPart, Limit, SequenceStep
from pdserve.engine.prefix import block_keys
from pdserve.engine.sequence import Sequence


def test_a_long_prompt_is_cut_by_the_token_budget() -> None:
    target = scheduler()
    target.add(fresh(40))
    seen = []
    for _ in range(3):
        plan = target.schedule(0.0)
        seen += spans(plan)
        execute(target, plan)
    assert seen == [(0, 16, False), (16, 16, False), (32, 8, True)]


def test_decodes_go_before_an_older_prefill() -> None:
    target = scheduler(tokens=8)
    long, short = fresh(40), fresh(2)
    target.add(short)
    target.add(long)
    execute(target, target.schedule(0.0))
    assert spans(target.schedule(0.0)) == [(2, 1, True), (6, 7, False)]


def test_waiting_sequences_are_first_come_first_served_and_nobody_overtakes_the_head() -> None:
    target = scheduler(num_blocks=4, model_len=17)
    first, second, third = fresh(8), fresh(12, branch=0), fresh(1)
    for sequence in (first, second, third):
        target.add(sequence)
    plan = target.schedule(0.0)
    assert [item.sequence for item in plan.scheduled] == [first]
    assert plan.limit is Limit.BLOCKS
    assert target.wanted_blocks == 3


def test_the_number_of_running_sequences_is_bounded() -> None:
    target = scheduler(seqs=2)
    for _ in range(3):
        target.add(fresh(2))
    plan = target.schedule(0.0)
    assert (len(plan.scheduled), plan.limit, target.num_running, target.num_waiting) == (2, Limit.SEQS, 2, 1)


def test_redeemed_sequences_are_admitted_ahead_of_fresh_ones() -> None:
    target = scheduler(seqs=1)
    waiting = fresh(4)
    target.add(waiting)
    late = redeemed(target, 6)
    target.add(late)
    plan = target.schedule(0.0)
    assert [item.sequence for item in plan.scheduled] == [late]
    assert spans(plan) == [(6, 1, True)]


def test_the_youngest_holder_is_evicted_and_returns_to_the_front_with_its_tokens() -> None:
    target = scheduler(num_blocks=4, model_len=17)
    old, young, waiting = fresh(8, 8), fresh(7, 8), fresh(2)
    for sequence in (old, young, waiting):
        target.add(sequence)
    execute(target, target.schedule(0.0))
    tokens = list(young.token_ids)
    plan = target.schedule(0.0)
    assert plan.preempted == (young,)
    assert [item.sequence for item in plan.scheduled] == [old]
    assert (young.num_computed, young.token_ids, young.block_ids) == (0, tokens, [])
    execute(target, plan)
    while plan.scheduled[0].sequence is old:
        execute(target, plan)
        plan = target.schedule(0.0)
    assert plan.scheduled[0].sequence is young
    execute(target, plan)
    assert young.num_recomputed_tokens == 7


def test_nobody_evicts_an_older_sequence_but_misses_the_step_instead() -> None:
    target = scheduler(num_blocks=4, model_len=17)
    old, young = fresh(7, 8), fresh(8, 8)
    target.add(old)
    target.add(young)
    execute(target, target.schedule(0.0))
    plan = target.schedule(0.0)
    assert [item.sequence for item in plan.scheduled] == [old]
    assert plan.preempted == ()
    assert young.num_computed == 8


def test_blocks_held_outside_stall_the_oldest_until_they_come_back() -> None:
    target = scheduler(num_blocks=4, model_len=17)
    leased = target.pool.take(2, BlockState.LEASED)
    sequence = fresh(8)
    target.add(sequence)
    execute(target, target.schedule(0.0))
    assert target.schedule(0.0).num_tokens == 0
    target.pool.release(leased, BlockState.LEASED)
    assert target.schedule(0.0).num_tokens == 1


def test_a_waiting_redeemed_sequence_gives_its_blocks_to_an_older_one() -> None:
    target = scheduler(num_blocks=4, seqs=1, model_len=17)
    old = fresh(8, 8)
    target.add(old)
    execute(target, target.schedule(0.0))
    late = redeemed(target, 8, branch=0)
    target.add(late)
    plan = target.schedule(0.0)
    assert plan.preempted == (late,)
    assert late.num_tokens == 9
    assert [item.sequence for item in plan.scheduled] == [old]


def test_queued_tokens_are_those_known_and_not_computed() -> None:
    target = scheduler()
    target.add(fresh(40))
    target.add(redeemed(target, 6, branch=0))
    assert target.queued_tokens == 41
    execute(target, target.schedule(0.0))
    assert target.queued_tokens == 26  # the redeemed one decoded a token and knows the next; 15 of the prompt are done


ARRIVAL = st.tuples(
    st.integers(0, 12),  # step at which it arrives
    st.integers(1, 40),  # prompt
    st.integers(1, 30),  # max_tokens
    st.sampled_from(["fresh", "hand off", "redeemed"]),
    st.sampled_from([0, 3, 8, 20, 40]),  # token from which on the prompt is another one
    st.one_of(st.none(), st.integers(1, 20)),  # steps until it is aborted
)


class Rig:
    """Drives a scheduler at random and checks every step."""

    def __init__(self, num_blocks: int, seqs: int, tokens: int, prefix_caching: bool) -> None:
        model_len = num_blocks * BLOCK + 1
        self.scheduler = scheduler(num_blocks, seqs, tokens, model_len, prefix_caching)
        self.pool = self.scheduler.pool
        self.memory = Memory()
        self.ends: dict[int, int] = {}
        self.parts: dict[int, list[ComputedPart]] = {}  # of sequences that have not ended
        self.leases: list[tuple[int, list[int]]] = []
        self.alive: list[Sequence] = []
        self.num_missed_steps = 0

    def add(self, kind: str, num_prompt: int, max_tokens: int, branch: int) -> Sequence | None:
        num_prompt = min(num_prompt, self.scheduler.max_model_len - 2)
        if kind == "redeemed":
            needed = -(-num_prompt // BLOCK)
            if max_tokens < 2 or not self.pool.can_take(needed + self.scheduler.wanted_blocks):
                return None
            num_held = len(self.pool.find(block_keys(prompt(num_prompt, branch), BLOCK)))
            sequence = redeemed(self.scheduler, num_prompt, max_tokens, branch)
            self.memory.write(sequence, num_held * BLOCK, num_prompt)
        else:
            sequence = fresh(num_prompt, max_tokens, hand_off=kind == "hand off", branch=branch)
        self.scheduler.add(sequence)
        self.ends[id(sequence)] = 0
        self.parts[id(sequence)] = []
        self.alive.append(sequence)
        return sequence

    def abort(self, sequence: Sequence, number: int) -> None:
        if self.scheduler.abort(sequence.request.id) is not None:
            self._end(sequence, number)

    def step(self, number: int) -> None:
        for expiry, blocks in [lease for lease in self.leases if lease[0] <= number]:
            self.pool.release(blocks, BlockState.LEASED)
            self.leases.remove((expiry, blocks))
        if not self.alive:
            assert self.scheduler.schedule(float(number)).scheduled == ()
            return
        oldest = min(self.alive, key=lambda s: s.order)
        before = (oldest.num_computed, oldest.num_tokens)
        plan = self.scheduler.schedule(float(number))
        assert plan.num_tokens <= self.scheduler.max_num_batched_tokens
        assert self.scheduler.num_running <= self.scheduler.max_num_seqs
        assert len({id(item.sequence) for item in plan.scheduled}) == len(plan.scheduled)
        assert not {id(s) for s in plan.preempted} & {id(item.sequence) for item in plan.scheduled}
        assert oldest not in plan.preempted, "the oldest was evicted"
        assert not any(self.parts[id(sequence)] for sequence in plan.preempted), "evicted while others read its blocks"
        self.memory.compute(plan)
        done = execute(self.scheduler, plan)
        for part in done.parts:
            self._book_part(part)
        for step in done.steps:
            self._book(step, number)
        self._check_claims()
        leased = self.leases or any(self.parts.values())
        stuck = oldest in self.alive and oldest.block_ids and (oldest.num_computed, oldest.num_tokens) == before
        # A redeemed one may have to join before it can evict; blocks that are leased cannot be had.
        self.num_missed_steps = self.num_missed_steps + 1 if stuck and not leased else 0
        assert self.num_missed_steps <= 1, "the oldest does not move"

    def _book_part(self, part: ComputedPart) -> None:
        parts = self.parts[id(part.sequence)]
        assert part.block_ids, "an empty part"
        assert part.first_block == sum(len(one.block_ids) for one in parts)
        assert all(one.first_token is None for one in parts), "a part after the last one"
        parts.append(part)

    def _book(self, done: SequenceStep, number: int) -> None:
        sequence = done.sequence
        assert self.ends[id(sequence)] == 0, "a token after the end"
        if done.finish:
            params = sequence.request.sampling
            limit = min(params.max_tokens, self.scheduler.max_model_len - sequence.num_prompt_tokens)
            assert sequence.num_output_tokens == limit
        if done.handed_off:
            parts = self.parts[id(sequence)]
            assert [block for part in parts for block in part.block_ids] == sequence.block_ids
            assert parts[-1].first_token == sequence.token_ids[-1]
        if done.finish or done.handed_off:
            self._end(sequence, number)

    def _end(self, sequence: Sequence, number: int) -> None:
        self.ends[id(sequence)] += 1
        self.alive.remove(sequence)
        handed = [block for part in self.parts.pop(id(sequence)) for block in part.block_ids]
        if handed:
            self.leases.append((number + 3, handed))

    def _check_claims(self) -> None:
        self.pool.check_integrity()
        running = Counter(block for one in self.alive for block in one.block_ids[one.num_handed_blocks :])
        leased = Counter(block for _, blocks in self.leases for block in blocks)
        leased.update(block for parts in self.parts.values() for part in parts for block in part.block_ids)
        claims = running + leased
        assert [self.pool.num_claims(block) for block in range(self.pool.num_blocks)] == [
            claims[block] for block in range(self.pool.num_blocks)
        ]
        assert self.pool.count(BlockState.LEASED) == len(leased)
        assert self.pool.count(BlockState.RUNNING) == len(set(running) - set(leased))


@settings(max_examples=200, deadline=None)
@given(
    arrivals=st.lists(ARRIVAL, max_size=14),
    num_blocks=st.integers(2, 14),
    seqs=st.integers(1, 6),
    tokens=st.integers(6, 20),
    prefix_caching=st.booleans(),
)
def test_every_sequence_ends_once_and_every_block_comes_back(
    arrivals: list[tuple[int, int, int, str, int, int | None]],
    num_blocks: int,
    seqs: int,
    tokens: int,
    prefix_caching: bool,
) -> None:
    rig = Rig(num_blocks, seqs, tokens, prefix_caching)
    aborts: list[tuple[int, Sequence]] = []
    number = 0
    while number <= 12 or rig.scheduler.has_work or rig.leases:
        for _, num_prompt, max_tokens, kind, branch, patience in [a for a in arrivals if a[0] == number]:
            sequence = rig.add(kind, num_prompt, max_tokens, branch)
            if sequence is not None and patience is not None:
                aborts.append((number + patience, sequence))
        for _, sequence in [entry for entry in aborts if entry[0] == number]:
            rig.abort(sequence, number)
        rig.step(number)
        number += 1
        assert number < 3000, "no end in sight"
    assert all(count == 1 for count in rig.ends.values())
    assert rig.pool.num_free == num_blocks
    assert prefix_caching or rig.pool.num_cached == 0


def test_the_pool_catches_a_double_free_and_a_wrong_move() -> None:
    pool = BlockPool(4)
    blocks = pool.take(2, BlockState.RUNNING)
    pool.move(blocks, BlockState.RUNNING, BlockState.LEASED)
    with pytest.raises(AssertionError, match="is leased, not running"):
        pool.release(blocks, BlockState.RUNNING)
    pool.release(blocks, BlockState.LEASED)
    with pytest.raises(AssertionError, match="is free, not leased"):
        pool.release(blocks, BlockState.LEASED)
    with pytest.raises(AssertionError, match="took 5 blocks of 4"):
        pool.take(5, BlockState.RUNNING)
    pool.check_integrity()


def test_a_failed_release_changes_nothing() -> None:
    pool = BlockPool(4)
    (mine,) = pool.take(1, BlockState.RUNNING)
    with pytest.raises(AssertionError):
        pool.release([mine, mine], BlockState.RUNNING)
    with pytest.raises(AssertionError):
        pool.release([mine, -1], BlockState.RUNNING)
    assert pool.state(mine) is BlockState.RUNNING
    pool.check_integrity()


def test_promises_are_counted_and_take_nothing() -> None:
    pool = BlockPool(4)
    pool.reserve(6)
    assert (pool.num_reserved, pool.num_free) == (6, 4)
    pool.unreserve(6)
    with pytest.raises(AssertionError):
        pool.unreserve(1)
