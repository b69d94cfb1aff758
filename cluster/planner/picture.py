"""One run of a set-up as figures: latencies, phases, how busy workers were, and how far off the targets are.

Of the run the same requests are judged as for its attainment: without the start, as the system was empty, and without
the end, as nothing came later to run beside. Requests that failed have no latencies; they count as misses.
Knows nothing of the simulator: it is given what each request saw.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from pdserve.cluster.planner.findings import QUANTILES, Phase, Picture, Target
from pdserve.cluster.planner.goodput import COMPLETION
from pdserve.cluster.planner.stationarity import FloatArray, Flow, steady_spans

BEFORE_FIRST_TOKEN = ("admission", "prefill queue", "prefill")
AFTER_FIRST_TOKEN = ("transfer", "decode queue", "decode")
PHASES = (*BEFORE_FIRST_TOKEN, *AFTER_FIRST_TOKEN)

MAX_STRETCH = 100.0

Work: TypeAlias = tuple[str, float, float]
"""A worker had a request to compute from a moment to another one."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of a request. `end_s` is when it left, infinite if it never did. `ttft_ms` is `None` for one that
    failed, `tpot_ms` for an answer of one token; `target` is which of the targets it is for. `phases_ms` are those of
    `PHASES`."""

    at_s: float
    end_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    target: int
    ttft_ms: float | None
    tpot_ms: float | None
    phases_ms: tuple[float, ...] = ()


class Run:
    """The requests of one run, in order of arrival, as columns."""

    def __init__(self, seen: Sequence[Seen], targets: Sequence[Target]) -> None:
        assert seen, "a run without requests"
        self.targets = tuple(targets)
        flow = Flow(np.array([one.at_s for one in seen]), np.array([one.end_s for one in seen]))
        ((first, last),) = steady_spans([flow])
        kept = seen[first:last]
        self.kept = kept
        self.begin_s, self.end_s = kept[0].at_s, kept[-1].at_s
        self.span_s = max(self.end_s - self.begin_s, 1e-9)
        self.target = np.array([one.target for one in kept])
        self.ttft_ms = np.array([math.inf if one.ttft_ms is None else one.ttft_ms for one in kept])
        self.tpot_ms = np.array([0.0 if one.tpot_ms is None else one.tpot_ms for one in kept])
        self.has_tpot = np.array([one.tpot_ms is not None for one in kept])

    def stretch(self) -> float:
        """See `View`. The worst class decides."""
        found = [_quantile(np.maximum(*self._parts(index)), one.share) for index, one in self._classes()]
        return min(MAX_STRETCH, max(found, default=MAX_STRETCH))

    def failing(self) -> str:
        """What fewer requests of some class meet than should; `completion` where too many failed."""
        missed = set[str]()
        for index, target in self._classes():
            ttft, tpot = self._parts(index)
            done = ttft < math.inf
            if done.mean() < target.share:
                missed.add(COMPLETION)
                ttft, tpot = ttft[done], tpot[done]
            parts = {"TTFT": ttft, "TPOT": tpot}
            found = {name for name, part in parts.items() if part.size and (part <= 1).mean() < target.share}
            is_joint = not found and done.all() and (np.maximum(ttft, tpot) <= 1).mean() < target.share
            missed |= {"TTFT", "TPOT"} if is_joint else found
        return " and ".join(name for name in (COMPLETION, "TTFT", "TPOT") if name in missed)

    def nearest(self) -> tuple[Target, ...]:
        """See `View`."""
        nearest = list(self.targets)
        for index, target in self._classes():
            ttft, tpot = self._parts(index)
            if _quantile(np.maximum(ttft, tpot), target.share) <= 1:
                continue
            # What the failing one has to be stretched by while the other holds; infinite if the other fails too.
            only_ttft = _quantile(np.where(tpot <= 1, ttft, math.inf), target.share)
            only_tpot = _quantile(np.where(ttft <= 1, tpot, math.inf), target.share)
            if min(only_ttft, only_tpot) < math.inf:
                by = (only_ttft, 1.0) if only_ttft <= only_tpot else (1.0, only_tpot)
            else:
                by = (_quantile(np.maximum(ttft, tpot), target.share),) * 2
            nearest[index] = replace(target, ttft_ms=target.ttft_ms * by[0], tpot_ms=target.tpot_ms * by[1])
        return tuple(nearest)

    def picture(self, rate: float, busy: Mapping[str, float]) -> Picture:
        good = self.ttft_ms < math.inf
        return Picture(
            rate=rate,
            ttft_ms=_quantiles(self.ttft_ms[good]),
            tpot_ms=_quantiles(self.tpot_ms[good & self.has_tpot]),
            phases=self._phases(),
            busy=dict(busy),
            prompt_tokens_per_s=sum(one.num_prompt_tokens for one in self.kept) / self.span_s,
            output_tokens_per_s=sum(one.num_output_tokens for one in self.kept) / self.span_s,
        )

    def _classes(self) -> list[tuple[int, Target]]:
        """Those with requests."""
        return [(index, target) for index, target in enumerate(self.targets) if (self.target == index).any()]

    def _parts(self, index: int) -> tuple[FloatArray, FloatArray]:
        """TTFT and TPOT of one class in units of their targets."""
        of_class, target = self.target == index, self.targets[index]
        return self.ttft_ms[of_class] / target.ttft_ms, self.tpot_ms[of_class] / target.tpot_ms

    def _phases(self) -> tuple[Phase, ...]:
        """A miss of TTFT is for what comes before the first token, one of TPOT alone for what comes after. That is by
        the time a token: a long answer decodes for long and is in time."""
        rows = [index for index, one in enumerate(self.kept) if one.phases_ms]
        if not rows:
            return ()
        times = np.array([self.kept[index].phases_ms for index in rows])
        ttft_targets = np.array([target.ttft_ms for target in self.targets])[self.target]
        tpot_targets = np.array([target.tpot_ms for target in self.targets])[self.target]
        is_late, is_slow = self.ttft_ms > ttft_targets, self.tpot_ms > tpot_targets
        # What never takes time is to blame for nothing, even where all else is below its median.
        num_before, weighed = len(BEFORE_FIRST_TOKEN), times.copy()
        num_gaps = np.array([max(1, self.kept[index].num_output_tokens - 1) for index in rows])
        weighed[:, num_before:] /= num_gaps[:, np.newaxis]
        beyond = np.where(times.max(axis=0) > 0, weighed - np.median(weighed, axis=0), -np.inf)
        worst = np.where(
            is_late[rows], beyond[:, :num_before].argmax(axis=1), num_before + beyond[:, num_before:].argmax(axis=1)
        )
        guilty = np.bincount(worst[(is_late | is_slow)[rows]], minlength=len(PHASES))
        num_missed = max(1, int((is_late | is_slow).sum()))
        return tuple(
            Phase(
                name=name,
                mean_ms=float(times[:, column].mean()),
                p50_ms=float(np.quantile(times[:, column], 0.5)),
                p99_ms=float(np.quantile(times[:, column], 0.99)),
                share_of_misses=float(guilty[column]) / num_missed,
            )
            for column, name in enumerate(PHASES)
        )


def _quantile(values: FloatArray, share: float) -> float:
    """The smallest of them that `share` of them are not above."""
    return float(np.quantile(values, share, method="inverted_cdf"))


def _quantiles(values: FloatArray) -> tuple[float, ...]:
    return tuple(float(value) for value in np.quantile(values, QUANTILES)) if values.size else ()


def busy_shares(workers: Iterable[str], work: Iterable[Work], begin_s: float, end_s: float) -> dict[str, float]:
    """Of each worker: how much of that time it had something to compute. What it did before is left out, as the system
    was empty, and so is what it did after the last arrivals: the next requests would have come meanwhile."""
    by_worker: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    for name, from_s, to_s in work:
        from_s, to_s = max(from_s, begin_s), min(to_s, end_s)
        if from_s < to_s and name in by_worker:
            by_worker[name].append((from_s, to_s))
    span_s = max(end_s - begin_s, 1e-9)
    return {name: min(1.0, _covered_s(sorted(some)) / span_s) for name, some in by_worker.items()}


def _covered_s(spans: Sequence[tuple[float, float]]) -> float:
    """How long at least one of them lasts; they are in the order of their beginnings."""
    total_s, until_s = 0.0, -math.inf
    for from_s, to_s in spans:
        total_s += max(0.0, to_s - max(from_s, until_s))
        until_s = max(until_s, to_s)
    return total_s
