"""What company costs a step: from how much longer steps took than the same steps alone would have.

Knows nothing of what a step alone takes: it is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pdserve.cluster.planner.nnls import nnls
from pdserve.cluster.planner.phase_fit import weights_of
from pdserve.cluster.planner.profile import Contention, Slowdown
from pdserve.cluster.planner.step_sample import StepSample

MIN_POINTS = 5
MIN_SPREAD = 0.1
"""Standard deviation of the share of company below which nothing can be said of what it costs."""

MAX_SLOWDOWN = 1.0
USUAL_RATIOS = 0.5, 2.0
NOTHING = Slowdown(beside_prefill=0.0, beside_decode=0.0)


def as_if_alone(sample: StepSample, contention: Contention) -> StepSample:
    """The same step, had nobody else computed."""
    slower = contention.prefill if sample.shape.num_prefill_tokens else contention.decode
    longer = slower.beside_prefill * sample.company.prefill + slower.beside_decode * sample.company.decode
    return replace(sample, duration_s=sample.duration_s / (1.0 + longer))


def fit_contention(samples: Sequence[StepSample], alone_s: Sequence[float]) -> Contention | None:
    """From what each sample takes alone; `None` where steps with and without company were not both seen."""
    pairs = list(zip(samples, alone_s, strict=True))
    prefill = _slowdown([pair for pair in pairs if pair[0].shape.num_prefill_tokens])
    decode = _slowdown([pair for pair in pairs if not pair[0].shape.num_prefill_tokens])
    if prefill is None and decode is None:
        return None
    return Contention(prefill=prefill or NOTHING, decode=decode or NOTHING)


def _slowdown(pairs: Sequence[tuple[StepSample, float]]) -> Slowdown | None:
    """Of a plane through ratios over both shares of company, by its value at none.

    Company of a kind that was always as much costs what the other kind does; `None` where neither varied.
    """
    if len(pairs) < MIN_POINTS:
        return None
    shares = np.array([sample.company for sample, _ in pairs])
    ratios = np.clip([sample.duration_s / alone_s for sample, alone_s in pairs], *USUAL_RATIOS)
    varied = np.flatnonzero(shares.std(axis=0) >= MIN_SPREAD)
    if not varied.size:
        return None
    roots = np.sqrt(weights_of(np.array([sample.num_steps for sample, _ in pairs], dtype=np.float64)))
    columns = np.column_stack([np.ones_like(ratios), shares[:, varied]])
    alone, *slopes = nnls(columns * roots[:, None], ratios * roots)
    if alone <= 0:
        return None
    prices = {int(kind): min(MAX_SLOWDOWN, float(slope / alone)) for kind, slope in zip(varied, slopes, strict=True)}
    known = prices[int(varied[0])]
    return Slowdown(beside_prefill=prices.get(0, known), beside_decode=prices.get(1, known))
