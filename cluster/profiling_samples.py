"""Step records to timed steps: what a step adds to the time of a worker that is never idle. Pure.

What a simulation needs is the *period*: from the end of one step to the end of the next. It holds what the bare
duration does not: publishing the turn, and the event loop that shares the worker's core. The first step after idleness
has no period; its duration stands in.

Steps that something else held up do not count: those whose thread waited for its core for longer than is usual, and
those that took far longer than steps like them. Of the rest nearly equal ones become one sample with their mean,
because an answer's time is a sum of steps. Knows nothing of what a fit does with them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pdserve.cluster.planner.step_model import StepModel
from pdserve.cluster.planner.step_sample import StepSample
from pdserve.cluster.planner.step_shape import ALONE, Company, StepShape
from pdserve.cluster.step_records import StepRecord

HELD_UP = 3.0
"""Times the lower quartile of like steps beyond which something else was at work: another process, a page fault."""

WAITED = 0.3
"""Share of a step that its thread was without a core, beyond the lower quartile of that share, which is the hardware's
own: waiting for a GPU counts as well."""

CELL = 0.1
"""Relative width within which shapes count as equal."""


COMPANY_CELL = 0.25
"""Of the share of either kind."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One step with its bare duration and, where it followed another at once, its period.

    `company` is the share of that time in which the machine's other workers computed, on average over them.
    """

    shape: StepShape
    duration_s: float
    cpu_s: float
    period_s: float | None
    company: Company = ALONE

    @property
    def waited(self) -> float:
        """Share of the duration that the engine's thread was without a core."""
        return max(0.0, 1.0 - self.cpu_s / self.duration_s) if self.duration_s > 0 else 0.0

    @property
    def cost_s(self) -> float:
        return self.duration_s if self.period_s is None else self.period_s


@dataclass(frozen=True, slots=True)
class Gap:
    """What periods have beyond durations: `fixed_s` for each step and `per_sequence_s` for each decode in it."""

    fixed_s: float
    per_sequence_s: float
    num_samples: int


class Activity:
    """When one worker computed."""

    def __init__(self, records: Sequence[StepRecord]) -> None:
        self._starts_s = np.array([record.started_s for record in records])
        self._lasts_s = np.array([record.duration_s for record in records])
        self._before_s = np.concatenate([[0.0], np.cumsum(self._lasts_s)])

    def share(self, from_s: float, to_s: float) -> float:
        """Of the time between the two."""
        return (self._until_s(to_s) - self._until_s(from_s)) / (to_s - from_s) if to_s > from_s else 0.0

    def _until_s(self, at_s: float) -> float:
        last = int(np.searchsorted(self._starts_s, at_s, side="right")) - 1
        if last < 0:
            return 0.0
        return float(self._before_s[last] + min(at_s - self._starts_s[last], self._lasts_s[last]))


class Neighbour:
    """What one worker computed, as those beside it feel it."""

    def __init__(self, records: Sequence[StepRecord]) -> None:
        self._prefill = Activity([record for record in records if record.shape.num_prefill_tokens])
        self._decode = Activity([record for record in records if not record.shape.num_prefill_tokens])

    def company(self, from_s: float, to_s: float) -> Company:
        """Over the time between the two."""
        return Company(self._prefill.share(from_s, to_s), self._decode.share(from_s, to_s))


def timings_of(workers: Sequence[Sequence[StepRecord]], hosts: Sequence[str] | None = None) -> list[list[Timing]]:
    """Of each worker's records in order of time. Company are the workers of the same host; without `hosts` all are.

    Clocks of different machines have nothing to do with each other, and neither have their memories.
    """
    places = [""] * len(workers) if hosts is None else hosts
    active = [(place, Neighbour(records)) for place, records in zip(places, workers, strict=True)]
    return [
        list(_timings(records, [one for at, one in (*active[:number], *active[number + 1 :]) if at == places[number]]))
        for number, records in enumerate(workers)
    ]


def _timings(records: Sequence[StepRecord], others: Sequence[Neighbour]) -> Iterator[Timing]:
    """A gap in the numbers is a step that was lost; a pause longer than the step was spent waiting for work."""
    before: StepRecord | None = None
    for record in records:
        period_s = None
        if before is not None and before.leaves_work and record.number == before.number + 1:
            pause_s = record.started_s - before.ended_s
            period_s = pause_s + record.duration_s if pause_s <= record.duration_s else None
        from_s = record.started_s if period_s is None else record.ended_s - period_s
        seen = [other.company(from_s, record.ended_s) for other in others]
        company = Company(*np.mean(seen, axis=0).tolist()) if seen else ALONE
        yield Timing(record.shape, record.duration_s, record.cpu_s, period_s, company)
        before = record


def samples_of(timings: Iterable[Timing], with_disturbed: bool = False) -> tuple[StepSample, ...]:
    """One for each cell of nearly equal shapes, in a fixed order."""
    known = list(timings)
    cells: dict[tuple[int, ...], list[Timing]] = defaultdict(list)
    for timing in known if with_disturbed else undisturbed(known):
        company = (round(share / COMPANY_CELL) for share in timing.company)
        cells[(*_cell(timing.shape), *company)].append(timing)
    held_up = math.inf if with_disturbed else HELD_UP
    return tuple(_merged(cells[cell], held_up) for cell in sorted(cells))


def undisturbed(timings: Sequence[Timing]) -> Sequence[Timing]:
    """Those whose thread had its core for as much of them as is usual. Of a busy machine few are left."""
    if not timings:
        return timings
    usual = float(np.percentile([one.waited for one in timings], 25))
    return [one for one in timings if one.waited <= usual + WAITED]


def gap_of(timings: Iterable[Timing]) -> Gap | None:
    """A line through periods less durations of pure decodes; `None` where no two batches were seen."""
    by_batch: dict[int, list[float]] = defaultdict(list)
    for one in timings:
        if one.period_s is not None and not one.shape.num_prefill_tokens:
            by_batch[one.shape.num_decodes].append(one.period_s - one.duration_s)
    if len(by_batch) < 2:
        return None
    batches = np.array(sorted(by_batch), dtype=np.float64)
    gaps_s = np.array([np.median(by_batch[int(batch)]) for batch in batches])
    counts = np.array([len(by_batch[int(batch)]) for batch in batches])
    slope, fixed_s = np.polyfit(batches, gaps_s, 1, w=np.sqrt(counts))
    return Gap(float(fixed_s), float(slope), int(counts.sum()))


def bias_of(model: StepModel, samples: Sequence[StepSample]) -> float:
    """How far the sum over all steps is off what they took, as a share: what does not even out."""
    measured_s = math.fsum(sample.num_steps * sample.duration_s for sample in samples)
    told_s = math.fsum(sample.num_steps * model.contended_s(sample.shape, sample.company) for sample in samples)
    return told_s / measured_s - 1.0 if measured_s else 0.0


def _cell(shape: StepShape) -> tuple[int, ...]:
    tokens, pairs, batch, context_tokens = shape
    return _bin(tokens), _bin(pairs / max(tokens, 1)), _bin(batch), _bin(context_tokens / max(batch, 1))


def _bin(value: float) -> int:
    return -1 if value <= 0 else round(math.log(value) / CELL)


def _merged(timings: Sequence[Timing], held_up: float) -> StepSample:
    usual_s = float(np.percentile([one.cost_s for one in timings], 25))
    kept = [one for one in timings if one.cost_s <= held_up * usual_s]
    tokens, pairs, batch, context_tokens = np.mean([one.shape for one in kept], axis=0)
    shape = StepShape(round(tokens), float(pairs), round(batch), round(context_tokens))
    cost_s = float(np.mean([one.cost_s for one in kept]))
    company = Company(*np.mean([one.company for one in kept], axis=0).tolist())
    return StepSample(shape, cost_s, company, len(kept))
