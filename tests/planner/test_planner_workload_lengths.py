"""Lengths: constants, lognormals, pairs sampled from a stream."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from pdserve.cluster.arrivals import Arrival
from pdserve.cluster.planner.lengths import JointLengths, Reservoir, lognormal, lognormal_mean, token_counts


def test_a_lognormal_goes_through_its_percentiles_and_has_its_mean() -> None:
    found = np.fromiter(lognormal(100.0, 400.0, np.random.default_rng(0)), float, 200_000)
    assert np.percentile(found, [50, 90]).tolist() == pytest.approx([100.0, 400.0], rel=0.02)
    assert found.mean() == pytest.approx(lognormal_mean(100.0, 400.0), rel=0.02)


def test_equal_percentiles_are_a_constant_and_counts_are_whole_and_positive() -> None:
    random = np.random.default_rng(0)
    assert list(islice(token_counts(512, 512, random), 3)) == [512] * 3
    assert list(islice(lognormal(2.5, 2.5, random), 3)) == [2.5] * 3
    found = list(islice(token_counts(1, 40, random), 5000))
    assert min(found) == 1
    assert {type(count) for count in found} == {int}


def test_a_reservoir_is_a_uniform_sample_of_everything_offered() -> None:
    taken = np.zeros(1000)
    for seed in range(300):
        reservoir: Reservoir[int] = Reservoir(50, np.random.default_rng(seed))
        for item in range(1000):
            reservoir.offer(item)
        assert len(set(reservoir.items)) == 50
        taken[reservoir.items] += 1
    # Each hundredth of the stream is taken 300 * 5 times in the mean, with a standard deviation of about 37.
    assert taken.reshape(10, 100).sum(axis=1).tolist() == pytest.approx([1500] * 10, abs=150)


def test_a_stream_shorter_than_the_reservoir_is_kept_whole() -> None:
    reservoir: Reservoir[int] = Reservoir(50, np.random.default_rng(0))
    for item in range(20):
        reservoir.offer(item)
    assert reservoir.items == list(range(20))


def test_pairs_are_drawn_as_pairs() -> None:
    """Long prompts with short answers and the reverse: drawn independently, half of the pairs would be others."""
    trace = [Arrival(float(n), *((1000, 10) if n % 4 else (10, 1000))) for n in range(400)]
    found = list(islice(JointLengths(trace).pairs(np.random.default_rng(0)), 10_000))
    assert set(found) == {(1000, 10), (10, 1000)}
    assert found.count((1000, 10)) == pytest.approx(7500, rel=0.03)


def test_a_sample_of_a_long_trace_keeps_its_distribution_in_bounded_memory() -> None:
    random = np.random.default_rng(5)
    prompts = np.rint(random.lognormal(6, 1, 200_000)).astype(int) + 1
    sample = JointLengths((Arrival(0.0, int(prompt), int(prompt) + 7) for prompt in prompts), capacity=20_000)
    assert len(sample) == 20_000
    found = np.array(list(islice(sample.pairs(random), 50_000)))
    assert (found[:, 1] - found[:, 0] == 7).all()
    assert np.percentile(found[:, 0], [50, 90, 99]).tolist() == pytest.approx(
        np.percentile(prompts, [50, 90, 99]).tolist(), rel=0.06
    )
