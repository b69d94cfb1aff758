"""Standing: counting the decodes that only go on changes no decision, no latency and no count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_setups import make_config, make_profile

from pdserve.cluster.arrivals import Arrival, Lengths, Workload, synthesize
from pdserve.cluster.planner.simulation import Outcome, simulate
from pdserve.cluster.planner.source import OpenLoop
from pdserve.cluster.planner.standing import StandingScheduler
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.sequence import Sequence
from pdserve.proto.types import HandoffId, Role, SamplingParams, TokenInfo, WorkerRequest

SIZES = [(1, 1, 0), (2, 1, 0), (1, 3, 0), (0, 0, 2), (1, 1, 1)]


def both(config: Any, arrivals: list[Arrival]) -> tuple[Outcome, Outcome]:
    profiles = dict.fromkeys(Role, make_profile())
    one, other = (simulate(config, profiles, OpenLoop(iter(arrivals)), exact=exact) for exact in (True, False))
    return one, other


def assert_equal(exact: Outcome, fast: Outcome) -> None:
    assert fast.records == exact.records
    assert fast.end_s == exact.end_s
    assert fast.busy_s == exact.busy_s
    assert fast.num_steps == exact.num_steps
    assert fast.num_preemptions == exact.num_preemptions
    assert fast.num_kv_bytes == exact.num_kv_bytes
    assert set(fast.blocks_left.values()) == {0}
    assert set(exact.handoffs_left.values()) == set(fast.handoffs_left.values()) == {0}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("num_blocks", [None, 90], ids=["roomy", "tight"])
def test_standing_changes_nothing(sizes: tuple[int, int, int], num_blocks: int | None) -> None:
    workload = Workload(Lengths(300, 700), Lengths(60, 200), 15.0)
    arrivals = list(synthesize(workload, 150, np.random.default_rng(3)))
    arrivals = [Arrival(one.at_s, min(one.num_prompt_tokens, 900), min(one.max_tokens, 500)) for one in arrivals]
    engine = {} if num_blocks is None else {"num_blocks": num_blocks}
    exact, fast = both(make_config(*sizes, engine=engine), arrivals)
    assert_equal(exact, fast)
    if num_blocks is not None and sizes[1] + sizes[2] < 3:
        assert sum(exact.num_preemptions.values()) > 0, "the tight pool is not tight: this tests nothing"


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.sampled_from(SIZES),
    seed=st.integers(0, 10_000),
    num_blocks=st.integers(30, 120),
    block_size=st.sampled_from([1, 4, 16]),
    max_num_seqs=st.integers(2, 40),
    rate=st.sampled_from([3.0, 30.0, 300.0]),
    timeout_s=st.sampled_from([0.5, 600.0]),
    output=st.sampled_from([Lengths(12, 40), Lengths(1, 1), Lengths(1, 30)]),
)
def test_standing_changes_nothing_whatever_is_scarce(
    sizes: tuple[int, int, int],
    seed: int,
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    rate: float,
    timeout_s: float,
    output: Lengths,
) -> None:
    """Answers of one token too: nothing is handed off for those."""
    arrivals = list(synthesize(Workload(Lengths(20, 60), output, rate), 40, np.random.default_rng(seed)))
    engine = {"num_blocks": num_blocks, "block_size": block_size, "max_num_seqs": max_num_seqs}
    config = make_config(
        *sizes, engine={**engine, "max_num_batched_tokens": 64}, router={"default_timeout_s": timeout_s}
    )
    assert_equal(*both(config, arrivals))


def make_scheduler(num_blocks: int) -> StandingScheduler:
    return StandingScheduler(
        BlockPool(num_blocks),
        block_size=4,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_model_len=256,
        prefix_caching=False,
    )


def request(name: str, num_prompt_tokens: int, max_tokens: int) -> WorkerRequest:
    return WorkerRequest(HandoffId(name, 0, 0), (0,) * num_prompt_tokens, SamplingParams(max_tokens=max_tokens), 600.0)


def step(scheduler: StandingScheduler, now_s: float) -> int:
    """How many sequences the production scheduler had to look at."""
    plan = scheduler.schedule(now_s)
    scheduler.commit(plan, [TokenInfo(0)] * len(plan.sampled), now_s)
    return len(plan.scheduled)


def test_only_the_first_and_the_last_token_are_looked_at() -> None:
    scheduler = make_scheduler(100)
    for name in "ab":
        scheduler.add(Sequence(request(name, 10, 20), 0.0))
    assert [step(scheduler, float(number)) for number in range(20)] == [2] + [0] * 18 + [2]
    assert not scheduler.has_work
    assert scheduler.pool.num_free == 100


def test_what_it_remembers_of_ends_is_of_those_that_stand_now() -> None:
    """In a pool that is scarce all the time everybody goes back and stands again at every other step."""
    scheduler, num_steps = make_scheduler(16), 0
    for number in range(40):
        scheduler.add(Sequence(request(str(number), 7, 30), 0.0))
    while scheduler.has_work:
        step(scheduler, float(num_steps))
        num_steps += 1
        remembered = [sequence for ending in scheduler._ending.values() for sequence in ending]
        assert len(remembered) == len(set(remembered))
        assert set(remembered) == set(scheduler._since)
        assert all(scheduler._ending.values())
    assert num_steps > 200
    assert not scheduler._ending


def test_an_aborted_one_comes_back_with_all_its_tokens_and_blocks() -> None:
    scheduler = make_scheduler(100)
    scheduler.add(Sequence(request("a", 10, 50), 0.0))
    for number in range(8):
        step(scheduler, float(number))
    assert (scheduler.num_running, scheduler.queued_tokens) == (1, 1)
    sequence = scheduler.abort(HandoffId("a", 0, 0))
    assert sequence is not None
    assert (sequence.num_tokens, sequence.num_computed, sequence.last_token_s) == (18, 17, 7.0)
    assert (scheduler.num_running, scheduler.queued_tokens, scheduler.pool.num_free) == (0, 0, 100)
    assert step(scheduler, 9.0) == 0
