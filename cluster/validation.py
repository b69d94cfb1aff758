"""How far a simulation is off what was measured, figure by figure, and whether it ranks set-ups as reality does. Pure.

Relative errors are of the simulation against the measurement; attainment is compared in points. Of several repeats the
median counts, on both sides. Knows nothing of how either side came about.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pdserve.cluster.load_report import LoadReport, Spread

P50_LIMIT = 0.08
P99_LIMIT = 0.15
ATTAINMENT_LIMIT = 0.03
TIE = 0.03
"""Attainments closer than this are no order: neither side's sampling tells them apart."""


@dataclass(frozen=True, slots=True)
class Point:
    """What was asked of which set-up."""

    setup: str
    workload: str
    rate: float


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


@dataclass(frozen=True, slots=True)
class Order:
    """The set-ups at one workload and rate by attainment, the best first. `swapped` pairs differ on purpose."""

    workload: str
    rate: float
    real: tuple[str, ...]
    simulated: tuple[str, ...]
    swapped: tuple[tuple[str, str], ...]


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


def orders(comparisons: Iterable[Comparison]) -> tuple[Order, ...]:
    """One for each workload and rate that more than one set-up was measured at."""
    groups: dict[tuple[str, float], list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault((comparison.point.workload, comparison.point.rate), []).append(comparison)
    return tuple(_order(*key, group) for key, group in groups.items() if len(group) > 1)


def _order(workload: str, rate: float, group: Sequence[Comparison]) -> Order:
    real = {one.point.setup: one.attainment.real or 0.0 for one in group}
    simulated = {one.point.setup: one.attainment.simulated or 0.0 for one in group}
    swapped = [
        pair
        for pair in itertools.combinations(real, 2)
        if _sign(real, pair) and _sign(simulated, pair) and _sign(real, pair) != _sign(simulated, pair)
    ]
    return Order(workload, rate, _ranked(real), _ranked(simulated), tuple(swapped))


def _sign(attainments: Mapping[str, float], pair: tuple[str, str]) -> int:
    gap = attainments[pair[0]] - attainments[pair[1]]
    return 0 if abs(gap) <= TIE else (1 if gap > 0 else -1)


def _ranked(attainments: Mapping[str, float]) -> tuple[str, ...]:
    return tuple(sorted(attainments, key=lambda setup: (-attainments[setup], setup)))


def _phases(real: Sequence[LoadReport], simulated: Sequence[LoadReport]) -> dict[str, tuple[float, float]]:
    names = real[0].phase_means_ms
    return {
        name: (
            statistics.median(report.phase_means_ms.get(name, 0.0) for report in real),
            statistics.median(report.phase_means_ms.get(name, 0.0) for report in simulated),
        )
        for name in names
    }
