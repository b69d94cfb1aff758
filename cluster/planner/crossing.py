"""The rate at which attainment falls to a target: one curve through runs at several rates, with Fieller's interval.

Every run near the crossing sharpens it, wherever it lies, which is why this costs fewer requests than settling rates
one by one. The curve is right near the crossing only: whoever calls chooses runs that are near, and looks whether they
are stationary. This does neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pdserve.cluster.planner.attainment import (
    MAX_CORRELATION,
    MIN_BATCH_REQUESTS,
    Outcomes,
    judge,
    pooled_correlation,
    t_quantile,
    widening,
)
from pdserve.cluster.planner.stationarity import FloatArray, batch_means

NUM_BATCHES = (40, 20, 10)
"""More would be too short (Schmeiser 1982); fewer if neighbours are still correlated."""

MIN_DOF = 4


@dataclass(frozen=True, slots=True)
class Crossing:
    """The rate at which attainment falls to a target, with its 95 % interval: (0, inf) if the data do not bound it.
    `slope` is by how much the logarithm of the misses grows per unit of relative rate."""

    rate: float
    low: float
    high: float
    slope: float


@dataclass(frozen=True, slots=True)
class _Batches:
    """Batch means of several runs, one after the other; `lengths` says how many belong to each run."""

    rate: FloatArray
    hits: FloatArray
    controls: FloatArray
    lengths: tuple[int, ...]


def cross(
    runs: Sequence[tuple[float, Outcomes]], target: float, slo_class: int | None = None, confidence: float = 0.95
) -> Crossing | None:
    """Where attainment falls below the target, from runs at several rates around it; `None` where it does not fall.

    One curve, attainment = exp(-exp(level + slope * rate)), as waiting times have exponential tails that grow with the
    load. It is fitted to batch means by quasi-likelihood (Wedderburn 1974): how much batches scatter around it says how
    uncertain it is. The crossing's interval is Fieller's (1954), which carries the uncertainty of the slope. Control
    variates (Lavenberg & Welch 1981) take out what is known to be chance: arrivals that came faster than the rate
    says, and the simulator's own `controls`.
    """
    if len({rate for rate, _ in runs}) < 2:
        return None
    center = float(np.mean([rate for rate, _ in runs]))
    for num_batches in NUM_BATCHES:
        batches = _batches(runs, num_batches, slo_class)
        dof = len(batches.hits) - 2 - batches.controls.shape[1]
        if dof < MIN_DOF:
            return None
        design = np.stack([np.ones_like(batches.rate), batches.rate / center - 1], axis=1)
        curve = _fit(design, batches.hits)
        hits = batches.hits - batches.controls @ _control_weights(design, curve, batches)
        curve = _fit(design, hits)
        residuals = (hits - curve.fitted) / curve.errors
        correlation = pooled_correlation(np.split(residuals, np.cumsum(batches.lengths)[:-1]))
        if correlation <= MAX_CORRELATION:
            break
    level, slope = (float(one) for one in curve.coefficients)
    if not slope > 0:
        return None
    level -= math.log(-math.log(target))
    scatter = float(residuals @ residuals) / dof * widening(correlation)
    gradient = design * (curve.gradient / curve.errors)[:, None]
    covariance = scatter * np.linalg.inv(gradient.T @ gradient)
    low, high = _fieller(level, slope, covariance, t_quantile(dof, (1 + confidence) / 2))
    rate, low, high = (center * max(0.0, 1 + x) for x in (-level / slope, low, high))
    return Crossing(rate, low, high, slope)


def _batches(runs: Sequence[tuple[float, Outcomes]], num_batches: int, slo_class: int | None) -> _Batches:
    """About so many in all, at least one for each run."""
    judged = judge([outcomes for _, outcomes in runs], slo_class)
    kept = [(rate, one) for (rate, _), one in zip(runs, judged, strict=True) if len(one) >= MIN_BATCH_REQUESTS]
    size = sum(len(one) for _, one in kept) / num_batches
    lengths = tuple(max(1, round(len(one) / size)) for _, one in kept)
    hits, controls = [np.empty(0)], [np.empty((0, 1 + len(runs[0][1].controls)))]
    for (rate, one), length in zip(kept, lengths, strict=True):
        hits.append(batch_means(one.hits, length))
        columns = (one.gaps * rate - 1.0, *one.controls)
        controls.append(np.stack([batch_means(column, length) for column in columns], axis=1))
    rates = np.repeat([rate for rate, _ in kept], lengths)
    return _Batches(rates, np.concatenate(hits), np.concatenate(controls), lengths)


@dataclass(frozen=True, slots=True)
class _Curve:
    """Attainment `fitted` to each batch, its `gradient` by the exponent, and the standard `errors` of one request."""

    coefficients: FloatArray
    fitted: FloatArray
    gradient: FloatArray
    errors: FloatArray


def _curve(design: FloatArray, coefficients: FloatArray) -> _Curve:
    misses = np.exp(np.clip(design @ coefficients, -8.0, 2.0))
    fitted = np.exp(-misses)
    return _Curve(coefficients, fitted, -misses * fitted, np.sqrt(fitted * (1 - fitted)))


def _fit(design: FloatArray, shares: FloatArray) -> _Curve:
    """By Fisher scoring; corrected shares may lie a little outside of [0, 1]."""
    mean = min(0.999, max(0.001, float(shares.mean())))
    curve = _curve(design, np.array([math.log(-math.log(mean)), 0.0]))
    for _ in range(30):
        gradient = design * (curve.gradient / curve.errors)[:, None]
        information = gradient.T @ gradient + 1e-9 * np.eye(2)
        step = np.linalg.solve(information, gradient.T @ ((shares - curve.fitted) / curve.errors))
        step *= min(1.0, 2.0 / max(1e-12, float(np.abs(design @ step).max())))
        curve = _curve(design, curve.coefficients + step)
        if float(np.abs(step).max()) < 1e-8:
            break
    return curve


def _control_weights(design: FloatArray, curve: _Curve, batches: _Batches) -> FloatArray:
    """By how much hits follow each control, beside level and slope."""
    columns = np.concatenate([design * curve.gradient[:, None], batches.controls], axis=1) / curve.errors[:, None]
    solution = np.linalg.lstsq(columns, (batches.hits - curve.fitted) / curve.errors)[0]
    return np.asarray(solution[design.shape[1] :], dtype=np.float64)


def _fieller(level: float, slope: float, covariance: FloatArray, t: float) -> tuple[float, float]:
    """All x at which `level + slope * x` is within `t` errors of zero."""
    square = slope**2 - t**2 * float(covariance[1, 1])
    if square <= 0:
        return -math.inf, math.inf
    linear = level * slope - t**2 * float(covariance[0, 1])
    constant = level**2 - t**2 * float(covariance[0, 0])
    root = math.sqrt(max(0.0, linear**2 - square * constant))
    return (-linear - root) / square, (-linear + root) / square
