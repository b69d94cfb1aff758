"""Mixed steps, given what both of their phases take alone: how much of the smaller one hides, and what comes on top.

Knows nothing of how the phases were fitted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pdserve.cluster.planner.nnls import Flags, Floats, nnls
from pdserve.cluster.planner.phase_fit import NUM_FOLDS, REWEIGHTINGS, huber_weights, mean_residual, weights_of
from pdserve.cluster.planner.step_model import Phase, mixing
from pdserve.cluster.planner.step_sample import StepSample


@dataclass(frozen=True, slots=True)
class MixedFit:
    """The two coefficients of `MixedSteps`, and the relative error at each step, held out; not a number for a lone
    one."""

    overlap: float
    extra_s: float
    errors: Floats


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


def fit_mixed(mixed: Sequence[StepSample], prefill: Phase, decode: Phase) -> MixedFit:
    """From at least one mixed step."""
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
    return MixedFit(1.0 - mix.exposed, mix.extra_s, errors)


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
