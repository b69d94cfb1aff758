"""Courses through a trace: as it was, from another start, resampled, thinned, or many of them on top of each other.

    replay     from its first request on                  every seed gives the same course
    rotate     from a moment drawn by the seed            burstiness, drift and prefix reuse as they were
    resample   a block bootstrap of runs of requests      burstiness within blocks and the slow drift as they were;
                                                          prefix reuse between blocks is mostly lost

Every course is endless. Where the trace ends it begins again, one mean gap after its last request (the seam), with
other prefix ids: the same prompt twice would be a cache hit that nobody had. A resampled run that is shorter than the
trace draws one block from each of equal stretches, in their order, so that it sees the whole trace's drift, faster; a
longer one draws each block from the three around its place.

The rate is met in one of two ways, of which the caller chooses. Scaling *time* keeps every request and the variation
of the gaps, but bursts, lulls and drift pass faster or slower. Scaling the *population* keeps the clock: ceil(k) copies
that start at different moments are laid over each other and thinned to k. Counts of independent copies add up, so
their variance relative to their mean stays the trace's, while single gaps tend to Poisson's, as in a large fleet; but
copies that start all over the trace average its drift out, and a run in which each copy sends few requests finds little
of the prefix reuse that a long one has.

Rows have operational times (mean gap 1). Random sources are arguments.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from pdserve.cluster.planner.prefixes import copy_mask
from pdserve.cluster.planner.processes import CHUNK
from pdserve.cluster.planner.trace_sample import TraceSample
from pdserve.cluster.trace import Row

Order: TypeAlias = Literal["replay", "rotate", "resample"]
Randoms: TypeAlias = Callable[..., np.random.Generator]
"""A generator of its own for each tuple of numbers."""

MAX_COPIES = 100_000
LAP_BITS = 20
COPY_BITS = 20
NEIGHBOURS = 3.0


@dataclass(frozen=True, slots=True)
class Course:
    """How to go through a trace. `population` is in copies of it, 0.3 or 1000; `shift_s` bounds their starts.

    `num_requests` is how many will probably be wanted: what a resampled run spreads over the trace. `namespace`
    sets its prefix ids apart from those of other traffic.
    """

    order: Order
    population: float = 1.0
    shift_s: float = math.inf
    num_requests: int | None = None
    namespace: int = 0

    @property
    def num_copies(self) -> int:
        return max(1, math.ceil(self.population))


def trace_rows(sample: TraceSample, course: Course, randoms: Randoms) -> Iterator[Row]:
    """Requests of the course, for ever, at one per unit of time in the mean."""
    copies = [_copy(sample, course, number, randoms) for number in range(course.num_copies)]
    rows = heapq.merge(*copies) if len(copies) > 1 else copies[0]
    if course.population < course.num_copies:
        rows = _thinned(rows, course.population / course.num_copies, randoms(0))
    if course.population == 1.0:
        return rows
    return ((at * course.population, prompt, output, ids) for at, prompt, output, ids in rows)


def _copy(sample: TraceSample, course: Course, number: int, randoms: Randoms) -> Iterator[Row]:
    """One course through the trace, begun at its share of the way."""
    first_copy = course.namespace << (LAP_BITS + COPY_BITS) | number << LAP_BITS
    if course.order == "replay" and course.num_copies == 1 and not sample.is_whole:
        return _streamed(sample, first_copy)
    random = randoms(1, number)
    drawn = 0.0 if course.order == "replay" else float(random.random())
    if course.order == "resample" and course.num_copies == 1:
        return _flat(sample, _resampled(sample, 0, course.num_requests, random), first_copy, 0.0)
    begun = (number + drawn) / course.num_copies
    start_s = begun * min(course.shift_s, sample.times_s[-1])
    start = bisect_left(sample.times_s, start_s)
    # The part of the first gap that was over: copies that begin with a whole one would begin too slowly or too fast.
    passed_s = sample.columns.gaps_s[start] - (sample.times_s[start] - start_s) if start_s > 0 else 0.0
    if course.order == "resample":
        block = min(start // sample.block, sample.num_blocks - 1)
        rest = (start, sample.block_bounds(block)[1], 0)
        return _flat(sample, itertools.chain([rest], _resampled(sample, block + 1, None, random)), first_copy, passed_s)
    return _flat(sample, _in_order(sample, start), first_copy, passed_s)


def _flat(
    sample: TraceSample, ranges: Iterator[tuple[int, int, int]], first_copy: int, passed_s: float
) -> Iterator[Row]:
    """The requests of ranges of positions, read where they lie: there may be many thousand copies at once."""
    columns, unit_s, has_prefixes = sample.columns, sample.kept_gap_s, sample.has_prefixes
    gaps_s, prompts, outputs = columns.gaps_s, columns.prompts, columns.outputs
    at_s, no_ids = -passed_s, ()
    for start, end, lap in ranges:
        mask = copy_mask(first_copy + lap)
        for position in range(start, end):
            at_s += gaps_s[position]
            ids = columns.prefix_ids(position, mask) if has_prefixes else no_ids
            yield at_s / unit_s, prompts[position], outputs[position], ids


def _in_order(sample: TraceSample, start: int) -> Iterator[tuple[int, int, int]]:
    """Ranges from a position on, lap after lap."""
    size = len(sample.columns)
    for lap in itertools.count():
        for first in range(start, size, sample.block):
            yield first, min(first + sample.block, size), lap
        start = 0


def _resampled(
    sample: TraceSample, first_draw: int, num_requests: int | None, random: np.random.Generator
) -> Iterator[tuple[int, int, int]]:
    """Ranges of drawn blocks. A block that may be drawn twice in a lap has another lap number each time."""
    num_blocks = sample.num_blocks
    num_draws = min(num_blocks, math.ceil(num_requests / sample.block)) if num_requests else num_blocks
    stride = num_blocks / num_draws
    width = max(stride, min(NEIGHBOURS, num_blocks))
    num_worlds = 1 if width == stride else 4
    for draw in itertools.count(first_draw):
        lap, here = divmod(draw, num_draws)
        place = (here + 0.5) * stride + (float(random.random()) - 0.5) * width
        block = min(num_blocks - 1, max(0, math.floor(place)))
        yield *sample.block_bounds(block), num_worlds * lap + draw % num_worlds


def _streamed(sample: TraceSample, first_copy: int) -> Iterator[Row]:
    """A trace that is not whole in memory, read again for every lap."""
    start_s, mean_gap_s = 0.0, sample.mean_gap_s
    for lap in itertools.count():
        mask = copy_mask(first_copy + lap)
        first_s: float | None = None
        for arrival in sample.trace:
            first_s = arrival.at_s if first_s is None else first_s
            at_s = start_s + mean_gap_s + arrival.at_s - first_s
            ids = tuple(prefix_id ^ mask for prefix_id in arrival.prefix_ids) if mask else arrival.prefix_ids
            yield at_s / mean_gap_s, arrival.num_prompt_tokens, arrival.max_tokens, ids
        start_s += sample.duration_s + mean_gap_s


def _thinned(rows: Iterator[Row], keep: float, random: np.random.Generator) -> Iterator[Row]:
    """Each row with probability `keep`."""
    while True:
        for uniform in random.random(CHUNK).tolist():
            row = next(rows)
            if uniform < keep:
                yield row
