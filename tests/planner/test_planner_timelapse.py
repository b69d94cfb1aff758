"""A time-lapse keeps what a run looked like in bounded memory, however long the run."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.cluster.planner.timelapse import Lapse, Timelapse, WorkerSample
from pdserve.proto.types import Role


def worker(name: str = "decode-0", role: Role = Role.DECODE, running: int = 0) -> WorkerSample:
    return WorkerSample(name, role, num_waiting=running + 1, num_running=running, used_blocks=10, total_blocks=100)


def record(times_s: list[float], interval_s: float = 1.0, max_samples: int = 8) -> tuple[Timelapse, list[float]]:
    """As a simulator does: asks at every event, samples when one is due. Also the times that were sampled."""
    lapse = Timelapse(interval_s, max_samples)
    sampled: list[float] = []
    for at_s in times_s:
        if lapse.due(at_s):
            lapse.sample(at_s, 0, 0, [worker(running=len(sampled))])
            sampled.append(at_s)
    return lapse, sampled


def test_the_first_moment_is_due_and_then_one_in_each_interval() -> None:
    _, sampled = record([0.0, 0.4, 0.9, 1.1, 1.5, 2.0, 2.9])
    assert sampled == [0.0, 1.1, 2.0]


def test_a_late_sample_does_not_push_the_next_one_back() -> None:
    _, sampled = record([0.0, 1.9, 2.0, 2.1])
    assert sampled == [0.0, 1.9, 2.0]


def test_a_long_silence_costs_one_sample() -> None:
    _, sampled = record([0.0, 100.0, 100.5, 101.0])
    assert sampled == [0.0, 100.0, 101.0]


def test_when_full_every_second_sample_goes_and_the_interval_doubles() -> None:
    lapse, _ = record([float(at_s) for at_s in range(9)])
    kept = lapse.lapse()
    assert kept.at_s == (0.0, 2.0, 4.0, 6.0, 8.0)
    assert kept.interval_s == 2.0
    assert kept.tracks[0].num_running == (0, 2, 4, 6, 8)
    assert not lapse.due(9.9)
    assert lapse.due(10.0)


@given(
    gaps_s=st.lists(st.floats(min_value=0.0, max_value=30.0), min_size=1, max_size=300),
    max_samples=st.integers(min_value=2, max_value=17),
)
def test_there_are_never_more_samples_than_allowed_and_they_stay_in_order(
    gaps_s: list[float], max_samples: int
) -> None:
    times_s = list(itertools.accumulate(gaps_s))
    kept = record(times_s, max_samples=max_samples)[0].lapse()
    assert 1 <= len(kept.at_s) <= max_samples
    assert kept.at_s[0] == times_s[0]
    assert list(kept.at_s) == sorted(set(kept.at_s))
    assert all(len(track.used_blocks) == len(kept.at_s) for track in kept.tracks)


def test_a_long_run_leaves_at_least_half_of_what_is_allowed_spread_evenly() -> None:
    kept = record([at / 8 for at in range(5000)], interval_s=0.125, max_samples=64)[0].lapse()
    assert 32 <= len(kept.at_s) <= 64
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(kept.at_s)]
    assert gaps_s == pytest.approx([kept.interval_s] * len(gaps_s))


def two_moments() -> Lapse:
    lapse = Timelapse(1.0)
    lapse.sample(0.0, 3, 5, [worker("decode-0"), worker("prefill-0", Role.PREFILL)])
    lapse.sample(1.0, 4, 6, [worker("prefill-0", Role.DECODE, running=7), worker("prefill-1", Role.PREFILL)])
    return lapse.lapse()


def test_the_router_has_a_value_for_every_sample() -> None:
    kept = two_moments()
    assert (kept.router_queued, kept.router_inflight) == ((3, 4), (5, 6))


def test_a_worker_that_was_not_there_has_no_values_and_one_that_changed_its_role_has_two_tracks() -> None:
    tracks = two_moments().tracks
    assert [(track.worker_id, track.role) for track in tracks] == [
        ("prefill-0", Role.PREFILL),
        ("prefill-1", Role.PREFILL),
        ("decode-0", Role.DECODE),
        ("prefill-0", Role.DECODE),
    ]
    assert tracks[0].num_running == (0, None)
    assert tracks[3].num_running == (None, 7)
    assert tracks[3].num_waiting == (None, 8)
    assert tracks[3].total_blocks == (None, 100)


def test_nothing_recorded_is_an_empty_lapse() -> None:
    assert Timelapse().lapse() == Lapse(0.1, (), (), (), ())
