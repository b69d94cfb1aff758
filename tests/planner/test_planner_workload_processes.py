"""Arrival processes against their closed forms, and the pace that makes seconds of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice, pairwise, repeat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.cluster.planner.processes import (
    Pace,
    Segment,
    constant,
    deterministic,
    gamma,
    on_off,
    poisson,
    product,
    sine,
)


def gaps(times: Iterator[float], count: int) -> np.ndarray:
    return np.diff([0.0, *islice(times, count)])


def cv(values: np.ndarray) -> float:
    return float(values.std() / values.mean())


def mmpp_cv(rate_on: float, rate_off: float, mean_on_s: float, mean_off_s: float) -> float:
    """Of the gaps of a two-state Markov-modulated Poisson process (Fischer and Meier-Hellstern 1993)."""
    leave_on, leave_off = 1 / mean_on_s, 1 / mean_off_s
    excess = 2 * leave_on * leave_off * (rate_on - rate_off) ** 2
    excess /= (leave_on + leave_off) ** 2 * (rate_on * rate_off + rate_on * leave_off + rate_off * leave_on)
    return math.sqrt(1 + excess)


@pytest.mark.parametrize(
    ("make", "expected_cv"),
    [
        pytest.param(lambda random: deterministic(), 0.0, id="deterministic"),
        pytest.param(poisson, 1.0, id="poisson"),
        pytest.param(lambda random: gamma(0.5, random), 0.5, id="gamma 0.5"),
        pytest.param(lambda random: gamma(2.0, random), 2.0, id="gamma 2"),
        pytest.param(lambda random: gamma(4.0, random), 4.0, id="gamma 4"),
    ],
)
def test_gaps_have_mean_one_and_the_variation_asked_for(
    make: Callable[[np.random.Generator], Iterator[float]], expected_cv: float
) -> None:
    found = gaps(make(np.random.default_rng(1)), 200_000)
    assert found.mean() == pytest.approx(1.0, rel=0.02)
    assert cv(found) == pytest.approx(expected_cv, rel=0.03)


@pytest.mark.parametrize(
    ("ratio", "mean_on_s", "mean_off_s"), [(5.0, 1.0, 3.0), (20.0, 2.0, 2.0), (math.inf, 1.0, 4.0)]
)
def test_on_off_bursts_are_the_markov_modulated_process(ratio: float, mean_on_s: float, mean_off_s: float) -> None:
    rate = 10.0
    random = np.random.default_rng(2)
    phases = on_off(mean_on_s, mean_off_s, ratio, random)
    pace = Pace(product(constant(rate), phases))
    found = gaps(map(pace.at_s, poisson(np.random.default_rng(3))), 200_000)
    rate_on = rate / (mean_on_s + mean_off_s / ratio) * (mean_on_s + mean_off_s)
    assert 1 / found.mean() == pytest.approx(rate, rel=0.03)
    assert cv(found) == pytest.approx(mmpp_cv(rate_on, rate_on / ratio, mean_on_s, mean_off_s), rel=0.04)


def test_phases_last_what_they_should_and_their_factors_have_mean_one() -> None:
    phases = list(islice(on_off(2.0, 6.0, 4.0, np.random.default_rng(4)), 20_000))
    on_s, off_s = (np.array([s for s, factor in phases if (factor > 1) is on]) for on in (True, False))
    assert (on_s.mean(), off_s.mean()) == (pytest.approx(2.0, rel=0.05), pytest.approx(6.0, rel=0.05))
    factors = {factor for _, factor in phases}
    assert max(factors) / min(factors) == pytest.approx(4.0)
    assert (2.0 * max(factors) + 6.0 * min(factors)) / 8.0 == pytest.approx(1.0)


def test_a_sine_swings_by_its_amplitude_around_the_mean_rate() -> None:
    pace = Pace(product(constant(100.0), sine(0.5, 1000.0, 0.0)))
    times = np.array([pace.at_s(unit) for unit in islice(deterministic(), 100_000)])
    per_quarter, _ = np.histogram(times, bins=4, range=(0.0, 1000.0))
    # The mean of 1 + a sin over a quarter is 1 + 2a / pi, or 1 - 2a / pi.
    assert per_quarter.tolist() == pytest.approx([25_000 * (1 + sign / math.pi) for sign in (1, 1, -1, -1)], rel=0.01)
    shifted = Pace(product(constant(100.0), sine(0.5, 1000.0, 0.5)))
    assert shifted.at_s(25_000.0) == pytest.approx(1000.0 - times[100_000 - 25_000 - 1], abs=0.1)


@given(
    st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 10)), min_size=1, max_size=5).filter(
        lambda found: sum(seconds * rate for seconds, rate in found) > 0.1
    ),
    st.lists(st.floats(0.001, 5), min_size=1, max_size=30),
)
def test_a_pace_inverts_the_integral_of_its_rate(steps: list[Segment], unit_gaps: list[float]) -> None:
    def mass(until_s: float) -> float:
        total, at_s = 0.0, 0.0
        while at_s < until_s:
            for seconds, rate in steps:
                total += rate * min(seconds, max(0.0, until_s - at_s))
                at_s += seconds
        return total

    pace = Pace(segment for lap in repeat(steps) for segment in lap)
    units = np.cumsum(unit_gaps).tolist()
    times = [pace.at_s(unit) for unit in units]
    assert all(early <= late for early, late in pairwise(times))
    assert [mass(at_s) for at_s in times] == pytest.approx(units, rel=1e-6, abs=1e-6)


@given(*[st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=5)] * 2)
def test_a_product_is_both_factors_at_every_moment(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    def value(steps: list[tuple[int, int]], at: int) -> int:
        return [factor for seconds, factor in steps for _ in range(seconds)][at % sum(s for s, _ in steps)]

    found: list[float] = []
    for seconds, factor in product(*(segment_laps(steps) for steps in (first, second))):
        found += [factor] * int(seconds)
        if len(found) > 100:
            break
    assert found == [value(first, at) * value(second, at) for at in range(len(found))]


def segment_laps(steps: list[tuple[int, int]]) -> Iterator[Segment]:
    while True:
        yield from steps
