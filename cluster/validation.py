"""How far a simulation is off what was measured, figure by figure. Pure.

Relative errors are of the simulation against the measurement; attainment is compared in points. Of several repeats the
median counts, on both sides. Knows nothing of how either side came about.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.cluster.load_report import LoadReport, Spread

P50_LIMIT = 0.08
P99_LIMIT = 0.15
ATTAINMENT_LIMIT = 0.03


@dataclass(frozen=True, slots=True)
class Point:
    """What was asked of which set-up."""

    setup: str
    workload: str
    rate: float

    @property
    def words(self) -> str:
        return f"{self.setup}, {self.workload} at {self.rate:g}/s"


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure on both sides. `limit` is of `error`; both are shares, of the measured value or of all requests."""

    name: str
    real: float | None
    simulated: float | None
    error: float | None
    limit: float

    @property
    def is_within(self) -> bool:
        """A figure that exists on one side only is a miss; one that exists on neither is none."""
        if self.error is None:
            return self.real is None and self.simulated is None
        return abs(self.error) <= self.limit


@dataclass(frozen=True, slots=True)
class Comparison:
    """One point. `step_error` is the profile's, on the steps that were really taken; `None` where they are not known.

    `send_lag_ms` is how late the load generator itself was at worst. `phases` has each phase's mean in ms, real and
    simulated.
    """

    point: Point
    figures: tuple[Figure, ...]
    num_requests: int
    num_failed: int
    step_error: float | None
    send_lag_ms: float
    phases: dict[str, tuple[float, float]]

    @property
    def attainment(self) -> Figure:
        return self.figures[-1]

    @property
    def is_within(self) -> bool:
        return all(figure.is_within for figure in self.figures)


def compare(
    point: Point, real: Sequence[LoadReport], simulated: Sequence[LoadReport], step_errors: Sequence[float]
) -> Comparison:
    """The repeats of one point."""
    figures = []
    for what in ("ttft", "tpot"):
        here, there = ([getattr(report, what) for report in side] for side in (real, simulated))
        for percentile, limit in (("p50_ms", P50_LIMIT), ("p99_ms", P99_LIMIT)):
            figures.append(_relative(f"{what}_{percentile}", here, there, percentile, limit))
    attained, expected = (statistics.median(report.attainment for report in side) for side in (real, simulated))
    figures.append(Figure("attainment", attained, expected, expected - attained, ATTAINMENT_LIMIT))
    return Comparison(
        point=point,
        figures=tuple(figures),
        num_requests=sum(report.num_requests for report in real),
        num_failed=sum(report.num_requests - report.num_completed for report in real),
        step_error=statistics.median(step_errors) if step_errors else None,
        send_lag_ms=max(report.max_send_lag_ms for report in real),
        phases=_phases(real, simulated),
    )


def _relative(
    name: str, real: Sequence[Spread | None], simulated: Sequence[Spread | None], percentile: str, limit: float
) -> Figure:
    here, there = _median(real, percentile), _median(simulated, percentile)
    error = None if here is None or there is None or here <= 0 else there / here - 1.0
    return Figure(name, here, there, error, limit)


def _median(spreads: Sequence[Spread | None], percentile: str) -> float | None:
    known: list[float] = [getattr(spread, percentile) for spread in spreads if spread is not None]
    return statistics.median(known) if known else None


def _phases(real: Sequence[LoadReport], simulated: Sequence[LoadReport]) -> dict[str, tuple[float, float]]:
    names = real[0].phase_means_ms
    return {
        name: (
            statistics.median(report.phase_means_ms.get(name, 0.0) for report in real),
            statistics.median(report.phase_means_ms.get(name, 0.0) for report in simulated),
        )
        for name in names
    }
