"""Does the system keep up with its arrivals, or does a backlog grow? Answered from when requests came and ended.

The one signal is the backlog: how many requests are in the system when the next one arrives. It is a count of arrivals
less completions, so "the backlog grows" and "completions fall behind arrivals" are one statement, and it needs no
knowledge of what the system is. A backlog that nothing pulls back is a random walk, and a random walk looks the same at
every scale: its batch means stay correlated however long the batches are. That makes the answer safe for short runs:
`STATIONARY` is said only when batch means are *less* correlated than those of a random walk can be (a unit-root test,
after Dickey & Fuller 1979; critical values from simulated queues at saturation). Everything else is `GROWING`, if the
drift is proven, or `TOO_SHORT`.

Traffic that itself changes over the run, as an hour of a trace does, has no steady state to return to. That is seen in
what was asked alone: gaps between arrivals, and the work of requests where the simulator tells it, whose own batch
means are correlated. Such a run is `DRIFTING`: it is to be judged as a whole, as one course of that traffic.

It knows neither latency targets nor what a request costs. A drift that nobody tells it of (answers that grow longer,
without a column of `load` for it) looks like a system that wanders: `TOO_SHORT`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

NUM_BATCHES = 40
"""Batches of one run's backlog. The critical values below belong to this number."""

MIN_BATCH_REQUESTS = 5
MSER_BATCH_REQUESTS = 5
MIN_WARMUP_PART = 20
MAX_TAIL_SHARE = 0.2

# Lag-1 correlation of the batch means of one run's backlog at saturation: mean 0.80, standard deviation 0.11, the same
# for 500 to 16,000 requests, for Poisson and for bursty arrivals. The margin is some five deviations.
SATURATED_CORRELATION = 0.80
CORRELATION_MARGIN = 0.62
MAX_CORRELATION = 0.3
"""However many runs prove that this is not saturation: above, one run is less than some 50 relaxation times."""

ROUGH_CORRELATION = 0.45

GROWTH_ERRORS = 4.0
"""How many standard errors of growth are a proof. Runs at 98 % load reach 2.8 in one of some hundred."""

# Lag-1 correlation of the batch means of gaps or work; independent ones have a standard deviation of 0.16 in one run.
DRIFT_CORRELATION = 0.3
DRIFT_MARGIN = 0.55

LATE_BATCHES = 10
HEAVIER = 0.05
"""A load that is by so much heavier than its mean at the end explains why the backlog is larger there."""

BEHIND = 0.25
"""Of what came in the second half of a run that is just long enough; at four thirds of the rate that a system takes so
much is left."""

CHANCE_BEHIND = 0.15

MIN_EARLY = 20
FILLING_SPANS = 4.0
"""Of the mean time that requests take in an empty system; in a full one it may be twice as long."""

MIN_SPANS = 4.0
"""A run must last this many times what its first requests took. Before that, a backlog is only filling up."""


class Verdict(StrEnum):
    STATIONARY = "stationary"
    GROWING = "growing"
    DRIFTING = "drifting"
    TOO_SHORT = "too short"


@dataclass(frozen=True, slots=True)
class Stationarity:
    """The verdict and why. `growth` is the share of the arrivals by which completions fell behind, with its 95 %
    interval; `correlation` is that of the backlog's batch means, lag 1, mean of the runs. `needed_s` is how long
    runs have to last at least, as far as that is known."""

    verdict: Verdict
    reason: str
    growth: float = math.nan
    growth_low: float = math.nan
    growth_high: float = math.nan
    correlation: float = math.nan
    needed_s: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """When the requests of one run came, in order, and when they ended: `inf` if they had not when the run did.

    `work` are columns of how much more than the mean each request asks for, relative. `backlog` is, for each arrival,
    how many of those before it had not ended.
    """

    arrival_s: FloatArray
    end_s: FloatArray
    work: tuple[FloatArray, ...] = ()
    backlog: FloatArray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        num_ended = np.searchsorted(np.sort(self.end_s), self.arrival_s, side="right")
        backlog = np.maximum(0.0, np.arange(len(self.arrival_s)) - num_ended)
        object.__setattr__(self, "backlog", backlog)

    def early_took_s(self) -> float:
        """What the first requests took, which found the system nearly empty: the median of a fiftieth of all."""
        num_early = max(1, len(self.arrival_s) // 50)
        end_s = np.minimum(self.end_s[:num_early], self.arrival_s[-1])
        return float(np.median(end_s - self.arrival_s[:num_early]))

    def needed_s(self) -> float:
        """How long a run must last at least for `falls_behind` to mean anything: several times as long as its first
        requests took, which found the system nearly empty. 0 if none of them ended."""
        num_early = max(MIN_EARLY, len(self.arrival_s) // 20)
        took_s = (self.end_s - self.arrival_s)[:num_early]
        took_s = took_s[np.isfinite(took_s)]
        return FILLING_SPANS * float(took_s.mean()) if took_s.size else 0.0

    def falls_behind(self) -> bool:
        """Whether, while the second half of the requests came, far fewer ended than came. Everything may have been in
        time nevertheless, if the run is short.

        Above what a system takes, by a factor f, a share 1 - 1/f of what comes is left, however long the run is; where
        it keeps up, hardly any once it is full: the longer the run, the less. How long the last answers take is no
        part of it.
        """
        half = len(self.backlog) // 2
        filling = min(1.0, self.needed_s() / max(1e-12, self.duration_s))
        allowed = max(CHANCE_BEHIND, BEHIND * filling) * (len(self.backlog) - 1 - half)
        return float(self.backlog[-1] - self.backlog[half]) > allowed

    @property
    def duration_s(self) -> float:
        return float(self.arrival_s[-1] - self.arrival_s[0])

    def loads(self) -> list[FloatArray]:
        """Batch means of what was asked, relative to its mean: arrivals first, then each column of work."""
        gaps = np.diff(self.arrival_s, prepend=self.arrival_s[0])
        mean_gap = max(1e-300, float(gaps.mean()))
        return [batch_means(1.0 - gaps / mean_gap, NUM_BATCHES)] + [batch_means(one, NUM_BATCHES) for one in self.work]


def batch_means(series: FloatArray, num_batches: int) -> FloatArray:
    """Means of equal batches; what does not fill the last one is cut from the start, where the warm-up was."""
    size = len(series) // num_batches
    means: FloatArray = series[len(series) - size * num_batches :].reshape(num_batches, size).mean(axis=1)
    return means


def lag1_correlation(means: FloatArray) -> float:
    """0 where nothing varies."""
    offsets = means - means.mean()
    total = float(offsets @ offsets)
    return float(offsets[1:] @ offsets[:-1]) / total if total > 1e-12 * max(1.0, float(means @ means)) else 0.0


def warmup_requests(backlogs: Sequence[FloatArray]) -> int:
    """How many requests to cut from the start of every run: MSER-5 (White 1997; White, Cobb & Spratt 2000) on the mean
    of the runs' backlogs (Welch's averaging of replications); at least a twentieth, at most half of the shortest run.

    The rule takes the cut that minimises the squared standard error of the mean of what remains. Left to itself it also
    cuts a start that is *busier* than the rest by chance, which is no warm-up, and makes queues look better than they
    are (M/M/1 at 80 % load, 4,000 requests: attainment 1.1 points too high, against 0.2 without any cut). Systems start
    empty, so only a start with less backlog than the rest is cut.
    """
    shortest = min(len(backlog) for backlog in backlogs)
    num_batches = shortest // MSER_BATCH_REQUESTS
    if num_batches < 2:
        return 0
    used = num_batches * MSER_BATCH_REQUESTS
    mean = sum((backlog[:used] for backlog in backlogs), np.zeros(used)) / len(backlogs)
    means = batch_means(mean, num_batches)
    means -= means.mean()
    num_left = np.arange(num_batches, 0, -1)
    sums = np.cumsum(means[::-1])[::-1]
    squares = np.cumsum(means[::-1] ** 2)[::-1]
    errors = (squares - sums**2 / num_left) / num_left**2
    errors[1:][sums[1:] <= 0] = np.inf
    cut = int(np.argmin(errors[: num_batches // 2 + 1])) * MSER_BATCH_REQUESTS
    return max(cut, shortest // MIN_WARMUP_PART)


def steady_spans(flows: Sequence[Flow]) -> list[tuple[int, int]]:
    """Of each run the first request that is judged and the first that no longer is: without warm-up and tail.

    The warm-up is as long in all; the tail are requests so late that what they ran beside was going away, by the 95th
    percentile of the time that requests took, at most a fifth of the run. Where the load itself drifts there is no
    steady state to warm up to: only the first requests go, which found the system nearly empty.
    """
    drifts = load_drifts(flows)
    start = 0 if drifts else warmup_requests([flow.backlog for flow in flows])
    spans = []
    for flow in flows:
        num = len(flow.arrival_s)
        took_s = float(np.quantile(flow.end_s - flow.arrival_s, 0.95, method="lower"))
        last = int(np.searchsorted(flow.arrival_s, flow.arrival_s[-1] - took_s))
        if drifts:
            early_s = flow.arrival_s[0] + flow.early_took_s()
            start = min(int(np.searchsorted(flow.arrival_s, early_s)), int(MAX_TAIL_SHARE * num))
        spans.append((start, max(last, math.ceil((1 - MAX_TAIL_SHARE) * num))))
    return spans


def load_drifts(flows: Sequence[Flow]) -> bool:
    """Whether what is asked changes over the runs more than chance would have it."""
    if min(len(flow.arrival_s) for flow in flows) < NUM_BATCHES * MIN_BATCH_REQUESTS:
        return False
    bound = max(DRIFT_CORRELATION, DRIFT_MARGIN / math.sqrt(len(flows)))
    columns = zip(*(flow.loads() for flow in flows), strict=True)
    return any(float(np.mean([lag1_correlation(one) for one in column])) > bound for column in columns)


def _ends_heavier(flows: Sequence[Flow]) -> bool:
    columns = zip(*(flow.loads() for flow in flows), strict=True)
    return any(
        float(np.mean([one[-LATE_BATCHES:].mean() - one.mean() for one in column])) > HEAVIER for column in columns
    )


def check_stationarity(flows: Sequence[Flow], max_correlation: float = MAX_CORRELATION) -> Stationarity:
    """The verdict over one run, or over several of one system at (nearly) the same rate: more runs prove more.

    A rough answer may do with runs of fewer relaxation times: `ROUGH_CORRELATION`.
    """
    needed_s = MIN_SPANS * max(flow.early_took_s() for flow in flows)
    drifts = load_drifts(flows)
    cut = 0 if drifts else warmup_requests([flow.backlog for flow in flows])
    backlogs = [flow.backlog[cut:] for flow in flows]
    shortest = min(len(backlog) for backlog in backlogs)
    if shortest < NUM_BATCHES * MIN_BATCH_REQUESTS:
        reason = f"only {shortest} requests are left after the warm-up"
        return Stationarity(Verdict.TOO_SHORT, reason, needed_s=needed_s)
    means = np.stack([batch_means(backlog, NUM_BATCHES) for backlog in backlogs])
    correlation = float(np.mean([lag1_correlation(one) for one in means]))
    growth, error, late_growth = _growth(means, float(np.mean([len(backlog) for backlog in backlogs])))
    grows = growth > GROWTH_ERRORS * error and late_growth > 0 and not (drifts and _ends_heavier(flows))
    bound = min(max_correlation, SATURATED_CORRELATION - CORRELATION_MARGIN / math.sqrt(len(flows)))
    if any(flow.duration_s < needed_s for flow in flows):
        verdict, reason = Verdict.TOO_SHORT, f"runs last less than {MIN_SPANS:g} times as long as requests"
    elif grows:
        verdict, reason = Verdict.GROWING, f"completions fall behind by {growth:.1%} of the arrivals"
    elif drifts:
        verdict, reason = Verdict.DRIFTING, "the load itself changes over the run, which is judged as a whole"
    elif correlation > bound:
        verdict = Verdict.TOO_SHORT
        reason = f"the backlog wanders as if nothing pulled it back (batch means are correlated by {correlation:.2f})"
    else:
        verdict, reason = Verdict.STATIONARY, f"the backlog keeps returning to {means.mean():.1f} requests"
    return Stationarity(verdict, reason, growth, growth - 2 * error, growth + 2 * error, correlation, needed_s)


def _growth(means: FloatArray, num_requests: float) -> tuple[float, float, float]:
    """Growth of the backlog per arrival, its standard error, and the growth over the second half alone.

    The error is that of a random walk with drift: steps from batch to batch are taken as independent. Where something
    pulls the backlog back, steps cancel each other, and the error is too large, never too small.
    """
    steps = np.diff(means, axis=1) * NUM_BATCHES / num_requests
    error = float(steps.std(ddof=1)) / math.sqrt(steps.size)
    return float(steps.mean()), error, float(steps[:, NUM_BATCHES // 2 :].mean())
