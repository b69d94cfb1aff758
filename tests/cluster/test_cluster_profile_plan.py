"""The load of a profile reaches the ends of every range, and asks no worker for more than it can take."""

from __future__ import annotations

import itertools

import pytest

from pdserve.cluster.profiling_plan import (
    KV_SHARE,
    NUM_DECODE_STEPS,
    Burst,
    WorkerLimits,
    doublings,
    growing_rounds,
    plan_bursts,
)
from pdserve.proto.errors import ConfigError

USUAL = WorkerLimits(max_num_seqs=64, chunk_tokens=512, max_model_len=2048, kv_capacity_tokens=32_768)
SMALL = WorkerLimits(max_num_seqs=4, chunk_tokens=64, max_model_len=128, kv_capacity_tokens=256)
WIDE = WorkerLimits(max_num_seqs=256, chunk_tokens=2048, max_model_len=4096, kv_capacity_tokens=8_192)
ALL = (USUAL, SMALL, WIDE)


def streams(bursts: tuple[Burst, ...]) -> list[Burst]:
    return [burst for burst in bursts if burst.num_streams]


def test_doublings_end_with_the_largest_itself() -> None:
    assert doublings(64) == (1, 2, 4, 8, 16, 32, 64)
    assert doublings(100, 32) == (32, 64, 100)
    assert doublings(4, 8) == (4,)


@pytest.mark.parametrize("limits", ALL, ids=["usual", "small", "wide"])
def test_batches_and_chunks_reach_from_the_smallest_to_the_limit(limits: WorkerLimits) -> None:
    bursts = plan_bursts(limits)
    batches = {burst.num_streams for burst in streams(bursts) if not burst.prompts and burst.num_steps > 1}
    assert {1, limits.max_num_seqs} <= batches
    prompts = {tokens for burst in bursts if not burst.num_streams for tokens in burst.prompts}
    assert min(prompts) <= 8
    assert max(prompts) >= min(limits.max_model_len - 1, int(KV_SHARE * limits.kv_capacity_tokens))
    assert any(burst.num_streams and burst.prompts for burst in bursts), "no mixed steps"
    assert any(burst.num_steps == 1 for burst in bursts), "no steps with several prompts"


@pytest.mark.parametrize("limits", ALL, ids=["usual", "small", "wide"])
def test_nothing_is_longer_than_the_context_or_preempts(limits: WorkerLimits) -> None:
    for burst in plan_bursts(limits):
        assert all(0 < tokens < limits.max_model_len for tokens in burst.prompts)
        assert burst.context_tokens + burst.num_steps <= limits.max_model_len
        assert burst.num_streams <= limits.max_num_seqs
        if burst.num_steps > 1:
            grown = burst.num_streams * (burst.context_tokens + burst.num_steps)
            assert grown <= limits.kv_capacity_tokens


@pytest.mark.parametrize("limits", ALL, ids=["usual", "small", "wide"])
def test_the_first_of_a_batch_still_decodes_when_the_last_prompt_is_computed(limits: WorkerLimits) -> None:
    for burst in streams(plan_bursts(limits)):
        if not burst.prompts and burst.num_steps > 1:
            steps_of_prompts = burst.num_streams * burst.context_tokens / limits.chunk_tokens
            assert burst.num_steps >= steps_of_prompts + NUM_DECODE_STEPS


def test_contexts_of_one_batch_differ_so_that_their_price_can_be_told() -> None:
    by_batch: dict[int, set[int]] = {}
    for burst in streams(plan_bursts(USUAL)):
        if not burst.prompts and burst.num_steps > 1:
            by_batch.setdefault(burst.num_streams, set()).add(burst.context_tokens)
    assert all(max(contexts) >= 4 * min(contexts) for contexts in by_batch.values())


def test_a_quarter_of_the_work_has_steps_of_every_kind() -> None:
    bursts = plan_bursts(USUAL)
    work = [burst.num_streams * burst.context_tokens + sum(burst.prompts) for burst in bursts]
    first = [burst for number, burst in enumerate(bursts) if sum(work[: number + 1]) <= sum(work) / 4]
    assert {1, 64} <= {burst.num_streams for burst in first if not burst.prompts}
    assert any(burst.num_streams and burst.prompts for burst in first)
    assert max(max(burst.prompts) for burst in first if burst.prompts) >= USUAL.chunk_tokens // 4


def test_rounds_grow_until_they_hold_everything_so_that_the_cheap_is_measured_at_several_moments() -> None:
    bursts = plan_bursts(USUAL)
    rounds = list(itertools.islice(growing_rounds(bursts), 6))
    assert all(list(some) == list(bursts[: len(some)]) for some in rounds)
    sizes = [len(some) / len(bursts) for some in rounds]
    assert sizes[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=1 / len(bursts))
    assert sizes[3:] == [1.0, 1.0, 1.0]


def test_a_worker_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="too small to profile"):
        plan_bursts(WorkerLimits(4, 16, 32, 4096))
