"""Attainment of runs: what counts as a hit, what is cut, and intervals that cover although neighbours share a queue."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from planner_queues import (
    QUEUES,
    exponential_times,
    mm1_goodput,
    of_classes,
    single_server,
    swinging,
)

from pdserve.cluster.planner.attainment import Attainment, OutcomeLog, Outcomes, measure, t_quantile
from pdserve.cluster.planner.crossing import cross
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import SLO, RequestTiming

SLO_OF_TEST = SLO(ttft_ms=500.0, tpot_ms=50.0)


def timing(at_s: float, ttft_s: float | None, tpot_s: float, num_output_tokens: int = 11) -> RequestTiming:
    if ttft_s is None:
        return RequestTiming(at_s, at_s, end_s=at_s + 1)
    last_s = at_s + ttft_s + tpot_s * (num_output_tokens - 1)
    return RequestTiming(at_s, at_s, at_s + ttft_s, last_s, last_s, num_output_tokens)


def logged(*timings: RequestTiming) -> Outcomes:
    log = OutcomeLog()
    for one in timings:
        log.add(one, SLO_OF_TEST)
    return log.outcomes()


def every(num_requests: int, ok: bool = True) -> Outcomes:
    """A request a second, each of which takes half a second."""
    at_s = np.arange(num_requests, dtype=np.float64)
    return Outcomes(at_s, at_s + 0.5, np.full(num_requests, ok), np.full(num_requests, True))


def test_a_hit_meets_both_targets_and_a_refusal_neither() -> None:
    found = logged(timing(0.0, 0.4, 0.04), timing(1.0, 0.6, 0.04), timing(2.0, 0.4, 0.06), timing(3.0, None, 0.0))
    assert found.ttft_ok.tolist() == [True, False, True, False]
    assert found.tpot_ok.tolist() == [True, True, False, False]
    assert found.ok.tolist() == [True, False, False, False]


def test_a_log_judges_as_the_protocol_does() -> None:
    random = np.random.default_rng(0)
    timings = [timing(float(at), random.uniform(0, 1), random.uniform(0, 0.1), 1 + at % 3) for at in range(300)]
    assert logged(*timings).ok.tolist() == [one.meets(SLO_OF_TEST) for one in timings]


def test_a_request_that_failed_after_its_first_token_is_a_miss() -> None:
    log = OutcomeLog()
    log.add(timing(0.0, 0.1, 0.01), SLO_OF_TEST, failed=True)
    assert not log.outcomes().ok.any()


def test_outcomes_come_in_order_of_arrival_whatever_the_order_in_which_requests_ended() -> None:
    log = OutcomeLog()
    log.add(timing(2.0, 0.9, 0.01), SLO_OF_TEST, slo_class=1)
    log.add(timing(1.0, 0.1, 0.01), SLO_OF_TEST)
    found = log.outcomes()
    assert found.arrival_s.tolist() == [1.0, 2.0]
    assert found.ok.tolist() == [True, False]
    assert found.slo_class is not None
    assert found.slo_class.tolist() == [0, 1]


def test_a_log_says_how_far_off_the_targets_were() -> None:
    found = logged(timing(0.0, 1.0, 0.025), timing(1.0, None, 0.0))
    assert found.ttft_used is not None
    assert found.tpot_used is not None
    assert found.ttft_used.tolist() == [2.0, math.inf]
    assert found.tpot_used.tolist() == pytest.approx([0.5, math.inf])


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 arrivals, but 2 values"):
        Outcomes(np.arange(3.0), np.arange(3.0) + 1, np.ones(2, dtype=np.bool_), np.ones(3, dtype=np.bool_))


def test_arrivals_out_of_order_are_refused() -> None:
    with pytest.raises(ConfigError, match="sort all columns by arrival_s"):
        Outcomes(np.array([1.0, 0.0]), np.array([2.0, 2.0]), np.ones(2, dtype=np.bool_), np.ones(2, dtype=np.bool_))


def test_start_and_end_of_a_run_are_not_judged() -> None:
    """A queue just short of saturation takes long to fill: the first requests find less than those to come."""
    outcomes = single_server(exponential_times, 5.0)(0.9, 1, 20_000)
    found = measure([outcomes])
    assert found.warmup_requests >= 1_000
    assert found.tail_requests > 0
    assert found.num_requests + found.warmup_requests + found.tail_requests == 20_000


def test_too_few_requests_say_so_and_promise_nothing() -> None:
    found = measure([every(15)])
    assert (found.low, found.high, found.is_enough) == (0.0, 1.0, False)
    assert found.reason == "hardly any requests"


def test_batches_that_are_still_correlated_are_not_enough() -> None:
    assert not measure([single_server(exponential_times, 20.0)(0.99, 3, 1_000)]).is_enough


def test_no_miss_is_not_certainty() -> None:
    assert 0.9 < measure([every(1_000)]).low < 0.999
    assert 0.001 < measure([every(1_000, ok=False)]).high < 0.1


def test_more_runs_narrow_the_interval() -> None:
    run = QUEUES["M/M/1"].run
    one, eight = measure([run(0.6, 0, 2_000)]), measure([run(0.6, seed, 2_000) for seed in range(8)])
    assert eight.high - eight.low < 0.6 * (one.high - one.low)


def binomial(found: Attainment) -> tuple[float, float]:
    half = NormalDist().inv_cdf(0.975) * math.sqrt(found.value * (1 - found.value) / found.num_requests)
    return found.value - half, found.value + half


def test_the_interval_covers_where_a_binomial_one_is_far_too_narrow() -> None:
    truth = 1 - 0.8 * math.exp(-(1 - 0.8) * 5.0)
    run = QUEUES["M/M/1"].run
    found = [measure([run(0.8, seed, 10_000)]) for seed in range(100)]
    naive = [low <= truth <= high for low, high in map(binomial, found)]
    ours = [one.low <= truth <= one.high for one in found]
    assert np.mean(naive) < 0.6
    assert np.mean(ours) >= 0.9


def test_intervals_are_not_wider_than_they_have_to_be() -> None:
    """About as wide as the spread from seed to seed."""
    run = QUEUES["M/M/1"].run
    found = [measure([run(0.63, seed, 10_000)]) for seed in range(40)]
    spread = float(np.std([one.value for one in found]))
    width = float(np.mean([one.high - one.low for one in found]))
    assert 0.8 < width / (2 * 1.96 * spread) < 1.5


def test_each_class_is_judged_by_itself() -> None:
    outcomes = of_classes((0.5, 1e9), (0.5, 0.5))(0.7, 1, 20_000)
    strict, lax, both = measure([outcomes], 0), measure([outcomes], 1), measure([outcomes])
    assert lax.value == 1.0
    assert strict.value == pytest.approx(1 - 0.7 * math.exp(-0.3 * 0.5), abs=0.05)
    assert both.value == pytest.approx((strict.value + lax.value) / 2, abs=0.02)
    assert outcomes.share(1) == 1.0


def test_a_class_that_did_not_come_is_not_judged() -> None:
    outcomes = of_classes((1.0, 1.0), (1.0, 0.0))(0.5, 1, 1_000)
    assert (measure([outcomes], 1).low, measure([outcomes], 1).high) == (0.0, 1.0)


def test_a_run_whose_load_drifts_is_judged_as_a_whole() -> None:
    """Its quiet start is part of the traffic, not of a warm-up."""
    outcomes = swinging(10_000.0, 0.5, 5.0)(0.6, 1, 6_000)
    found = measure([outcomes])
    assert found.warmup_requests < 10
    assert found.value == pytest.approx(float(outcomes.ok.mean()), abs=0.005)


@pytest.mark.parametrize(("dof", "quantile"), [(5, 2.571), (10, 2.228), (39, 2.023), (1e9, 1.960)])
def test_student(dof: float, quantile: float) -> None:
    assert t_quantile(dof) == pytest.approx(quantile, rel=3e-3)


def test_a_curve_through_runs_beside_the_boundary_finds_it() -> None:
    run = QUEUES["M/M/1"].run
    runs = [(0.63 * factor, run(0.63 * factor, seed, 8_000)) for seed, factor in enumerate((0.85, 0.95, 1.0, 1.05) * 2)]
    found = cross(runs, 0.9)
    assert found is not None
    assert found.low < mm1_goodput(0.9, 5.0) < found.high
    assert found.high - found.low < 0.1 * found.rate


def test_there_is_no_crossing_where_attainment_does_not_fall() -> None:
    assert cross([(1.0, every(2_000)), (2.0, every(2_000, ok=False))], 0.9) is not None
    assert cross([(2.0, every(2_000)), (1.0, every(2_000, ok=False))], 0.9) is None
    assert cross([(1.0, every(2_000)), (1.0, every(2_000, ok=False))], 0.9) is None
