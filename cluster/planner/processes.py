"""When requests come: renewal processes at a mean rate of 1, and the pace that turns their units into seconds.

A process is drawn in units of its own mean gap; a `Pace` stretches the units by a rate that may vary: on/off phases, a
day's sine, the pieces of a scenario. Two rates with one seed are therefore the same course at two speeds, which makes
the difference between them one of load and not of luck. A Poisson process under a varying pace is the inhomogeneous
Poisson process of that rate, exactly; with random on/off phases it is the Markov-modulated one.

Knows neither what the requests are nor how many will be wanted. Random sources are arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np

CHUNK = 1024
"""Numbers drawn at a time. Part of what a seed means: another value gives other courses."""

SINE_STEPS = 288
"""Steps of constant rate in a period, each with the sine's mean over it: 5 minutes of a day."""

Segment: TypeAlias = tuple[float, float]
"""Seconds, and the rate (or the factor on a rate) during them. Iterators of segments are endless."""


def deterministic() -> Iterator[float]:
    """One request after each gap of 1. CV 0."""
    return _added_up(lambda: np.ones(CHUNK))


def poisson(random: np.random.Generator) -> Iterator[float]:
    """Memoryless gaps. CV 1."""
    return _added_up(lambda: random.standard_exponential(CHUNK))


def gamma(cv: float, random: np.random.Generator) -> Iterator[float]:
    """Independent gamma gaps of the given coefficient of variation: burstier than Poisson above 1, steadier below."""
    shape = cv**-2
    return _added_up(lambda: random.gamma(shape, 1 / shape, CHUNK))


def _added_up(draw_gaps: Callable[[], np.ndarray]) -> Iterator[float]:
    at = 0.0
    while True:
        times = at + np.cumsum(draw_gaps())
        at = float(times[-1])
        yield from times.tolist()


def constant(factor: float = 1.0) -> Iterator[Segment]:
    yield math.inf, factor


def on_off(mean_on_s: float, mean_off_s: float, ratio: float, random: np.random.Generator) -> Iterator[Segment]:
    """Exponential phases; the rate while on is `ratio` times that while off. Factors of mean 1, begun in steady state.

    The phases are seconds and stay so at any rate: a burst is an event in the world, not in the traffic.
    """
    share_on = mean_on_s / (mean_on_s + mean_off_s)
    factor_on = 1 / (share_on + (1 - share_on) / ratio)
    is_on = random.random() < share_on
    while True:
        if is_on:
            yield float(random.exponential(mean_on_s)), factor_on
        else:
            yield float(random.exponential(mean_off_s)), factor_on / ratio
        is_on = not is_on


def sine(amplitude: float, period_s: float, phase: float) -> Iterator[Segment]:
    """A factor of mean 1 that swings by `amplitude`; `phase` is the part of a period that is over at the start."""
    edges = 2 * np.pi * (np.arange(SINE_STEPS + 1) / SINE_STEPS + phase)
    means = 1 + amplitude * (np.cos(edges[:-1]) - np.cos(edges[1:])) / np.diff(edges)
    steps = [(period_s / SINE_STEPS, max(0.0, factor)) for factor in means.tolist()]
    while True:
        yield from steps


def product(first: Iterator[Segment], second: Iterator[Segment]) -> Iterator[Segment]:
    """Both factors at once."""
    (first_s, first_factor), (second_s, second_factor) = next(first), next(second)
    while True:
        step_s = min(first_s, second_s)
        yield step_s, first_factor * second_factor
        first_s, second_s = first_s - step_s, second_s - step_s
        if first_s <= 0:
            first_s, first_factor = next(first)
        if second_s <= 0:
            second_s, second_factor = next(second)


class Pace:
    """From operational time, in which one request comes per unit, to seconds under the segments' rates."""

    __slots__ = ("_duration_s", "_rate", "_segments", "_since", "_start_s", "_until")

    def __init__(self, segments: Iterator[Segment]) -> None:
        self._segments = segments
        self._start_s = self._duration_s = 0.0
        self._since = self._until = 0.0
        self._rate = 0.0

    def at_s(self, unit: float) -> float:
        """When the moment `unit` is; asked in order of time."""
        while unit >= self._until:
            self._start_s += self._duration_s
            self._since = self._until
            self._duration_s, self._rate = next(self._segments)
            self._until += self._duration_s * self._rate
        return self._start_s + (unit - self._since) / self._rate
