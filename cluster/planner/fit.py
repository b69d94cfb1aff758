"""Timed steps to what a profile needs of them: coefficients of both phases, their overlap, errors, bounds, gaps.

Steps of one phase alone fit that phase (`phase_fit`); mixed steps then fit the one coefficient that is left. Errors
are relative and on held-out samples. What was measured too thinly is named, in words that say what to time. Knows
nothing of how steps are timed, and nothing of a profile beyond its step times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pdserve.cluster.planner.phase_fit import (
    NUM_FOLDS,
    REWEIGHTINGS,
    FittedRegion,
    Floats,
    Shapes,
    distinct_shapes,
    fit_phase,
    huber_weights,
    varies_apart,
)
from pdserve.cluster.planner.profile import (
    DecodeRegion,
    Domain,
    FitError,
    MixedSteps,
    PrefillRegion,
    Range,
    region_bounds,
)
from pdserve.cluster.planner.step_model import Phase, Region, mixing
from pdserve.cluster.planner.step_shape import StepShape
from pdserve.proto.errors import ConfigError

MIN_SHAPES = 5
"""Distinct shapes below which a region is called thin."""


@dataclass(frozen=True, slots=True)
class StepSample:
    """One timed step."""

    shape: StepShape
    duration_s: float


@dataclass(frozen=True, slots=True)
class StepFit:
    """What a profile needs of the steps; `thin` names what more samples are needed for."""

    prefill: tuple[PrefillRegion, ...]
    decode: tuple[DecodeRegion, ...]
    mixed: MixedSteps
    domain: Domain
    thin: tuple[str, ...]


def fit_steps(samples: Sequence[StepSample]) -> StepFit:
    """Coefficients for both phases and their overlap in mixed steps.

    Raises:
        ConfigError: a sample is no timed step, or one phase has no step of its own.
    """
    _check(samples)
    shapes = [sample.shape for sample in samples]
    seconds = [sample.duration_s for sample in samples]
    prefill = _alone("prefill", ((s[0], s[1], t) for s, t in zip(shapes, seconds, strict=True) if not s.num_decodes))
    decode = _alone("decode", ((s[2], s[3], t) for s, t in zip(shapes, seconds, strict=True) if not s[0]))
    prefill_parts, decode_parts = fit_phase(prefill), fit_phase(decode)
    mixed = _fit_overlap(samples, _phase(prefill_parts), _phase(decode_parts))
    thin = [*_thin("prefill", "tokens", prefill_parts), *_thin("decode", "sequences", decode_parts)]
    if not mixed.num_samples:
        thin.append("mixed steps: none timed; overlap 0 is assumed")
    domain = Domain(
        chunk_tokens=_range(prefill.units),
        context_tokens=_range(prefill.loads / prefill.units),
        decode_batch=_range(decode.units),
        decode_context_tokens=_range(decode.loads),
    )
    return StepFit(
        tuple(prefill_region(part.region, _part_error(part)) for part in prefill_parts),
        tuple(decode_region(part.region, _part_error(part)) for part in decode_parts),
        mixed,
        domain,
        tuple(thin),
    )


def _check(samples: Sequence[StepSample]) -> None:
    for number, sample in enumerate(samples):
        shape = sample.shape
        if not (math.isfinite(sample.duration_s) and sample.duration_s > 0):
            raise ConfigError(f"samples.{number}: {sample.duration_s!r} s is no duration of a step")
        if not shape.num_prefill_tokens + shape.num_decodes or not all(0 <= value < math.inf for value in shape):
            raise ConfigError(f"samples.{number}: {tuple(shape)} is no shape of a step")


def _alone(phase: str, points: Iterator[tuple[float, float, float]]) -> Shapes:
    shapes = distinct_shapes(points)
    if not len(shapes):
        raise ConfigError(f"samples: none is a {phase} step alone; time some steps without the other phase")
    return shapes


def _phase(parts: Sequence[FittedRegion]) -> Phase:
    return Phase(part.region for part in parts)


def _fit_overlap(samples: Sequence[StepSample], prefill: Phase, decode: Phase) -> MixedSteps:
    """The share of the smaller part that does not add to the larger one; where no mixed step was timed, 0."""
    mixed = [(s.shape, s.duration_s) for s in samples if s.shape.num_prefill_tokens and s.shape.num_decodes]
    if not mixed:
        return MixedSteps()
    mixer = mixing(prefill, decode)
    parts = np.array(
        [
            (*mixer.parts(prefill.seconds(tokens, pairs), decode.seconds(batch, context_tokens)), seconds)
            for (tokens, pairs, batch, context_tokens), seconds in mixed
        ]
    )
    larger, smaller = parts[:, 0] / parts[:, 2], parts[:, 1] / parts[:, 2]
    errors = np.full(larger.size, math.nan)
    folds = np.arange(larger.size) % NUM_FOLDS
    for fold in range(min(NUM_FOLDS, larger.size) if larger.size > 1 else 0):
        held = folds == fold
        exposed = _exposed(larger[~held], smaller[~held])
        errors[held] = np.abs(larger[held] + exposed * smaller[held] - 1.0)
    return MixedSteps(overlap=1.0 - _exposed(larger, smaller), **_fit_error(errors, larger.size).model_dump())


def _exposed(larger: Floats, smaller: Floats) -> float:
    """The weight in [0, 1] of the smaller parts, reweighted as a phase is. Parts are shares of the measured time."""
    weights, exposed = np.ones(larger.size), 1.0
    for _ in range(REWEIGHTINGS):
        size = float((weights * smaller * smaller).sum())
        if size == 0.0:
            return 1.0
        exposed = min(1.0, max(0.0, float((weights * smaller * (1.0 - larger)).sum()) / size))
        weights = huber_weights(np.abs(larger + exposed * smaller - 1.0))
    return exposed


def _thin(phase: str, unit: str, parts: Sequence[FittedRegion]) -> Iterator[str]:
    above = 0
    for part in parts:
        upto = _upto(part.region)
        where = f"{phase}, {region_bounds(above, upto)} {unit}"
        if len(part.shapes) < MIN_SHAPES:
            yield f"{where}: {len(part.shapes)} distinct shapes; time at least {MIN_SHAPES}"
        elif not varies_apart(part.shapes):
            yield f"{where}: context did not vary on its own; time equal steps behind shorter and longer contexts"
        above = upto or above


def prefill_region(region: Region, error: FitError) -> PrefillRegion:
    """A region as a profile writes it."""
    return PrefillRegion(
        upto_tokens=_upto(region),
        fixed_s=region.fixed_s,
        per_token_s=region.per_unit_s,
        per_pair_s=region.per_load_s,
        **error.model_dump(),
    )


def decode_region(region: Region, error: FitError) -> DecodeRegion:
    """A region as a profile writes it."""
    return DecodeRegion(
        upto_batch=_upto(region),
        fixed_s=region.fixed_s,
        per_sequence_s=region.per_unit_s,
        per_context_token_s=region.per_load_s,
        **error.model_dump(),
    )


def _upto(region: Region) -> int | None:
    return None if region.upto == math.inf else int(region.upto)


def _part_error(part: FittedRegion) -> FitError:
    return _fit_error(part.errors, int(part.shapes.counts.sum()))


def _fit_error(errors: Floats, num_samples: int) -> FitError:
    known = errors[np.isfinite(errors)]
    if not known.size:
        return FitError(num_samples=num_samples)
    median, p95 = np.percentile(known, [50, 95])
    return FitError(num_samples=num_samples, median_error=float(median), p95_error=float(p95))


def _range(values: Floats) -> Range:
    return Range(smallest=float(values.min()), largest=float(values.max()))
