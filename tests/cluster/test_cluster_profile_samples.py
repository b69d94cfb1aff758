"""Steps become samples: periods where there are any, cells of like shapes, without what something else held up."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from planner_setups import make_profile

from pdserve.cluster.planner.step_model import StepModel
from pdserve.cluster.planner.step_sample import StepSample
from pdserve.cluster.planner.step_shape import ALONE, Company, StepShape
from pdserve.cluster.profiling_samples import Timing, bias_of, gap_of, samples_of, timings_of
from pdserve.cluster.step_records import StepRecord

DECODE = StepShape(0, 0.0, 4, 400)
PREFILL = StepShape(64, 2048.0, 0, 0)


def decode(batch: int, context_tokens: int = 100) -> StepShape:
    return StepShape(0, 0.0, batch, batch * context_tokens)


def records(*steps: tuple[float, float, bool], first: int = 0, shape: StepShape = DECODE) -> list[StepRecord]:
    """Steps by start, duration and whether work is left."""
    return [
        StepRecord(first + number, started_s, duration_s, duration_s, shape, leaves_work)
        for number, (started_s, duration_s, leaves_work) in enumerate(steps)
    ]


def timings(durations_s: Iterable[float], shape: StepShape = DECODE) -> list[Timing]:
    return [Timing(shape, duration_s, duration_s, None) for duration_s in durations_s]


def test_a_step_that_follows_at_once_costs_its_period_and_the_first_one_its_duration() -> None:
    found = timings_of([records((0.0, 0.010, True), (0.012, 0.010, True), (0.024, 0.010, False))])[0]
    assert [one.cost_s for one in found] == pytest.approx([0.010, 0.012, 0.012])
    assert [one.period_s is None for one in found] == [True, False, False]


def test_idleness_and_lost_steps_leave_no_period() -> None:
    idle = timings_of([records((0.0, 0.010, False), (5.0, 0.010, True))])[0]
    assert idle[1].period_s is None
    lost = records((0.0, 0.010, True)) + records((0.030, 0.010, True), first=2)
    assert [one.period_s for one in timings_of([lost])[0]] == [None, None]


def test_nearly_equal_shapes_become_one_sample_with_their_mean() -> None:
    near = StepShape(0, 0.0, 4, 404)
    (sample,) = samples_of([*timings([0.010]), *timings([0.012], near)])
    assert sample.duration_s == pytest.approx(0.011)
    assert sample.shape == StepShape(0, 0.0, 4, 402)
    assert len(samples_of([*timings([0.010]), *timings([0.020], decode(8)), *timings([0.030], PREFILL)])) == 3


def test_a_worker_whose_work_had_to_be_waited_for_was_idle() -> None:
    """A prompt under way counts as work before there is anything to compute."""
    (before, after) = timings_of([records((0.0, 0.010, True), (5.0, 0.010, True))])[0]
    assert before.cost_s == after.cost_s == pytest.approx(0.010)


def test_a_step_knows_how_much_company_it_had() -> None:
    one = records((0.0, 0.010, True), (0.010, 0.010, False))
    others = [records((0.005, 0.010, False)), records((0.0, 0.020, False), shape=PREFILL), []]
    first, second = timings_of([one, *others])[0]
    assert first.company == pytest.approx(Company(prefill=1.0 / 3, decode=0.5 / 3))
    assert second.company == pytest.approx(Company(prefill=1.0 / 3, decode=0.5 / 3))
    assert timings_of([one])[0][0].company == ALONE


def test_a_mixed_step_is_company_that_prefills() -> None:
    mixed = StepShape(64, 64 * 32.0, 8, 4000)
    beside = timings_of([records((0.0, 0.010, False)), records((0.0, 0.010, False), shape=mixed)])[0]
    assert beside[0].company == Company(prefill=1.0, decode=0.0)


def test_steps_with_different_company_are_different_samples() -> None:
    alone, beside = Timing(DECODE, 0.010, 0.010, None), Timing(DECODE, 0.014, 0.014, None, Company(decode=1.0))
    samples = samples_of([alone, beside])
    assert [one.company for one in samples] == [ALONE, Company(decode=1.0)]
    assert [one.duration_s for one in samples] == pytest.approx([0.010, 0.014])


def test_workers_of_other_machines_are_no_company() -> None:
    one, other = records((0.0, 0.010, False)), records((0.0, 0.020, False))
    shared = timings_of([one, other, other], ("a", "a", "b"))[0][0].company.decode
    apart = timings_of([one, other, other], ("a", "b", "b"))[0][0].company.decode
    assert shared == pytest.approx(1.0)
    assert apart == 0.0


def test_a_step_that_something_else_held_up_does_not_count() -> None:
    (sample,) = samples_of(timings([0.010, 0.011, 0.010, 0.250]))
    assert sample.duration_s == pytest.approx(0.031 / 3)


def test_steps_whose_thread_had_to_wait_for_its_core_do_not_count() -> None:
    quiet = [Timing(DECODE, 0.010, 0.0099, None)] * 6
    held = [Timing(DECODE, 0.016, 0.0099, None)] * 10
    (sample,) = samples_of([*quiet, *held])
    assert sample.duration_s == pytest.approx(0.010)


def test_on_request_disturbed_steps_count_like_all_others() -> None:
    (sample,) = samples_of(
        [Timing(DECODE, 0.010, 0.010, None), Timing(DECODE, 0.050, 0.010, None)], with_disturbed=True
    )
    assert sample.duration_s == pytest.approx(0.030)


def test_a_thread_that_always_waits_for_its_device_is_not_disturbed_by_it() -> None:
    (sample,) = samples_of([Timing(DECODE, 0.010, 0.001, None)] * 8)
    assert sample.duration_s == pytest.approx(0.010)


def test_what_a_period_has_beyond_a_duration_grows_with_the_batch() -> None:
    found = gap_of(
        Timing(decode(batch), 0.010, 0.010, 0.010 + 1e-4 + 2e-6 * batch) for batch in (1, 8, 32, 64) for _ in range(5)
    )
    assert found is not None
    assert found.fixed_s == pytest.approx(1e-4)
    assert found.per_sequence_s == pytest.approx(2e-6)
    assert found.num_samples == 20
    assert gap_of(timings([0.010])) is None


def test_bias_is_what_does_not_even_out() -> None:
    model = StepModel(make_profile())
    exact = [StepSample(shape, model.duration_s(shape)) for shape in (DECODE, PREFILL)]
    assert bias_of(model, exact) == pytest.approx(0.0)
    slower = [StepSample(one.shape, 1.25 * one.duration_s) for one in exact]
    assert bias_of(model, slower) == pytest.approx(-0.2)
    assert bias_of(model, []) == 0.0
