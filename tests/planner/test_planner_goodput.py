"""The search for a goodput on queues whose goodput is known: intervals that cover, budgets, targets, drift."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planner_queues import (
    QUEUES,
    exponential_times,
    mm1_goodput,
    of_classes,
    single_server,
    swinging,
    with_tpot,
)

from pdserve.cluster.planner.attainment import Outcomes
from pdserve.cluster.planner.goodput import Goodput, closest, find_goodput
from pdserve.cluster.planner.workload import parse_workload
from pdserve.proto.errors import ConfigError

MM1 = QUEUES["M/M/1"].run
TRUTH = QUEUES["M/M/1"].goodput


def covers(found: Goodput, truth: float) -> bool:
    return found.low <= truth <= found.high


def half_width(found: Goodput) -> float:
    return (found.high - found.low) / 2 / found.rate


def coverage(name: str, precision: float, seeds: int, **options: float) -> float:
    queue = QUEUES[name]
    start_rate = 0.4 * queue.goodput
    found = [
        find_goodput(queue.run, 0.9, seed=seed, precision=precision, start_rate=start_rate, **options)  # type: ignore[arg-type]
        for seed in range(seeds)
    ]
    return float(np.mean([covers(one, queue.goodput) for one in found]))


def test_the_exact_goodputs_are_right() -> None:
    """Against long runs, as a check of the formulas that everything else here is measured by."""
    for name in ("M/M/1", "M/D/1"):
        queue = QUEUES[name]
        assert queue.run(queue.goodput, 1, 1_000_000).ok.mean() == pytest.approx(0.9, abs=0.006)


@pytest.mark.parametrize("name", QUEUES)
def test_the_interval_covers_the_truth(name: str) -> None:
    assert coverage(name, 0.05, seeds=10) >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("precision", [0.15, 0.05, 0.03])
@pytest.mark.parametrize("name", QUEUES)
def test_the_interval_covers_the_truth_in_nine_of_ten_searches(name: str, precision: float) -> None:
    assert coverage(name, precision, seeds=50) >= 0.9


@pytest.mark.parametrize("name", QUEUES)
def test_screening_is_cheap_and_says_how_wide_its_interval_is(name: str) -> None:
    queue = QUEUES[name]
    found = [
        find_goodput(queue.run, 0.9, seed=seed, precision=0.15, max_requests=8_000, start_rate=0.9 * queue.goodput)
        for seed in range(20)
    ]
    assert max(one.num_requests for one in found) <= 8_000
    assert sum(covers(one, queue.goodput) for one in found) >= 18
    assert np.median([abs(one.rate / queue.goodput - 1) for one in found]) < 0.08
    for one in found:
        assert half_width(one) <= 0.155 or one.reason.startswith("the budget was spent")


def test_a_finalist_is_as_narrow_as_asked_for() -> None:
    found = find_goodput(MM1, 0.9, seed=1, precision=0.03, start_rate=TRUTH)
    assert half_width(found) <= 0.03
    assert found.rate == pytest.approx(TRUTH, rel=0.03)
    assert found.attainment_at_rate.value == pytest.approx(0.9, abs=0.02)


def test_a_good_guess_saves_requests_and_a_bad_one_does_no_harm() -> None:
    def spent(guess: float) -> float:
        found = [find_goodput(MM1, 0.9, seed=seed, precision=0.15, start_rate=guess * TRUTH) for seed in range(12)]
        assert sum(covers(one, TRUTH) for one in found) >= 10
        return float(np.median([one.num_requests for one in found]))

    assert spent(1.0) < spent(0.01)
    assert spent(100.0) < 4 * spent(1.0)


def test_the_same_seed_finds_the_same_and_another_one_something_else() -> None:
    first, again, other = (find_goodput(MM1, 0.9, seed=seed, precision=0.1) for seed in (1, 1, 2))
    assert first == again
    assert first.rate != other.rate


def test_no_two_runs_share_a_seed() -> None:
    seeds = list[int]()

    def run(rate: float, seed: int, num_requests: int) -> Outcomes:
        seeds.append(seed)
        return MM1(rate, seed, num_requests)

    find_goodput(run, 0.9, seed=1, precision=0.1)
    assert len(set(seeds)) == len(seeds) > 3


def test_the_counts_are_those_of_what_was_run() -> None:
    asked = list[int]()

    def run(rate: float, seed: int, num_requests: int) -> Outcomes:
        asked.append(num_requests)
        return MM1(rate, seed, num_requests)

    found = find_goodput(run, 0.9, seed=1, precision=0.1)
    assert (found.num_requests, found.num_runs) == (sum(asked), len(asked))
    assert [rate for rate, _ in found.probes] == sorted({rate for rate, _ in found.probes})


def test_a_budget_that_ends_is_said_and_the_interval_still_holds() -> None:
    for seed in range(10):
        found = find_goodput(MM1, 0.9, seed=seed, precision=0.01, max_requests=6_000)
        assert found.num_requests <= 6_000
        assert "the budget was spent" in found.reason
        assert half_width(found) > 0.01
        assert covers(found, TRUTH)


def test_a_search_ends_at_any_budget() -> None:
    for max_requests in (2_000, 2_500, 3_500, 5_000, 12_000):
        found = find_goodput(MM1, 0.9, seed=1, precision=0.05, max_requests=max_requests, start_rate=20.0)
        assert found.num_requests <= max_requests


def test_a_target_that_holds_until_saturation_is_found_at_saturation() -> None:
    """Whoever may wait for 200 service times is well served until the backlog grows."""
    found = find_goodput(single_server(exponential_times, 200.0), 0.9, seed=1, precision=0.1, start_rate=0.5)
    assert covers(found, mm1_goodput(0.9, 200.0))
    assert found.high <= 1.3


@pytest.mark.parametrize("share", [0.3, 0.8])
@pytest.mark.parametrize("start_rate", [0.001, 0.5, 50.0])
def test_an_infeasible_target_names_what_fails_and_the_closest_that_does_not(share: float, start_rate: float) -> None:
    found = find_goodput(with_tpot(MM1, share), 0.9, seed=1, precision=0.15, max_requests=8_000, start_rate=start_rate)
    assert (found.rate, found.low, found.failing) == (0.0, 0.0, "TPOT")
    assert "no rate will do: TPOT fails even for requests that hardly meet" in found.reason
    times = re.search(r"or a TPOT target ([\d.]+) times as long", found.reason)
    assert times is not None
    assert float(times[1]) == pytest.approx(0.9 / share, rel=0.05)
    assert found.attainment_at_rate.value == pytest.approx(share, abs=0.05)


def test_a_target_that_only_an_almost_empty_system_misses_narrowly_is_infeasible_too() -> None:
    found = find_goodput(with_tpot(MM1, 0.88), 0.9, seed=1, precision=0.05, start_rate=0.5)
    assert (found.rate, found.failing) == (0.0, "TPOT")


def test_ttft_can_be_what_fails() -> None:
    found = find_goodput(single_server(exponential_times, -1.0), 0.9, seed=1)
    assert (found.rate, found.failing) == (0.0, "TTFT")


def test_a_target_that_is_hard_but_feasible_is_not_given_up() -> None:
    """At most 93 % can meet it, and 90 % do at some rate."""
    truth = mm1_goodput(0.9 / 0.93, 5.0)
    found = [find_goodput(with_tpot(MM1, 0.93), 0.9, seed=seed, precision=0.1) for seed in range(10)]
    assert sum(covers(one, truth) for one in found) >= 8


def test_several_classes_meet_their_targets_when_the_one_that_falls_first_does() -> None:
    limits_s, shares = (5.0, 2.0), (0.7, 0.3)
    truths = [mm1_goodput(target, limit_s) for target, limit_s in zip((0.8, 0.9), limits_s, strict=True)]
    found = [find_goodput(of_classes(limits_s, shares), (0.8, 0.9), seed=seed, precision=0.08) for seed in range(10)]
    assert {one.limiting for one in found} == {1}
    assert sum(covers(one, min(truths)) for one in found) >= 9


def test_classes_that_fall_together_are_covered_as_well() -> None:
    found = [find_goodput(of_classes((5.0, 5.0), (0.5, 0.5)), (0.9, 0.9), seed=s, precision=0.08) for s in range(20)]
    assert sum(covers(one, TRUTH) for one in found) >= 18


def test_one_class_with_an_infeasible_target_makes_it_infeasible() -> None:
    found = find_goodput(of_classes((5.0, -1.0), (0.7, 0.3)), (0.9, 0.5), seed=1)
    assert (found.rate, found.failing) == (0.0, "TTFT")
    assert "class 1: 0.0% instead of 50.0%" in found.reason


def test_a_class_that_never_comes_is_not_blamed_where_another_one_is_infeasible() -> None:
    run = with_tpot(of_classes((5.0, 5.0), (1.0, 0.0)), 0.5)

    def of_two(rate: float, seed: int, num_requests: int) -> Outcomes:
        return replace(run(rate, seed, num_requests), slo_class=np.zeros(num_requests, dtype=np.int64))

    found = find_goodput(of_two, (0.9, 0.9), seed=1, max_requests=40_000)
    assert (found.rate, found.failing) == (0.0, "TPOT")
    assert "class 0: " in found.reason
    assert "class 1" not in found.reason
    assert "nan" not in found.reason


def test_the_closest_target_of_a_class_without_requests_is_not_known() -> None:
    runs = [with_tpot(of_classes((5.0, 5.0), (1.0, 0.0)), 0.5)(0.1, 1, 1_000)]
    runs = [replace(one, slo_class=np.zeros(len(one), dtype=np.int64)) for one in runs]
    assert "times as long" not in closest(runs, 1, 0.9)


def test_requests_that_fail_at_any_rate_are_named_as_what_is_missed() -> None:
    """No latency target could be met by what never comes."""
    plain = single_server(exponential_times, 5.0)

    def run(rate: float, seed: int, num_requests: int) -> Outcomes:
        done = plain(rate, seed, num_requests)
        ok = np.arange(num_requests) % 2 == 0
        used = np.where(ok, 0.5, math.inf)
        return replace(done, ttft_ok=ok, tpot_ok=ok, ttft_used=used, tpot_used=used)

    found = find_goodput(run, 0.9, seed=1, max_requests=20_000)
    assert (found.rate, found.failing) == (0.0, "completion")
    assert "times as long" not in found.reason


@pytest.mark.parametrize(("max_requests", "is_spent"), [(4_000, True), (200_000, False)])
def test_a_search_that_its_budget_ended_says_so_by_a_field(max_requests: int, is_spent: bool) -> None:
    found = find_goodput(MM1, 0.9, seed=1, precision=0.1, max_requests=max_requests, start_rate=0.5)
    assert found.is_spent == is_spent


def test_what_is_left_is_not_spent_on_runs_that_are_shorter_than_such_as_were_too_short() -> None:
    """They flatter more, and it would be theirs what is said in the end."""
    plain, lengths = single_server(exponential_times, 40.0), list[int]()

    def run(rate: float, seed: int, num_requests: int) -> Outcomes:
        lengths.append(num_requests)
        return plain(rate, seed, num_requests)

    found = find_goodput(run, 0.9, seed=1, precision=0.1, max_requests=16_000, start_rate=0.8)
    assert found.is_spent
    assert lengths == sorted(lengths)
    assert covers(found, mm1_goodput(0.9, 40.0))
    assert found.rate < 1.0


def test_runs_that_are_too_short_say_nothing_of_rates_far_beyond_theirs() -> None:
    """Nearly all hits, up to a rate beyond which most miss; requests stay for so long that the backlog wanders."""
    edge = 1.2

    def run(rate: float, seed: int, num_requests: int) -> Outcomes:
        random = np.random.default_rng(seed)
        arrival_s = np.cumsum(random.exponential(1 / rate, num_requests))
        is_late = random.random(num_requests) < (0.01 * rate if rate < edge else 0.6)
        end_s = arrival_s + random.exponential(1_000.0, num_requests)
        return Outcomes(arrival_s, end_s, ~is_late, np.ones(num_requests, dtype=np.bool_))

    found = find_goodput(run, 0.9, seed=0, precision=0.1, max_requests=60_000)
    assert found.is_spent
    assert found.low <= edge
    assert found.rate <= 1.1 * edge


def test_a_class_that_never_comes_promises_nothing() -> None:
    found = find_goodput(of_classes((5.0, 5.0), (1.0, 0.0)), (0.9, 0.9), seed=1, precision=0.15, max_requests=8_000)
    assert found.low == 0.0
    assert "class 1 has too few requests" in found.reason


def test_a_load_that_drifts_does_not_make_the_search_useless() -> None:
    """It swings within each run: what counts is attainment over all of it, and it is said that this is so."""
    run = swinging(10_000.0, 0.4, 5.0)
    found = find_goodput(run, 0.9, seed=1, precision=0.1, max_requests=200_000, start_rate=0.5)
    assert found.low > 0.0
    assert "the load changes over a run" in found.reason
    assert run(found.low, 99, 100_000).ok.mean() > 0.9 > run(found.high, 99, 100_000).ok.mean()


def test_over_whole_courses_the_answer_is_between_two_that_were_run() -> None:
    asked = set[int]()

    def replay(rate: float, _seed: int, num_requests: int) -> Outcomes:
        asked.add(num_requests)
        random = np.random.default_rng(5)
        at = np.arange(num_requests)
        service_s = random.exponential(1.0, num_requests) * np.where(at % 5_000 < 1_000, 1.5, 0.8)
        gaps_s = random.exponential(1 / rate, num_requests)
        walk = np.concatenate([[0.0], np.cumsum(service_s[:-1] - gaps_s[1:])])
        wait_s = walk - np.minimum.accumulate(walk)
        at_s = np.cumsum(gaps_s)
        return Outcomes(at_s, at_s + wait_s + service_s, wait_s <= 5.0, np.ones(num_requests, dtype=np.bool_))

    found = find_goodput(replay, 0.9, seed=1, precision=0.03, max_requests=100_000, course_requests=5_000)
    assert asked == {5_000}
    assert replay(found.low, 0, 5_000).ok.mean() >= 0.9 > replay(found.high, 0, 5_000).ok.mean()
    assert half_width(found) <= 0.031
    assert "whole courses of 5000 requests each" in found.reason


def test_a_course_that_the_budget_does_not_hold_is_said_to_be_cut() -> None:
    found = find_goodput(MM1, 0.9, seed=1, precision=0.15, max_requests=8_000, course_requests=5_000)
    assert "a whole course has 5000 requests, too many for the budget" in found.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1.0}, "attainment target: 1.0 is not between 0 and 1"),
        ({"target": 90}, "attainment target: 90 is not between 0 and 1"),
        ({"target": math.nan}, "attainment target"),
        ({"target": (0.9, 0.0)}, "attainment target: 0.0"),
        ({"target": ()}, "attainment target: there is none"),
        ({"precision": 0.0}, "precision"),
        ({"precision": 3}, "precision: 3 is not between 0 and 1"),
        ({"start_rate": 0.0}, "start rate"),
        ({"start_rate": math.inf}, "start rate"),
        ({"max_requests": 100}, "requests to simulate: 100 are too few; give 2000 or more"),
        ({"course_requests": -1}, "course"),
        ({"target": (0.9, 0.9)}, "requests have no SLO class; give one target"),
    ],
)
def test_bad_arguments_are_one_clear_error_each(options: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"target": 0.9, "seed": 0, **options}
    with pytest.raises(ConfigError, match=message):
        find_goodput(MM1, **arguments)  # type: ignore[arg-type]


def test_a_run_that_ends_early_is_an_error() -> None:
    with pytest.raises(ConfigError, match="500 requests were asked for, 10 came"):
        find_goodput(lambda rate, seed, _: MM1(rate, seed, 10), 0.9, seed=0)


def test_a_system_that_no_rate_reaches_is_an_error() -> None:
    def instant(rate: float, seed: int, num_requests: int) -> Outcomes:
        at_s = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, num_requests))
        everything = np.ones(num_requests, dtype=np.bool_)
        return Outcomes(at_s, at_s, everything, everything)

    with pytest.raises(ConfigError, match="does the load reach the system"):
        find_goodput(instant, 0.9, seed=0)


def replayed(order: str, slots: int = 64) -> Callable[[float, int, int], Outcomes]:
    """A pool of slots that each hold a request for 30 ms a token; a request may wait for a second."""
    path = Path(os.environ["PDSERVE_TRACES"]) / "azure_2023_conv.csv"
    workload = parse_workload(f"trace:{path}?order={order}")

    def run(rate: float, seed: int, num_requests: int) -> Outcomes:
        arrivals = []
        source = workload.source(rate, seed, num_requests)
        while source.next_arrival_s() < math.inf:
            arrivals.append(source.pop())
        free_s = [0.0] * slots
        at_s = np.array([arrival.at_s for arrival in arrivals])
        start_s, end_s = np.empty(len(at_s)), np.empty(len(at_s))
        for index, arrival in enumerate(arrivals):
            slot = free_s.index(min(free_s))
            start_s[index] = max(arrival.at_s, free_s[slot])
            end_s[index] = free_s[slot] = start_s[index] + 0.2 + 0.03 * arrival.max_tokens
        return Outcomes(at_s, end_s, start_s - at_s <= 1.0, np.ones(len(at_s), dtype=np.bool_))

    return run


@pytest.mark.slow
@pytest.mark.skipif("PDSERVE_TRACES" not in os.environ, reason="PDSERVE_TRACES is not set")
@pytest.mark.parametrize(("order", "course_requests"), [("resample", 0), ("rotate", 0), ("replay", 19_366)])
def test_the_azure_trace_has_a_goodput_in_every_order(order: str, course_requests: int) -> None:
    run = replayed(order)
    found = find_goodput(
        run, 0.9, seed=1, precision=0.05, max_requests=150_000, start_rate=6.0, course_requests=course_requests
    )
    assert 0.0 < found.low < found.rate < found.high < 2 * found.low
    whole = [
        [run(rate, seed, 19_366).ok.mean() for seed in (7, 8, 9)] for rate in (0.95 * found.low, 1.05 * found.high)
    ]
    assert np.mean(whole[0]) > 0.9 > np.mean(whole[1])
