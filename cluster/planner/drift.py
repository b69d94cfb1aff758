"""Traffic that changes: pieces of a scenario that follow each other, each with its rate, sharply or by a cross-fade.

Knows the pieces' times and rates; what comes at those rates is the pieces' own business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pdserve.cluster.planner.processes import Segment, constant

FADE_STEPS = 32
"""Steps of constant rate in a fade."""


@dataclass(frozen=True, slots=True)
class Span:
    """How long a piece lasts, and its mean rate in requests per second."""

    duration_s: float
    rate: float


def mean_rate(spans: Sequence[Span]) -> float:
    """Requests per second over the whole scenario; fades leave it as it is."""
    total_s = math.fsum(span.duration_s for span in spans)
    return math.fsum(span.rate * span.duration_s for span in spans) / total_s


def envelope(spans: Sequence[Span], number: int, fade_s: float) -> Iterator[Segment]:
    """The rate of one piece over time, for ever: after the last piece the first one comes again.

    Around each border the old piece's rate falls and the new one's rises, both linearly, during `fade_s` that lie half
    on either side; so each piece keeps its number of requests. The very first begins at its full rate.
    """
    span = spans[number]
    if len(spans) == 1:
        yield from constant(span.rate)
        return
    begins_s = math.fsum(before.duration_s for before in spans[:number])
    total_s = math.fsum(each.duration_s for each in spans)
    step_s = fade_s / FADE_STEPS
    rising = [(step_s, span.rate * (step + 0.5) / FADE_STEPS) for step in range(FADE_STEPS)] if fade_s else []
    if number == 0:
        yield span.duration_s - fade_s / 2, span.rate
    else:
        yield begins_s - fade_s / 2, 0.0
        yield from rising
        yield span.duration_s - fade_s, span.rate
    while True:
        yield from reversed(rising)
        yield total_s - span.duration_s - fade_s, 0.0
        yield from rising
        yield span.duration_s - fade_s, span.rate
