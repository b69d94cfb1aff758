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

from pdserve.cluster.planner.contention_fit import as_if_alone, fit_contention
from pdserve.cluster.planner.mixed_fit import MixedFit, fit_mixed
from pdserve.cluster.planner.nnls import Floats
from pdserve.cluster.planner.phase_fit import (
    FittedRegion,
    Shapes,
    distinct_shapes,
    fit_phase,
    varies_apart,
)
from pdserve.cluster.planner.profile import (
    Contention,
    ContextBend,
    DecodeRegion,
    Domain,
    FitError,
    MixedSteps,
    PrefillRegion,
    Range,
    region_bounds,
)
from pdserve.cluster.planner.step_model import STRAIGHT, LoadBend, Phase, Region, decode_phase, mixing, prefill_phase
from pdserve.cluster.planner.step_sample import StepSample
from pdserve.proto.errors import ConfigError

MIN_SHAPES = 5
"""Distinct shapes below which a region is called thin."""

CONTENTION_ROUNDS = 3
MIN_PROMPTS = 20
"""Prompts computed alone below which mixed steps tell of prefill as well."""

MIN_REST = 0.1
"""Share of a mixed step that its prompts must have taken to tell anything of them."""


@dataclass(frozen=True, slots=True)
class StepFit:
    """What a profile needs of the steps; `thin` names what more samples are needed for."""

    prefill: tuple[PrefillRegion, ...]
    decode: tuple[DecodeRegion, ...]
    decode_bend: ContextBend | None
    mixed: MixedSteps
    contention: Contention | None
    domain: Domain
    thin: tuple[str, ...]


def fit_steps(samples: Sequence[StepSample]) -> StepFit:
    """Coefficients for both phases, their overlap in mixed steps, and what other workers add to a step.

    The two depend on each other: steps are fitted as if they had been taken alone, then what is left of those beside
    others is their price, and again.

    Raises:
        ConfigError: a sample is no timed step, or one phase has too few to be fitted.
    """
    _check(samples)
    fit = _fit_alone(samples)
    for _ in range(CONTENTION_ROUNDS):
        contention = _contention(samples, fit)
        if contention is None:
            break
        fit = replace(_fit_alone([as_if_alone(sample, contention) for sample in samples]), contention=contention)
    return fit


def _contention(samples: Sequence[StepSample], fit: StepFit) -> Contention | None:
    """Of mixed steps only where there are hardly any others: they are the ones that the model knows least."""
    prefill, decode = prefill_phase(fit.prefill), decode_phase(fit.decode, fit.decode_bend)
    mixer, mixed, takes_mixed = mixing(prefill, decode), fit.mixed, _needs_mixed(samples)
    used, alone_s = [], []
    for sample in samples:
        if sample.is_mixed and not takes_mixed:
            continue
        tokens, pairs, batch, context_tokens = sample.shape
        prefill_s = prefill.seconds(tokens, pairs) if tokens else 0.0
        decode_s = decode.seconds(batch, context_tokens) if batch else 0.0
        larger_s, smaller_s = mixer.parts(prefill_s, decode_s)
        both_s = larger_s + (1.0 - mixed.overlap) * smaller_s + mixed.extra_s
        used.append(sample)
        alone_s.append(both_s if sample.is_mixed else prefill_s + decode_s)
    return fit_contention(used, alone_s)


def _fit_alone(samples: Sequence[StepSample]) -> StepFit:
    """As if no sample had company."""
    decode = _shapes("decode", [_Point(s.shape[2], s.shape[3], s) for s in samples if not s.shape.num_prefill_tokens])
    decodes = fit_phase(decode, may_bend_load=True)
    prefill = _shapes("prefill", _prompts(samples, decodes.model()))
    prefills = fit_phase(prefill)
    thin = [*_thin("prefill", "tokens", prefills.parts), *_thin("decode", "sequences", decodes.parts)]
    mixed = [sample for sample in samples if sample.is_mixed]
    if not mixed:
        thin.append("mixed steps: none timed; the sum of both phases is assumed")
    elif _needs_mixed(samples):
        thin.append("prefill: hardly any step without decodes; taken from mixed ones, less what the decodes take")
    domain = Domain(
        chunk_tokens=_range(prefill.units),
        context_tokens=_range(prefill.loads / prefill.units),
        decode_batch=_range(decode.units),
        decode_context_tokens=_range(decode.loads),
    )
    return StepFit(
        tuple(prefill_region(part.region, _part_error(part)) for part in prefills.parts),
        tuple(decode_region(part.region, _part_error(part)) for part in decodes.parts),
        _context_bend(decodes.bend),
        _mixed_steps(fit_mixed(mixed, prefills.model(), decodes.model())) if mixed else MixedSteps(),
        None,
        domain,
        tuple(thin),
    )


def _needs_mixed(samples: Sequence[StepSample]) -> bool:
    """Whether prompts were hardly ever computed without decodes beside them, as in a busy colocated worker."""
    num_prompts = sum(not sample.shape.num_decodes for sample in samples)
    return num_prompts < MIN_PROMPTS and any(sample.is_mixed for sample in samples)


def _prompts(samples: Sequence[StepSample], decode: Phase) -> list[_Point]:
    """Prompts alone; where there are hardly any also mixed steps, less what their decodes add to the fixed part."""
    points = [_Point(*s.shape[:2], s) for s in samples if not s.shape.num_decodes]
    if not _needs_mixed(samples):
        return points
    for sample in samples:
        if sample.is_mixed:
            rest_s = sample.duration_s - (decode.seconds(*sample.shape[2:]) - decode.fixed_s)
            if rest_s > MIN_REST * sample.duration_s:
                points.append(_Point(*sample.shape[:2], replace(sample, duration_s=rest_s)))
    return points


def _check(samples: Sequence[StepSample]) -> None:
    for number, sample in enumerate(samples):
        shape = sample.shape
        if not (math.isfinite(sample.duration_s) and sample.duration_s > 0):
            raise ConfigError(f"samples.{number}: {sample.duration_s!r} s is no duration of a step")
        if not shape.num_prefill_tokens + shape.num_decodes or not all(0 <= value < math.inf for value in shape):
            raise ConfigError(f"samples.{number}: {tuple(shape)} is no shape of a step")


class _Point(NamedTuple):
    """A timed step by what its phase's duration depends on."""

    units: int
    load: float
    sample: StepSample


def _shapes(phase: str, points: Sequence[_Point]) -> Shapes:
    if not points:
        raise ConfigError(f"samples: none is a {phase} step alone; time some steps without the other phase")
    return distinct_shapes(
        (point.units, point.load, point.sample.duration_s, point.sample.num_steps) for point in points
    )


def _mixed_steps(found: MixedFit) -> MixedSteps:
    """As a profile writes it."""
    error = _fit_error(found.errors, found.errors.size)
    return MixedSteps(overlap=found.overlap, extra_s=found.extra_s, **error.model_dump())


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


def _context_bend(bend: LoadBend) -> ContextBend | None:
    """As a profile writes it."""
    if bend == STRAIGHT:
        return None
    return ContextBend(above_context_tokens=bend.above, extra_s_per_token=bend.extra_s)


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
