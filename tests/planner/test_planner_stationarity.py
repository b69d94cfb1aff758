"""Whether a system keeps up: overload, light load, runs that are too short to say, and loads that drift."""

from __future__ import annotations

import numpy as np
import pytest
from planner_queues import QUEUES, exponential_times, lognormal_times, single_server, swinging, two_servers

from pdserve.cluster.planner.attainment import Outcomes
from pdserve.cluster.planner.stationarity import Flow, Verdict, check_stationarity, load_drifts, warmup_requests


def verdicts(runs: list[Outcomes]) -> list[Verdict]:
    return [check_stationarity([outcomes.flow]).verdict for outcomes in runs]


def test_the_backlog_is_what_has_not_ended_when_the_next_one_comes() -> None:
    flow = Flow(np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 5.0, 2.5, np.inf]))
    assert flow.backlog.tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("name", QUEUES)
def test_light_load_is_stationary(name: str) -> None:
    queue = QUEUES[name]
    found = verdicts([queue.run(0.5 * queue.goodput, seed, 8_000) for seed in range(10)])
    assert found.count(Verdict.STATIONARY) >= 9
    assert Verdict.GROWING not in found


@pytest.mark.parametrize(("name", "capacity"), [("M/M/1", 1.0), ("M/D/1", 1.0), ("bursty G/G/2", 2.0)])
def test_overload_grows_and_by_how_much_is_said(name: str, capacity: float) -> None:
    found = [check_stationarity([QUEUES[name].run(capacity / 0.7, seed, 8_000).flow]) for seed in range(10)]
    assert {one.verdict for one in found} == {Verdict.GROWING}
    assert np.mean([one.growth for one in found]) == pytest.approx(0.3, abs=0.02)
    assert sum(one.growth_low < 0.3 < one.growth_high for one in found) >= 8
    assert "completions fall behind" in found[0].reason


@pytest.mark.parametrize("num_requests", [500, 2_000, 8_000])
def test_saturation_is_never_called_stationary(num_requests: int) -> None:
    """At the capacity itself the backlog is a random walk: at no length does it look as if it returned."""
    queues = [single_server(exponential_times, 5.0), single_server(lognormal_times, 5.0, shape=0.4)]
    found = verdicts([run(1.0, seed, num_requests) for run in queues for seed in range(30)])
    assert Verdict.STATIONARY not in found


def test_high_load_that_is_kept_up_with_is_not_called_growing() -> None:
    found = verdicts([single_server(exponential_times, 5.0)(0.97, seed, 8_000) for seed in range(40)])
    assert found.count(Verdict.GROWING) <= 1


def test_a_short_run_near_saturation_is_too_short_and_a_long_one_is_not() -> None:
    run = single_server(exponential_times, 5.0)
    assert check_stationarity([run(0.9, 1, 1_000).flow]).verdict is Verdict.TOO_SHORT
    assert check_stationarity([run(0.9, 1, 100_000).flow]).verdict is Verdict.STATIONARY


def test_more_runs_prove_more_than_one() -> None:
    run = single_server(exponential_times, 5.0)
    flows = [run(0.7, seed, 3_000).flow for seed in range(8)]
    assert check_stationarity(flows).verdict is Verdict.STATIONARY


def test_hardly_any_requests_are_too_short() -> None:
    found = check_stationarity([QUEUES["M/M/1"].run(0.5, 1, 100).flow])
    assert found.verdict is Verdict.TOO_SHORT
    assert "only 95 requests are left" in found.reason


def test_a_run_that_requests_outlast_is_too_short_and_it_is_said_how_long_is_enough() -> None:
    at_s = np.arange(1_000, dtype=np.float64) / 100
    found = check_stationarity([Flow(at_s, at_s + 5.0)])
    assert found.verdict is Verdict.TOO_SHORT
    assert found.needed_s == pytest.approx(20.0)


def test_a_system_without_a_queue_is_stationary() -> None:
    at_s = np.cumsum(np.random.default_rng(0).exponential(1.0, 2_000))
    assert check_stationarity([Flow(at_s, at_s)]).verdict is Verdict.STATIONARY


def test_requests_that_never_end_grow() -> None:
    at_s = np.cumsum(np.random.default_rng(0).exponential(1.0, 2_000))
    end_s = np.where(np.arange(2_000) % 4 == 0, np.inf, at_s + 0.5)
    assert check_stationarity([Flow(at_s, end_s)]).verdict is Verdict.GROWING


def test_a_warm_up_is_cut_and_a_busy_start_is_not() -> None:
    filling = np.minimum(np.arange(2_000.0), 500.0)
    assert warmup_requests([filling]) == pytest.approx(500, abs=100)
    assert warmup_requests([500.0 - filling]) == 100


def test_a_load_that_swings_is_drifting_and_not_a_backlog_that_grows() -> None:
    for seed in range(10):
        flow = swinging(10_000.0, 0.5, 5.0)(0.6, seed, 6_000).flow
        assert check_stationarity([flow]).verdict is Verdict.DRIFTING


def test_a_load_that_becomes_heavier_explains_why_its_backlog_does() -> None:
    for seed in range(10):
        flow = swinging(10_000.0, 0.0, 5.0, growth=1.0)(0.6, seed, 6_000).flow
        assert check_stationarity([flow]).verdict is Verdict.DRIFTING


def test_a_load_that_swings_does_not_hide_overload() -> None:
    """It is back where it was at the end of the run, and the backlog is not."""
    for seed in range(10):
        flow = swinging(4_000.0, 0.3, 5.0)(1.5, seed, 6_000).flow
        assert check_stationarity([flow]).verdict is Verdict.GROWING


def test_arrivals_that_swing_are_seen_without_being_told() -> None:
    random = np.random.default_rng(0)
    gaps_s = random.exponential(1.0, 6_000) * (1 + 0.5 * np.sin(np.arange(6_000) / 1_000))
    at_s = np.cumsum(gaps_s)
    assert load_drifts([Flow(at_s, at_s + 0.5)])


def test_bursts_are_no_drift() -> None:
    run = two_servers(lognormal_times, 4.0, shape=0.4)
    assert sum(load_drifts([run(1.0, seed, 4_000).flow]) for seed in range(50)) <= 1


def pure_delay(rate: float, took_s: float, sigma: float, num_requests: int, seed: int) -> Flow:
    """A system that is never full: each request takes its own time, lognormal of that median."""
    random = np.random.default_rng(seed)
    arrival_s = np.cumsum(random.exponential(1 / rate, num_requests))
    return Flow(arrival_s, arrival_s + took_s * random.lognormal(0.0, sigma, num_requests))


def one_by_one(rate: float, num_requests: int, seed: int = 0) -> Flow:
    """A system that takes one request a second, each of which takes a second."""
    random = np.random.default_rng(seed)
    arrival_s = np.cumsum(random.exponential(1 / rate, num_requests))
    end_s = np.empty(num_requests)
    free_s = 0.0
    for number, at_s in enumerate(arrival_s.tolist()):
        free_s = max(free_s, at_s) + 1.0
        end_s[number] = free_s
    return Flow(arrival_s, end_s)


@pytest.mark.parametrize("sigma", [0.0, 0.8, 1.1])
@pytest.mark.parametrize("num_requests", [500, 1_000, 8_000])
def test_a_system_that_keeps_up_does_not_fall_behind_however_long_its_last_answers_take(
    sigma: float, num_requests: int
) -> None:
    mean_s = float(np.exp(sigma**2 / 2))
    flows = [pure_delay(num_requests / (5.0 * mean_s), 1.0, sigma, num_requests, seed) for seed in range(20)]
    assert sum(flow.falls_behind() and flow.needed_s() <= flow.duration_s for flow in flows) <= 1


@pytest.mark.parametrize("times", [2.0, 3.0, 1e3, 1e6])
@pytest.mark.parametrize("num_requests", [200, 1_000, 4_000])
def test_far_above_what_a_system_takes_every_run_falls_behind_however_short(times: float, num_requests: int) -> None:
    assert all(one_by_one(times, num_requests, seed).falls_behind() for seed in range(5))


def test_below_it_none_does() -> None:
    assert not any(one_by_one(0.8, 1_000, seed).falls_behind() for seed in range(20))


def test_a_run_that_is_over_before_its_first_requests_end_is_too_short_to_tell() -> None:
    flow = pure_delay(1_000.0, 10.0, 0.5, 500, 0)
    assert flow.falls_behind()
    assert 40.0 < flow.needed_s() < 90.0
    assert flow.needed_s() > flow.duration_s
