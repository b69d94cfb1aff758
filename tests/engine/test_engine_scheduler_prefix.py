"""What the scheduler shares between sequences that begin alike, and what that does to budgets, room and preemption."""

from __future__ import annotations

import pytest
from engine_runs import request
from scheduler_runs import BLOCK, TOKEN, drain, execute, fresh, prompt, redeemed, scheduler, spans, step

from pdserve.engine.block_pool import BlockState
from pdserve.engine.plan import Limit
from pdserve.engine.sequence import Sequence


def test_a_second_prompt_starts_behind_what_it_has_in_common_with_the_first() -> None:
    target = scheduler()
    target.add(fresh(10))
    drain(target)
    second = fresh(12, branch=9)
    target.add(second)
    plan = target.schedule(0.0)
    assert spans(plan) == [(8, 4, True)]
    assert (plan.num_prefix_query_tokens, plan.num_prefix_hit_tokens, second.num_cached_tokens) == (12, 8, 8)
    execute(target, plan)
    drain(target)
    assert target.pool.num_free == target.pool.num_blocks


def test_a_prompt_that_is_known_as_a_whole_still_computes_its_last_block() -> None:
    target = scheduler()
    for _ in range(2):
        target.add(fresh(8, max_tokens=1))
        plan = target.schedule(0.0)
        execute(target, plan)
    assert spans(plan) == [(4, 4, True)]


def test_a_running_sequence_shares_its_blocks_and_they_stay_until_all_are_done() -> None:
    target = scheduler()
    first, second = fresh(9, max_tokens=2), fresh(10, max_tokens=9)
    target.add(first)
    step(target)
    target.add(second)
    plan = target.schedule(0.0)
    shared = second.block_ids[:2]
    assert shared == first.block_ids[:2]
    assert [target.pool.num_claims(block) for block in second.block_ids] == [2, 2, 1]
    execute(target, plan)
    assert first.block_ids == [], "it has finished"
    assert [target.pool.num_claims(block) for block in shared] == [1, 1]
    drain(target)
    assert target.pool.num_free == target.pool.num_blocks


def test_output_tokens_are_shared_like_prompt_tokens() -> None:
    target = scheduler()
    first = fresh(6, max_tokens=8)
    target.add(first)
    drain(target)
    assert first.num_output_tokens == 8
    follow_up = Sequence(request([*first.token_ids, 5, 6], 2), 0.0)
    target.add(follow_up)
    assert spans(target.schedule(0.0)) == [(12, 4, True)], "13 tokens had been computed: three full blocks"


def test_nothing_is_shared_or_kept_when_switched_off() -> None:
    target = scheduler(prefix_caching=False)
    for _ in range(2):
        target.add(fresh(10))
        plan = target.schedule(0.0)
        assert spans(plan) == [(0, 10, True)]
        execute(target, plan)
        drain(target)
    assert (plan.num_prefix_query_tokens, plan.num_prefix_hit_tokens) == (0, 0)
    assert target.pool.num_cached == 0
    assert target.claims.hold(prompt(10)) == []


def test_cached_blocks_that_are_shared_are_not_counted_as_room_too() -> None:
    target = scheduler(num_blocks=4, model_len=17)
    target.add(fresh(8, max_tokens=1))
    drain(target)
    leased = target.pool.take(1, BlockState.LEASED)
    assert (target.pool.num_free, target.pool.num_cached) == (3, 2)
    target.add(fresh(13, max_tokens=1))  # four blocks: the two cached ones, and two of which only one is there
    assert target.wanted_blocks == 4
    assert target.schedule(0.0).limit is Limit.BLOCKS
    target.pool.release(leased, BlockState.LEASED)
    assert spans(target.schedule(0.0)) == [(8, 5, True)]


def test_blocks_that_others_run_over_need_no_room() -> None:
    target = scheduler(num_blocks=4, model_len=17)
    first, second = fresh(9), fresh(9, branch=8)
    target.add(first)
    step(target)
    target.add(second)
    assert target.wanted_blocks == 1
    plan = target.schedule(0.0)
    assert spans(plan) == [(9, 1, True), (8, 1, True)]
    assert first.block_ids[:2] == second.block_ids[:2]
    execute(target, plan)
    drain(target)
    assert target.pool.num_free == 4


def test_a_preempted_sequence_finds_its_own_blocks_again_and_that_is_no_hit() -> None:
    target = scheduler(num_blocks=5, model_len=21)
    old, young = fresh(7, max_tokens=6, branch=0), fresh(10)
    target.add(old)
    target.add(young)
    step(target)
    step(target)
    plan = target.schedule(0.0)
    assert plan.preempted == (young,)
    execute(target, plan)
    assert target.schedule(0.0).limit is Limit.BLOCKS, "its own blocks are cached, and no room beside them"
    target.abort(old.request.id)
    plan = target.schedule(0.0)
    assert spans(plan) == [(8, 3, True)]
    assert (plan.num_prefix_query_tokens, plan.num_prefix_hit_tokens, young.num_cached_tokens) == (0, 0, 0)
    execute(target, plan)
    assert young.num_recomputed_tokens == 2, "of the ten that were computed, eight were found"


def test_a_preempted_sequence_whose_blocks_were_lost_computes_all_again_and_is_found_again() -> None:
    target = scheduler(num_blocks=5, model_len=21)
    old, young = fresh(7, branch=0), fresh(10)
    target.add(old)
    target.add(young)
    step(target)
    step(target)
    assert target.schedule(0.0).preempted == (young,)
    target.abort(old.request.id)
    target.pool.release(target.pool.take(5, BlockState.RECEIVING), BlockState.RECEIVING)
    plan = target.schedule(0.0)
    assert spans(plan) == [(0, 11, True)]
    execute(target, plan)
    assert young.num_recomputed_tokens == 10
    assert target.claims.hold(prompt(8)) == young.block_ids[:2]


def test_a_victim_that_frees_nothing_is_followed_by_the_next_one() -> None:
    target = scheduler(num_blocks=4, model_len=17)
    old, middle, young = fresh(8, branch=0), fresh(3, branch=1), fresh(4)
    for sequence in (old, middle, young):
        target.add(sequence)
    step(target)
    held = target.claims.hold(prompt(4))
    assert held == young.block_ids
    plan = target.schedule(0.0)
    assert plan.preempted == (young, middle)
    assert [item.sequence for item in plan.scheduled] == [old]
    assert target.pool.state(held[0]) is BlockState.RUNNING
    target.pool.release(held, BlockState.RUNNING)
    execute(target, plan)
    drain(target)
    assert target.pool.num_free == 4


def test_the_blocks_of_a_redeemed_prompt_are_found_by_the_next_one_and_held_by_the_next_hand_off() -> None:
    target = scheduler()
    target.add(redeemed(target, 10, max_tokens=2))
    running = fresh(10)
    target.add(running)
    assert spans(target.schedule(0.0)) == [(10, 1, True), (8, 2, True)]
    late = redeemed(target, 8)
    assert late.block_ids == running.block_ids[:2], "all full blocks, although no token of the prompt is left"
    assert target.pool.num_claims(late.block_ids[0]) == 3


def test_what_a_hand_off_holds_survives_the_cache_and_comes_back_to_it() -> None:
    target = scheduler(num_blocks=4, model_len=17)
    target.add(fresh(8, max_tokens=1))
    drain(target)
    held = target.claims.hold(prompt(9))
    assert len(held) == 2
    others = target.pool.take(2, BlockState.RECEIVING)
    assert not target.pool.can_take(1)
    target.pool.release(others, BlockState.RECEIVING)
    target.pool.release(held, BlockState.RUNNING)
    assert (target.pool.num_free, target.pool.num_cached) == (4, 2)


def test_a_handed_off_prompt_leaves_in_the_parts_in_which_it_is_computed() -> None:
    target = scheduler(tokens=10)
    sequence = fresh(27, hand_off=True)
    target.add(sequence)
    seen = []
    for _ in range(3):
        seen += [(part.first_block, part.block_ids, part.first_token) for part in step(target).parts]
    ids = tuple(sequence.block_ids)
    assert seen == [(0, ids[:2], None), (2, ids[2:5], None), (5, ids[5:], TOKEN)]
    assert not target.has_work
    assert target.pool.count(BlockState.LEASED) == 7


def test_blocks_are_leased_as_soon_as_they_are_full_and_read_on() -> None:
    target = scheduler(tokens=8)
    sequence = fresh(20, hand_off=True)
    target.add(sequence)
    (part,) = step(target).parts
    assert [target.pool.state(block) for block in sequence.block_ids] == [BlockState.LEASED] * 2 + [
        BlockState.RUNNING
    ] * 3
    assert part.block_ids == tuple(sequence.block_ids[:2])
    assert spans(target.schedule(0.0)) == [(8, 8, False)]


def test_a_prompt_that_fits_one_step_is_one_part() -> None:
    target = scheduler()
    sequence = fresh(6, hand_off=True)
    target.add(sequence)
    (part,) = step(target).parts
    assert (part.first_block, part.block_ids, part.first_token) == (0, tuple(sequence.block_ids), TOKEN)


def test_a_step_that_fills_no_block_makes_no_part() -> None:
    target = scheduler(seqs=1, tokens=3)
    target.add(fresh(9, hand_off=True))
    assert [[len(part.block_ids) for part in step(target).parts] for _ in range(3)] == [[], [1], [2]]


def test_the_first_part_includes_what_was_known_already() -> None:
    target = scheduler(tokens=8)
    target.add(fresh(8, max_tokens=1))
    drain(target)
    sequence = fresh(20, hand_off=True)
    target.add(sequence)
    assert [(part.first_block, len(part.block_ids)) for part in step(target).parts] == [(0, 4)]
    assert sequence.num_cached_tokens == 8


@pytest.mark.parametrize("end", ["abort", "finish"])
def test_blocks_that_were_handed_over_outlive_their_sequence(end: str) -> None:
    target = scheduler(tokens=8)
    sequence = fresh(13, max_tokens=1, hand_off=True)
    target.add(sequence)
    (part,) = step(target).parts
    if end == "abort":
        target.abort(sequence.request.id)
    else:
        assert step(target).parts == ()
    assert not target.has_work
    assert (target.pool.count(BlockState.LEASED), target.pool.count(BlockState.RUNNING)) == (2, 0)
    target.pool.release(part.block_ids, BlockState.LEASED)
    assert target.pool.num_free == target.pool.num_blocks


def test_a_sequence_that_has_handed_something_over_is_not_evicted_for_an_older_one() -> None:
    target = scheduler(num_blocks=5, tokens=8, model_len=21)
    old, hand_off = fresh(4, max_tokens=8, branch=0), fresh(15, hand_off=True)
    target.add(old)
    target.add(hand_off)
    leased: list[int] = []
    for num_blocks in (1, 2, 1):  # the old one needs a second block and misses two steps
        plan = target.schedule(0.0)
        assert plan.preempted == ()
        (part,) = execute(target, plan).parts
        assert len(part.block_ids) == num_blocks
        leased += part.block_ids
    assert part.first_token == TOKEN
    assert target.schedule(0.0).num_tokens == 0
    target.pool.release(leased, BlockState.LEASED)
    assert [item.sequence for item in target.schedule(0.0).scheduled] == [old]


def test_two_leases_and_a_running_sequence_may_share_a_prefix() -> None:
    target = scheduler()
    first, second, third = fresh(9, hand_off=True), fresh(10, hand_off=True), fresh(11)
    leases = []
    for sequence in (first, second, third):
        target.add(sequence)
        leases += [part.block_ids for part in step(target).parts]
    shared = first.block_ids[:2]
    assert second.block_ids[:2] == third.block_ids[:2] == shared
    assert [target.pool.num_claims(block) for block in shared] == [3, 3]
    drain(target)
    for block_ids in leases:
        target.pool.release(block_ids, BlockState.LEASED)
        target.pool.check_integrity()
    assert target.pool.num_free == target.pool.num_blocks
    assert len(target.claims.hold(prompt(8))) == 8 // BLOCK
