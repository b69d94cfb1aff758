"""One phase's timed steps to the coefficients of its regions, with the errors on steps that were held out.

Both phases are the same problem: seconds as `fixed + per_unit * units + per_load * load`, no coefficient negative, the
slopes changing at a few numbers of units, and never a fall. The columns are made so that every such function is a sum
of them with weights of at least 0: units up to, between and beyond the bounds of regions (the line bends but does not
jump), and load from a bound on (its price may only rise). So one non-negative least-squares problem fits all regions.
A shape counts as often as it was timed, up to `MAX_COUNT` times.

Residuals are relative to what was measured. Against outliers: repeats of a shape become their median, then residuals
beyond `HUBER_SCALES` times the typical one lose weight in proportion, over a few rounds. Both draw the fit below the
mean, as disturbances only add to a step; the whole is then raised until its residuals sum to nothing, because answers
are sums of steps. A region is split only where
that takes a fifth off the mean error. Held-out errors come from folds for which the bounds were chosen anew.

Knows nothing of phases, profiles or where samples come from. An outlier that was never repeated, in a corner with few
shapes, can win.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pdserve.cluster.planner.step_model import Region

MAX_FITTED_REGIONS = 4
MAX_COUNT = 64
RAISES = 3
"""What is taken for an outlier below the mean need not be one at it."""

MAX_CANDIDATES = 12
"""Numbers of units that are tried as a bound in one round."""

MAX_CHOICE_SHAPES = 1000
"""Shapes that bounds are chosen by; of more, every second, third, ... one."""

NUM_FOLDS = 10
HUBER_SCALES = 1.5
REWEIGHTINGS = 8
MIN_SCALE = 1e-3
"""Relative residuals below this are not told apart: they are the clock's noise."""

SPLIT_GAIN = 0.2
SPLIT_GAIN_ABSOLUTE = 0.003
LARGEST_RESIDUAL = 0.5
"""What one shape counts at most when splits are compared; beyond it no step counts towards the mean."""

MIN_SPREAD = 1.5
"""Largest by smallest load a unit, below which load and units were not varied apart."""

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Shapes:
    """Distinct shapes of one phase, by units and load, each with its median time and how often it was timed."""

    units: Floats
    loads: Floats
    seconds: Floats
    counts: Floats

    def __len__(self) -> int:
        return self.units.size

    def take(self, chosen: Flags) -> Shapes:
        return Shapes(self.units[chosen], self.loads[chosen], self.seconds[chosen], self.counts[chosen])


@dataclass(frozen=True, slots=True)
class FittedRegion:
    """Coefficients, the shapes they are for and the relative error at each; not a number where none was held out."""

    region: Region
    shapes: Shapes
    errors: Floats


@dataclass(frozen=True, slots=True)
class _Bends:
    """Numbers of units beyond which the price of a unit changes, and beyond which that of the load rises."""

    units: tuple[int, ...] = ()
    loads: tuple[int, ...] = ()

    @property
    def bounds(self) -> tuple[int, ...]:
        return tuple(sorted({*self.units, *self.loads}))


def distinct_shapes(points: Iterable[tuple[float, float, float, int]]) -> Shapes:
    """Points of units, load, seconds and how many steps they are the mean of; equal shapes become one."""
    repeats: dict[tuple[float, float], list[tuple[float, int]]] = defaultdict(list)
    for units, load, seconds, count in points:
        repeats[units, load].append((seconds, count))
    rows = sorted(
        (units, load, float(np.median([seconds for seconds, _ in times])), sum(count for _, count in times))
        for (units, load), times in repeats.items()
    )
    return Shapes(*np.array(rows, dtype=np.float64).reshape(-1, 4).T)


def fit_phase(shapes: Shapes) -> list[FittedRegion]:
    """At least one region; together they cover every number of units."""
    bends = _choose_bends(shapes)
    weights = _solve(shapes, bends)
    errors = _held_out_errors(shapes, _design(shapes, bends) @ weights)
    fitted = []
    above = 0.0
    for region in _regions(weights, bends):
        inside = (shapes.units > above) & (shapes.units <= region.upto)
        fitted.append(FittedRegion(region, shapes.take(inside), errors[inside]))
        above = region.upto
    return fitted


def varies_apart(shapes: Shapes) -> bool:
    """Whether the load differs enough at like units for the two prices to be told apart."""
    if len(shapes) < 3:
        return False
    ratios = shapes.loads / shapes.units
    return float(ratios.max()) >= MIN_SPREAD * float(ratios.min())


def mean_residual(ratios: Floats, counts: Floats) -> float:
    """Of measured by predicted, less 1; what is beyond `LARGEST_RESIDUAL` was something else."""
    residuals = ratios - 1.0
    usual = np.abs(residuals) <= LARGEST_RESIDUAL
    return float(np.average(residuals[usual], weights=counts[usual])) if usual.any() else 0.0


def weights_of(counts: Floats) -> Floats:
    """What shapes count that were timed so often: a mean of many is nearer to the truth, but only so much nearer."""
    weights: Floats = np.minimum(counts, MAX_COUNT)
    return weights


def huber_weights(residuals: Floats) -> Floats:
    """1 for residuals of the usual size, less in proportion for larger ones."""
    scale = max(1.4826 * float(np.median(residuals)), MIN_SCALE)
    weights: Floats = np.minimum(1.0, HUBER_SCALES * scale / np.maximum(residuals, 1e-300))
    return weights


def nnls(matrix: Floats, target: Floats) -> Floats:
    """The x >= 0 with the least |matrix x - target|: the active-set method of Lawson and Hanson (1974)."""
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0.0] = 1.0
    scaled = matrix / scale
    gram, moment = scaled.T @ scaled, scaled.T @ target
    unbounded = _solve_on(gram, moment, np.ones(moment.size, dtype=bool))
    if unbounded.min() >= 0.0:
        return np.asarray(unbounded / scale)
    tolerance = 1e-12 * max(1.0, float(np.abs(moment).max()))
    x, passive = np.zeros(moment.size), np.zeros(moment.size, dtype=bool)
    for _ in range(3 * moment.size):
        gradient = np.where(passive, -math.inf, moment - gram @ x)
        entering = int(np.argmax(gradient))
        if gradient[entering] <= tolerance:
            break
        passive[entering] = True
        trial = _solve_on(gram, moment, passive)
        while passive.any() and trial[passive].min() <= 0.0:
            blocked = passive & (trial <= 0.0)
            x += float(np.min(x[blocked] / (x[blocked] - trial[blocked]))) * (trial - x)
            passive &= x > 1e-14
            x[~passive] = 0.0
            trial = _solve_on(gram, moment, passive)
        x = trial
    result: Floats = x / scale
    return result


def _solve_on(gram: Floats, moment: Floats, passive: Flags) -> Floats:
    trial = np.zeros(moment.size)
    trial[passive] = np.linalg.lstsq(gram[np.ix_(passive, passive)], moment[passive], rcond=1e-12)[0]
    return trial


def _design(shapes: Shapes, bends: _Bends) -> Floats:
    """One column for the fixed part, one for each price of a unit, one for each rise of the price of the load."""
    units = shapes.units
    edges = itertools.pairwise((0.0, *bends.units, math.inf))
    between = [np.minimum(units, upper) - np.minimum(units, lower) for lower, upper in edges]
    beyond = [np.where(units > bound, shapes.loads, 0.0) for bound in (0, *bends.loads)]
    return np.column_stack([np.ones_like(units), *between, *beyond])


def _solve(shapes: Shapes, bends: _Bends) -> Floats:
    """Weights of the columns, by reweighted relative least squares."""
    matrix = _design(shapes, bends) / shapes.seconds[:, None]
    counts = weights_of(shapes.counts)
    weights = np.ones(len(shapes))
    for _ in range(REWEIGHTINGS):
        roots = np.sqrt(weights * counts)
        found = nnls(matrix * roots[:, None], roots)
        before, weights = weights, huber_weights(np.abs(matrix @ found - 1.0))
        if np.allclose(before, weights, atol=1e-3):
            break
    for _ in range(RAISES):
        found = found * (1.0 + mean_residual(1.0 / np.maximum(matrix @ found, 1e-9), counts))
    return found


def _errors(shapes: Shapes, bends: _Bends, weights: Floats) -> Floats:
    errors: Floats = np.abs(_design(shapes, bends) @ weights / shapes.seconds - 1.0)
    return errors


def _choose_bends(shapes: Shapes) -> _Bends:
    """Split where it pays most, until it does not."""
    stride = -(-len(shapes) // MAX_CHOICE_SHAPES)
    shapes = shapes.take(np.arange(len(shapes)) % stride == 0)
    bends = _Bends()
    error = _mean_error(shapes, bends)
    while True:
        trials = [trial for trial in _splits(shapes, bends) if len(trial.bounds) < MAX_FITTED_REGIONS]
        errors = [_mean_error(shapes, trial) for trial in trials]
        best = min(errors, default=error)
        if best > (1.0 - SPLIT_GAIN) * error or error - best < SPLIT_GAIN_ABSOLUTE:
            return bends
        bends, error = trials[errors.index(best)], best


def _splits(shapes: Shapes, bends: _Bends) -> Iterator[_Bends]:
    """The bends with one more, where enough was measured on both sides of it."""
    values = np.unique(shapes.units)
    places = np.unique(np.linspace(0, values.size - 1, MAX_CANDIDATES + 2).round().astype(int))[1:-1]
    for bound in (int(values[place]) for place in places):
        more = tuple(sorted({*bends.units, bound}))
        edges = itertools.pairwise((0, *more, math.inf))
        if more != bends.units and all(((values > low) & (values <= high)).sum() >= 2 for low, high in edges):
            yield replace(bends, units=more)
        beyond = shapes.units > bound
        if bound not in bends.loads and varies_apart(shapes.take(beyond)) and varies_apart(shapes.take(~beyond)):
            yield replace(bends, loads=tuple(sorted({*bends.loads, bound})))


def _mean_error(shapes: Shapes, bends: _Bends) -> float:
    return float(np.minimum(_errors(shapes, bends, _solve(shapes, bends)), LARGEST_RESIDUAL).mean())


def _held_out_errors(shapes: Shapes, fitted: Floats) -> Floats:
    """Relative error at each shape of a fit without it; not a number where too few shapes would be left.

    The ends of what was measured are in every fit, because beyond them nobody relies on a model unwarned; at them the
    error is that of the fit to all.
    """
    errors = np.full(len(shapes), math.nan)
    inner = ~_ends(shapes)
    num_inner = int(inner.sum())
    if num_inner < 3:
        return errors
    errors[~inner] = np.abs(fitted / shapes.seconds - 1.0)[~inner]
    num_folds = min(NUM_FOLDS, num_inner)
    folds = np.where(inner, np.cumsum(inner) % num_folds, -1)
    for fold in range(num_folds):
        rest, held = shapes.take(folds != fold), shapes.take(folds == fold)
        bends = _choose_bends(rest)
        errors[folds == fold] = _errors(held, bends, _solve(rest, bends))
    return errors


def _ends(shapes: Shapes) -> Flags:
    """The shapes without which less would have been measured."""
    ends = np.zeros(len(shapes), dtype=bool)
    for values in (shapes.units, shapes.loads):
        for end in (values.min(), values.max()):
            if (values == end).sum() == 1:
                ends |= values == end
    return ends


def _regions(weights: Sequence[float] | Floats, bends: _Bends) -> list[Region]:
    """The sum of columns as one line for each region. Lines meet at the bounds, or the later one lies above."""
    fixed, *others = (float(weight) for weight in weights)
    unit_prices = dict(zip((0, *bends.units), others, strict=False))
    load_rises = dict(zip((0, *bends.loads), others[len(unit_prices) :], strict=True))
    # A step that takes no time at all would let a run of steps go on for ever.
    fixed_s, per_unit_s, per_load_s = max(fixed, 1e-9), 0.0, 0.0
    regions = []
    for lower, upper in itertools.pairwise((0, *bends.bounds, math.inf)):
        end_s = fixed_s + per_unit_s * lower
        before_s, per_unit_s = per_unit_s, unit_prices.get(int(lower), per_unit_s)
        fixed_s += (before_s - per_unit_s) * lower
        per_load_s += load_rises.get(int(lower), 0.0)
        while fixed_s + per_unit_s * lower < end_s:  # by rounding
            fixed_s += math.ulp(end_s)
        regions.append(Region(upper, fixed_s, per_unit_s, per_load_s))
    return regions
