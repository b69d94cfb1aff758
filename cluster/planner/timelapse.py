"""What queues and pools looked like while virtual time passed, in bounded memory, and the story that a report tells.

    simulator --sample--> Timelapse --lapse--> Lapse --in a--> SimulationStory

A recorder that is full drops every second sample and takes half as many from then on: a run of any length leaves
between half of `max_samples` and all of it, spread evenly. Knows neither who is sampled nor how a report looks.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pdserve.cluster.planner.findings import ClassReport, Picture
from pdserve.proto.types import Role

MIN_SAMPLES = 2
FIELDS = 5
"""Numbers of one worker in one sample: its track, waiting, running, used blocks, total blocks."""


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """One worker at one moment. Used blocks are all that are not free, whoever holds them."""

    worker_id: str
    role: Role
    num_waiting: int
    num_running: int
    used_blocks: int
    total_blocks: int


@dataclass(frozen=True, slots=True)
class Track:
    """One worker in one role: a value for every sample of the lapse, `None` where the worker was not there."""

    worker_id: str
    role: Role
    num_waiting: tuple[int | None, ...]
    num_running: tuple[int | None, ...]
    used_blocks: tuple[int | None, ...]
    total_blocks: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Lapse:
    """Samples in order of time, about `interval_s` apart. What a sample says holds until the next one.

    Tracks are by role and, within a role, in the order in which workers were first seen.
    """

    interval_s: float
    at_s: tuple[float, ...]
    router_queued: tuple[int, ...]
    router_inflight: tuple[int, ...]
    tracks: tuple[Track, ...]


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of one kind of latency, in milliseconds."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    max_ms: float


@dataclass(frozen=True, slots=True)
class SimulationStory:
    """One set-up over one workload: what a report of it shows.

    Rates are per second of `duration_s`; goodput and attainment count requests that met the targets of their
    own class. `spreads` are by the name of the latency, `errors` by what requests failed with; `profiles` is each
    profile's name and where its step times are from. `picture` is `None` if nothing completed.
    """

    setup: str
    workload: str
    profiles: tuple[str, ...]
    seed: int
    classes: tuple[ClassReport, ...]
    num_requests: int
    num_completed: int
    duration_s: float
    offered_rate: float
    requests_per_s: float
    goodput_per_s: float
    attainment: float
    spreads: Mapping[str, Spread]
    errors: Mapping[str, int]
    picture: Picture | None
    lapse: Lapse
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Sample:
    at_s: float
    router_queued: int
    router_inflight: int
    workers: array[int]


class Timelapse:
    """Records samples on a grid of times, never more than `max_samples` of them."""

    def __init__(self, interval_s: float = 0.1, max_samples: int = 512) -> None:
        assert interval_s > 0, "a time-lapse needs an interval"
        assert max_samples >= MIN_SAMPLES, "halving needs two samples"
        self._interval_s = interval_s
        self._max_samples = max_samples
        self._next_s = -math.inf
        self._samples: list[_Sample] = []
        self._tracks: dict[tuple[str, Role], int] = {}

    def due(self, now_s: float) -> bool:
        """Whether a sample is wanted. Cheap: asked at every event."""
        return now_s >= self._next_s

    def sample(self, now_s: float, router_queued: int, router_inflight: int, workers: Iterable[WorkerSample]) -> None:
        """What things look like now. Times never go back."""
        row = array("q")
        for worker in workers:
            track = self._tracks.setdefault((worker.worker_id, worker.role), len(self._tracks))
            row.extend((track, worker.num_waiting, worker.num_running, worker.used_blocks, worker.total_blocks))
        if len(self._samples) == self._max_samples:
            del self._samples[1::2]
            self._interval_s *= 2
        self._samples.append(_Sample(now_s, router_queued, router_inflight, row))
        # On a grid: a long silence costs no samples, and late events do not push later samples back.
        self._next_s = (math.floor(now_s / self._interval_s) + 1) * self._interval_s

    def lapse(self) -> Lapse:
        """All that is kept so far."""
        order = list(Role)
        keys = sorted(self._tracks, key=lambda key: (order.index(key[1]), self._tracks[key]))
        columns = self._columns()
        return Lapse(
            interval_s=self._interval_s,
            at_s=tuple(sample.at_s for sample in self._samples),
            router_queued=tuple(sample.router_queued for sample in self._samples),
            router_inflight=tuple(sample.router_inflight for sample in self._samples),
            tracks=tuple(Track(*key, *(tuple(column) for column in columns[self._tracks[key]])) for key in keys),
        )

    def _columns(self) -> list[list[list[int | None]]]:
        """Of each track: its four figures, each with a value for every sample."""
        num_samples = len(self._samples)
        columns: list[list[list[int | None]]] = [
            [[None] * num_samples for _ in range(FIELDS - 1)] for _ in self._tracks
        ]
        for position, sample in enumerate(self._samples):
            row = sample.workers
            for start in range(0, len(row), FIELDS):
                for column, value in zip(columns[row[start]], row[start + 1 : start + FIELDS], strict=True):
                    column[position] = value
        return columns
