"""Timed steps to what a profile needs of them: coefficients of both phases, their overlap, errors, bounds, gaps.

Steps of one phase alone fit that phase (`phase_fit`); mixed steps then fit the two coefficients that are left. Errors
are relative and on held-out samples. What was measured too thinly is named, in words that say what to time. Knows
nothing of how steps are timed, and nothing of a profile beyond its step times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from pdserve.cluster.planner.phase_fit import (
    NUM_FOLDS,
    REWEIGHTINGS,
    FittedRegion,
    Flags,
    Floats,
    Shapes,
    distinct_shapes,
    fit_phase,
    huber_weights,
    mean_residual,
    nnls,
    varies_apart,
    weights_of,
)
from pdserve.cluster.planner.profile import (
    Contention,
    DecodeRegion,
    Domain,
    FitError,
    MixedSteps,
    PrefillRegion,
    Range,
    region_bounds,
)
from pdserve.cluster.planner.step_model import Phase, Region, decode_phase, mixing, prefill_phase
from pdserve.cluster.planner.step_shape import StepShape
from pdserve.proto.errors import ConfigError

MIN_SHAPES = 5
"""Distinct shapes below which a region is called thin."""


CONTENTION_ROUNDS = 3
MIN_BUSY_SPREAD = 0.1
"""Standard deviation of the share of company below which nothing can be said of what it costs."""

MAX_CONTENTION = 1.0


@dataclass(frozen=True, slots=True)
class StepSample:
    """Timed steps of like shape: their mean, and how many they are.

    `busy` is the share of that time in which the machine's other workers computed.
    """

    shape: StepShape
    duration_s: float
    busy: float = 0.0
    num_steps: int = 1


@dataclass(frozen=True, slots=True)
class StepFit:
    """What a profile needs of the steps; `thin` names what more samples are needed for."""

    prefill: tuple[PrefillRegion, ...]
    decode: tuple[DecodeRegion, ...]
    mixed: MixedSteps
    contention: Contention | None
    domain: Domain
    thin: tuple[str, ...]


def fit_steps(samples: Sequence[StepSample]) -> StepFit:
    """Coefficients for both phases, their overlap in mixed steps, and what other workers add to a step.

    The two depend on each other: steps are fitted as if they had been taken alone, then what is left of those beside
    others is their price, and again.

    Raises:
        ConfigError: a sample is no timed step, or one phase has no step of its own.
    """
    _check(samples)
    fit = _fit_alone(samples)
    for _ in range(CONTENTION_ROUNDS):
        contention = _fit_contention(samples, fit)
        if contention is None:
            break
        fit = replace(_fit_alone([_alone_sample(sample, contention) for sample in samples]), contention=contention)
    return fit


def _alone_sample(sample: StepSample, contention: Contention) -> StepSample:
    slower = contention.prefill if sample.shape.num_prefill_tokens else contention.decode
    return replace(sample, duration_s=sample.duration_s / (1.0 + slower * sample.busy))


def _fit_contention(samples: Sequence[StepSample], fit: StepFit) -> Contention | None:
    """`None` where steps with and without company were not both seen."""
    prefill, decode = prefill_phase(fit.prefill), decode_phase(fit.decode)
    pure = [sample for sample in samples if not (sample.shape.num_prefill_tokens and sample.shape.num_decodes)]
    seen: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
    for sample in pure:
        tokens, pairs, batch, context_tokens = sample.shape
        alone_s = prefill.seconds(tokens, pairs) if tokens else decode.seconds(batch, context_tokens)
        seen[bool(tokens)].append((sample.busy, sample.duration_s / alone_s, sample.num_steps))
    slower = {is_prefill: _slope(points) for is_prefill, points in seen.items()}
    if slower[True] is None and slower[False] is None:
        return None
    return Contention(prefill=slower[True] or 0.0, decode=slower[False] or 0.0)


def _slope(points: Sequence[tuple[float, float, float]]) -> float | None:
    """Of a line through ratios over busy shares, by its value at 0; `None` where the shares are all alike."""
    if len(points) < MIN_SHAPES:
        return None
    busy, ratios, counts = np.array(points, dtype=np.float64).T
    if float(np.std(busy)) < MIN_BUSY_SPREAD:
        return None
    slope, alone = np.polyfit(busy, np.clip(ratios, 0.5, 2.0), 1, w=np.sqrt(weights_of(counts)))
    return min(MAX_CONTENTION, max(0.0, float(slope / alone))) if alone > 0 else None


def _fit_alone(samples: Sequence[StepSample]) -> StepFit:
    """As if no sample had company."""
    times = [(sample.shape, sample.duration_s, sample.num_steps) for sample in samples]
    prefill = _alone("prefill", ((s[0], s[1], seconds, count) for s, seconds, count in times if not s.num_decodes))
    decode = _alone("decode", ((s[2], s[3], seconds, count) for s, seconds, count in times if not s[0]))
    prefill_parts, decode_parts = fit_phase(prefill), fit_phase(decode)
    mixed = _fit_mixed(samples, _phase(prefill_parts), _phase(decode_parts))
    thin = [*_thin("prefill", "tokens", prefill_parts), *_thin("decode", "sequences", decode_parts)]
    if not mixed.num_samples:
        thin.append("mixed steps: none timed; the sum of both phases is assumed")
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
        None,
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


def _alone(phase: str, points: Iterator[tuple[float, float, float, int]]) -> Shapes:
    shapes = distinct_shapes(points)
    if not len(shapes):
        raise ConfigError(f"samples: none is a {phase} step alone; time some steps without the other phase")
    return shapes


def _phase(parts: Sequence[FittedRegion]) -> Phase:
    return Phase(part.region for part in parts)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Mixed steps: seconds of the larger phase, what the smaller one adds at most, what was measured; how many."""

    larger: Floats
    smaller: Floats
    measured: Floats
    counts: Floats

    def take(self, chosen: Flags) -> _Parts:
        return _Parts(self.larger[chosen], self.smaller[chosen], self.measured[chosen], self.counts[chosen])

    def ratios(self, mix: _Mix) -> Floats:
        """Of predicted to measured."""
        predicted: Floats = (self.larger + mix.exposed * self.smaller + mix.extra_s) / self.measured
        return predicted


class _Mix(NamedTuple):
    """`exposed` of the smaller part adds to the larger one, and `extra_s` on top."""

    exposed: float
    extra_s: float


def _fit_mixed(samples: Sequence[StepSample], prefill: Phase, decode: Phase) -> MixedSteps:
    """Where no mixed step was timed, both parts add up and no more."""
    mixed = [s for s in samples if s.shape.num_prefill_tokens and s.shape.num_decodes]
    if not mixed:
        return MixedSteps()
    mixer = mixing(prefill, decode)
    rows = [
        (*mixer.parts(prefill.seconds(*s.shape[:2]), decode.seconds(*s.shape[2:])), s.duration_s, s.num_steps)
        for s in mixed
    ]
    parts = _Parts(*np.array(rows).T)
    errors = np.full(len(rows), math.nan)
    folds = np.arange(len(rows)) % NUM_FOLDS
    for fold in range(min(NUM_FOLDS, len(rows)) if len(rows) > 1 else 0):
        held = folds == fold
        errors[held] = np.abs(parts.take(held).ratios(_mix(parts.take(~held))) - 1.0)
    mix = _mix(parts)
    return MixedSteps(overlap=1.0 - mix.exposed, extra_s=mix.extra_s, **_fit_error(errors, len(rows)).model_dump())


def _mix(parts: _Parts) -> _Mix:
    """Both coefficients at least 0 and `exposed` at most 1, reweighted and raised to the mean as a phase is."""
    shares = np.column_stack([parts.smaller, np.ones_like(parts.smaller)]) / parts.measured[:, None]
    rest = 1.0 - parts.larger / parts.measured
    counts = weights_of(parts.counts)
    weights, mix = np.ones(rest.size), _Mix(1.0, 0.0)
    for _ in range(REWEIGHTINGS):
        roots = np.sqrt(weights * counts)
        exposed, extra_s = (float(value) for value in nnls(shares * roots[:, None], rest * roots))
        if exposed > 1.0:
            extra = roots * shares[:, 1]
            exposed, extra_s = 1.0, max(0.0, float(extra @ (roots * (rest - shares[:, 0])) / (extra @ extra)))
        mix = _Mix(exposed, extra_s)
        weights = huber_weights(np.abs(parts.ratios(mix) - 1.0))
    missing_s = mean_residual(1.0 / parts.ratios(mix), counts) / float(np.average(shares[:, 1], weights=counts))
    return _Mix(mix.exposed, max(0.0, mix.extra_s + missing_s))


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
