"""One phase's timed steps to the coefficients of its regions, with the errors on steps that were held out.

Both phases are the same problem: seconds as `fixed + per_unit * units + per_load * load`, no coefficient negative, the
slopes changing at a few numbers of units, and never a fall. The columns are made so that every such function is a sum
of them with weights of at least 0: units up to, between and beyond the bounds of regions (the line bends but does not
jump), load from a bound on (its price may only rise), and load beyond a bend of its own. So one non-negative
least-squares problem fits all regions.
A shape counts as often as it was timed, up to `MAX_COUNT` times.

Residuals are relative to what was measured. Against outliers: repeats of a shape become their median, then residuals
beyond `HUBER_SCALES` times the typical one lose weight in proportion, over a few rounds. Both draw the fit below the
mean, as disturbances only add to a step; the whole is then raised until its residuals sum to nothing, because answers
are sums of steps. A region is split, or the load bent, only where that takes enough off the mean error, and surely.
Held-out errors come from folds for which the bounds were chosen anew.

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

from pdserve.cluster.planner.nnls import Flags, Floats, nnls
from pdserve.cluster.planner.step_model import STRAIGHT, LoadBend, Phase, Region

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

SPLIT_GAIN, SPLIT_GAIN_ABSOLUTE = 0.05, 0.003
"""The part of the mean error that a split has to take off at least, and how much that has to be."""

SPLIT_SIGMAS = 4.0
"""Standard errors by which it has to: the best of many tried ones is often better by chance."""

LARGEST_RESIDUAL = 0.5
"""What one shape counts at most when splits are compared; beyond it no step counts towards the mean."""

MIN_SPREAD = 1.5
"""Largest by smallest load a unit, below which load and units were not varied apart."""


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
class FittedPhase:
    """Regions that cover every number of units, and how the price of the load bends over all of them."""

    parts: tuple[FittedRegion, ...]
    bend: LoadBend

    def model(self) -> Phase:
        return Phase((part.region for part in self.parts), self.bend)


@dataclass(frozen=True, slots=True)
class _Bends:
    """Numbers of units beyond which the price of a unit changes, and beyond which that of the load rises.

    Beyond a load of `far` it rises whatever the number of units.
    """

    units: tuple[int, ...] = ()
    loads: tuple[int, ...] = ()
    far: float = math.inf

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


def fit_phase(shapes: Shapes, may_bend_load: bool = False) -> FittedPhase:
    """At least one region."""
    bends = _choose_bends(shapes, may_bend_load)
    weights = _solve(shapes, bends)
    errors = _held_out_errors(shapes, _design(shapes, bends) @ weights, may_bend_load)
    fitted = []
    above = 0.0
    for region in _regions(weights, bends):
        inside = (shapes.units > above) & (shapes.units <= region.upto)
        fitted.append(FittedRegion(region, shapes.take(inside), errors[inside]))
        above = region.upto
    bend = STRAIGHT if bends.far == math.inf else LoadBend(bends.far, float(weights[-1]))
    return FittedPhase(tuple(fitted), bend)


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


def _design(shapes: Shapes, bends: _Bends) -> Floats:
    """One column for the fixed part, one for each price of a unit, one for each rise of the price of the load; the last
    for what is far, if anything is."""
    units = shapes.units
    edges = itertools.pairwise((0.0, *bends.units, math.inf))
    between = [np.minimum(units, upper) - np.minimum(units, lower) for lower, upper in edges]
    beyond = [np.where(units > bound, shapes.loads, 0.0) for bound in (0, *bends.loads)]
    far = [np.maximum(shapes.loads - bends.far, 0.0)] if bends.far < math.inf else []
    return np.column_stack([np.ones_like(units), *between, *beyond, *far])


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


def _choose_bends(shapes: Shapes, may_bend_load: bool) -> _Bends:
    """Split where it pays most, until it does not."""
    stride = -(-len(shapes) // MAX_CHOICE_SHAPES)
    shapes = shapes.take(np.arange(len(shapes)) % stride == 0)
    bends = _Bends()
    errors = _capped_errors(shapes, bends)
    while True:
        trials = [trial for trial in _splits(shapes, bends) if len(trial.bounds) < MAX_FITTED_REGIONS]
        if may_bend_load and bends.far == math.inf:
            trials += [replace(bends, far=bound) for bound in _inner(shapes.loads)]
        if not trials:
            return bends
        found = [_capped_errors(shapes, trial) for trial in trials]
        best = int(np.argmin([np.average(one, weights=weights_of(shapes.counts)) for one in found]))
        if not _is_worth_it(errors, found[best], weights_of(shapes.counts)):
            return bends
        bends, errors = trials[best], found[best]


def _is_worth_it(before: Floats, after: Floats, weights: Floats) -> bool:
    """Whether errors fell by enough, and by more than chance would have it."""
    gains = before - after
    gain = float(np.average(gains, weights=weights))
    spread = math.sqrt(float(np.average((gains - gain) ** 2, weights=weights)))
    doubt = spread * math.sqrt(float((weights**2).sum())) / float(weights.sum())
    is_enough = gain >= max(SPLIT_GAIN * float(np.average(before, weights=weights)), SPLIT_GAIN_ABSOLUTE)
    return is_enough and gain > SPLIT_SIGMAS * doubt


def _inner(values: Floats) -> list[float]:
    """Some of them, spread over their range, the ends left out."""
    distinct = np.unique(values)
    places = np.unique(np.linspace(0, distinct.size - 1, MAX_CANDIDATES + 2).round().astype(int))[1:-1]
    return [float(distinct[place]) for place in places]


def _splits(shapes: Shapes, bends: _Bends) -> Iterator[_Bends]:
    """The bends with one more, where enough was measured on both sides of it."""
    values = np.unique(shapes.units)
    for bound in (int(value) for value in _inner(shapes.units)):
        more = tuple(sorted({*bends.units, bound}))
        edges = itertools.pairwise((0, *more, math.inf))
        if more != bends.units and all(((values > low) & (values <= high)).sum() >= 2 for low, high in edges):
            yield replace(bends, units=more)
        beyond = shapes.units > bound
        if bound not in bends.loads and varies_apart(shapes.take(beyond)) and varies_apart(shapes.take(~beyond)):
            yield replace(bends, loads=tuple(sorted({*bends.loads, bound})))


def _capped_errors(shapes: Shapes, bends: _Bends) -> Floats:
    errors: Floats = np.minimum(_errors(shapes, bends, _solve(shapes, bends)), LARGEST_RESIDUAL)
    return errors


def _held_out_errors(shapes: Shapes, fitted: Floats, may_bend_load: bool) -> Floats:
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
        bends = _choose_bends(rest, may_bend_load)
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
    load_rises = dict(zip((0, *bends.loads), others[len(unit_prices) :], strict=False))
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
