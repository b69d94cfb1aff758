"""Courses through a trace: what each order and each way of meeting a rate keeps, and what is kept in memory."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np
import pytest

from pdserve.cluster.arrivals import Arrival
from pdserve.cluster.planner.processes import Pace, constant, on_off, poisson, product
from pdserve.cluster.planner.trace_rows import Course, Order, trace_rows
from pdserve.cluster.planner.trace_sample import BLOCK_REQUESTS, TraceSample
from pdserve.cluster.trace import Row
from pdserve.proto.errors import ConfigError

TRACE_RATE = 5.0


def bursty_trace(num_requests: int, seed: int = 0) -> Iterator[Arrival]:
    """Bursts of about a second, at 5 requests per second; answers grow longer from first to last."""
    random = np.random.default_rng(seed)
    pace = Pace(product(constant(TRACE_RATE), on_off(1.0, 4.0, 40.0, random)))
    for number, unit in enumerate(islice(poisson(np.random.default_rng(seed + 1)), num_requests)):
        yield Arrival(pace.at_s(unit), 100 + number % 7, 1 + number, (number // 2, 1_000_000 + number))


@pytest.fixture(scope="module")
def sample() -> TraceSample:
    return TraceSample(list(bursty_trace(20_000)), "trace")


def rows(sample: TraceSample, course: Course, count: int, seed: int = 0) -> list[Row]:
    return list(islice(trace_rows(sample, course, lambda *purpose: np.random.default_rng((seed, *purpose))), count))


def times(found: list[Row]) -> np.ndarray:
    return np.array([row[0] for row in found])


def cv(found: list[Row]) -> float:
    gaps = np.diff(times(found))
    return float(gaps.std() / gaps.mean())


def dispersion(at: np.ndarray, width: float) -> float:
    """Variance of the counts in windows, relative to their mean: 1 for Poisson."""
    counts = np.bincount((at / width).astype(int))[:-1]
    return float(counts.var() / counts.mean())


def test_a_sample_knows_the_trace(sample: TraceSample) -> None:
    trace = list(bursty_trace(20_000))
    assert sample.is_whole
    assert sample.num_requests == 20_000
    assert sample.duration_s == pytest.approx(trace[-1].at_s - trace[0].at_s)
    assert 1 / sample.mean_gap_s == pytest.approx(TRACE_RATE, rel=0.1)


def test_replay_is_the_trace_with_its_own_gaps_lengths_and_ids(sample: TraceSample) -> None:
    found = rows(sample, Course("replay"), 20_000)
    trace = list(bursty_trace(20_000))
    assert np.diff(times(found)) * sample.mean_gap_s == pytest.approx(np.diff([arrival.at_s for arrival in trace]))
    assert [row[1:] for row in found] == [(a.num_prompt_tokens, a.max_tokens, a.prefix_ids) for a in trace]
    assert times(found)[-1] == pytest.approx(20_000)
    assert rows(sample, Course("replay"), 1000, seed=7) == found[:1000]


@pytest.mark.parametrize("max_cells", [1 << 20, 4000])
def test_a_lap_follows_the_last_one_by_a_mean_gap_with_ids_of_its_own(max_cells: int) -> None:
    """Whole in memory, or read from the trace again."""
    short = TraceSample(list(bursty_trace(1000)), "trace", max_cells)
    assert short.is_whole is (max_cells > 4000)
    found = rows(short, Course("replay"), 3000)
    laps = [found[start : start + 1000] for start in (0, 1000, 2000)]
    assert times(laps[1]) == pytest.approx(times(laps[0]) + 1000)
    assert laps[1][0][0] - laps[0][-1][0] == pytest.approx(1.0)
    assert [row[1:3] for row in laps[0]] == [row[1:3] for row in laps[1]]
    ids = [{prefix_id for row in lap for prefix_id in row[3]} for lap in laps]
    assert not ids[0] & ids[1]
    assert not ids[1] & ids[2]
    assert len(ids[0]) == len(ids[1]) == 1500


def test_a_rotated_course_is_the_trace_from_a_moment_that_the_seed_draws(sample: TraceSample) -> None:
    whole = rows(sample, Course("replay"), 20_000)
    gaps = np.diff([0.0, *times(whole)])
    firsts = set()
    for seed in range(5):
        found = rows(sample, Course("rotate"), 2000, seed)
        start = found[0][2] - 1
        firsts.add(start)
        places = [(start + n) % 20_000 for n in range(2000)]
        assert [row[1:3] for row in found] == [whole[place][1:3] for place in places]
        assert np.diff(times(found)) == pytest.approx(gaps[places[1:]])
        assert 0 <= found[0][0] <= gaps[start]
    assert len(firsts) == 5


def test_a_short_resampled_course_sees_the_whole_drift_in_its_order(sample: TraceSample) -> None:
    """`max_tokens` is the place in the trace: what a run of a tenth of it draws must rise through all of it."""
    found = rows(sample, Course("resample", num_requests=2000), 2000)
    places = np.array([row[2] for row in found])
    blocks = places[::BLOCK_REQUESTS]
    assert (np.diff(blocks) > 0).all()
    assert blocks[0] < 2000
    assert blocks[-1] > 18_000
    within = [late - early for early, late in pairwise(places.tolist())]
    assert within.count(1) >= 2000 - len(blocks)
    assert rows(sample, Course("resample", num_requests=2000), 2000, seed=1) != found


def test_a_long_resampled_course_keeps_rate_burstiness_and_place(sample: TraceSample) -> None:
    found = rows(sample, Course("resample"), 60_000)
    whole = rows(sample, Course("replay"), 20_000)
    assert times(found)[-1] == pytest.approx(60_000, rel=0.03)
    assert cv(found) == pytest.approx(cv(whole), rel=0.05)
    assert dispersion(times(found), 10.0) == pytest.approx(dispersion(times(whole), 10.0), rel=0.1)
    places = np.array([row[2] for row in found])
    assert np.abs(places[:20_000] - np.arange(20_000)).max() < 3 * BLOCK_REQUESTS
    drawn = np.bincount(places, minlength=20_001)[1:]
    assert drawn.mean() == pytest.approx(3.0, rel=0.01)


def test_no_prompt_is_repeated_with_its_ids_within_a_resampled_course(sample: TraceSample) -> None:
    found = rows(sample, Course("resample"), 60_000)
    unique_ids = [row[3][1] for row in found]
    assert len(set(unique_ids)) == len(unique_ids)


@pytest.mark.parametrize("order", ["replay", "rotate", "resample"])
def test_copies_add_up_to_the_rate_and_keep_the_dispersion_of_counts(sample: TraceSample, order: Order) -> None:
    """Of independent copies both mean and variance of the counts add up; single gaps tend to Poisson's."""
    copies = 50
    found = rows(sample, Course(order, population=copies), 200_000)
    assert times(found)[-1] == pytest.approx(200_000, rel=0.03)
    assert cv(found) == pytest.approx(1.0, abs=0.12)
    assert cv(rows(sample, Course(order), 20_000)) > 1.7
    one = dispersion(times(rows(sample, Course("replay"), 20_000)), 5.0)
    assert one > 3
    assert dispersion(times(found), 5.0 * copies) == pytest.approx(one, rel=0.25)


def test_copies_have_ids_of_their_own(sample: TraceSample) -> None:
    found = rows(sample, Course("replay", population=4), 4000)
    by_place: dict[int, set[int]] = {}
    for _, _, place, ids in rows(sample, Course("rotate", population=20), 100_000):
        by_place.setdefault(place, set()).add(ids[1])
    assert max(len(ids) for ids in by_place.values()) > 1
    unique_ids = [row[3][1] for row in found]
    assert len(set(unique_ids)) == len(unique_ids)


def test_copies_that_start_close_to_each_other_keep_the_drift(sample: TraceSample) -> None:
    apart = rows(sample, Course("replay", population=20), 20_000)
    close = rows(sample, Course("replay", population=20, shift_s=60.0), 20_000)
    assert max(row[2] for row in apart) > 19_000
    assert max(row[2] for row in close) < 3000


@pytest.mark.parametrize(("population", "copies"), [(0.25, 1), (2.5, 3)])
def test_a_population_that_is_no_whole_number_is_thinned(sample: TraceSample, population: float, copies: int) -> None:
    course = Course("replay", population=population)
    assert course.num_copies == copies
    found = rows(sample, course, 20_000)
    assert times(found)[-1] == pytest.approx(20_000, rel=0.05)
    kept = np.diff([row[2] for row in found])
    if copies == 1:
        assert (kept > 0).mean() > 0.99
        assert kept[kept > 0].mean() == pytest.approx(4.0, rel=0.05)


def test_a_long_trace_is_kept_in_blocks_spread_over_it_and_its_rate_is_that_of_all_of_it() -> None:
    whole = TraceSample(bursty_trace(40_000), "trace")
    part = TraceSample(bursty_trace(40_000), "trace", max_cells=45_000)
    assert (part.num_requests, part.mean_gap_s) == (whole.num_requests, whole.mean_gap_s)
    assert not part.is_whole
    assert part.columns.num_cells <= 45_000
    assert len(part.columns) > 2000
    places = np.array(part.columns.outputs) - 1
    starts = places[::BLOCK_REQUESTS]
    assert len(set(np.diff(starts).tolist())) == 1
    assert starts[-1] + np.diff(starts)[0] >= 40_000 - 128
    kept = [(whole.columns.outputs[p], whole.columns.gaps_s[p], whole.columns.prefix_ids(p)) for p in places[1:]]
    columns = part.columns
    assert kept == [(columns.outputs[n], columns.gaps_s[n], columns.prefix_ids(n)) for n in range(1, len(places))]


def test_memory_does_not_grow_with_the_trace() -> None:
    def peak_bytes(num_requests: int) -> int:
        trace = (Arrival(0.1 * number, 100, 10, (number,)) for number in range(num_requests))
        gc.collect()
        tracemalloc.start()
        try:
            assert TraceSample(trace, "trace", max_cells=8000).num_requests == num_requests
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak_bytes(80_000) < 1.2 * peak_bytes(10_000)


def test_a_trace_that_is_not_kept_whole_is_read_only_as_far_as_it_is_wanted() -> None:
    class Counted:
        num_read = 0

        def __iter__(self) -> Iterator[Arrival]:
            for arrival in bursty_trace(5000):
                self.num_read += 1
                yield arrival

    trace = Counted()
    sample = TraceSample(trace, "trace", max_cells=4000)
    trace.num_read = 0
    found = rows(sample, Course("replay"), 100)
    assert len(found) == 100
    assert trace.num_read == 100


@pytest.mark.parametrize(
    "trace", [[Arrival(3.0, 1, 1)], [Arrival(3.0, 1, 1), Arrival(3.0, 2, 2)]], ids=["one request", "one moment"]
)
def test_a_trace_without_a_rate_is_refused(trace: list[Arrival]) -> None:
    with pytest.raises(ConfigError, match=r"conv.csv: .* have no rate; use a longer trace"):
        TraceSample(trace, "conv.csv")
