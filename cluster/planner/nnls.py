"""Least squares without negative weights, in numpy alone."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


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
