"""The share of requests that meet both their targets, with an interval that knows that neighbours share a queue.

Neighbouring requests share a queue: one long prompt delays a hundred of them. A binomial interval counts those as a
hundred observations and is far too narrow. Here the start of a run is cut (the system was empty; MSER-5), and its end
(nothing came later to compete with), and what is left is averaged over batches that are long enough to be nearly
uncorrelated (batch means; Law & Kelton, Simulation Modeling and Analysis, ch. 9); several runs are pooled
(replication and deletion, ibid.). What correlation is left widens the interval by the factor of a first-order
autoregression, as in Skart (Tafazzoli & Wilson 2011).

Where the load itself drifts there is no steady state and MSER would cut a quiet stretch for a warm-up: such a run is
judged as a whole, but for its first and last requests.

Demand is measured at the door: a request that was refused or failed is a miss. The module does not know where outcomes
come from, nor whether the system keeps up: that is `stationarity`.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from pdserve.cluster.planner.stationarity import FloatArray, Flow, batch_means, steady_spans
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import SLO, RequestTiming

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

MIN_BATCHES = 20
"""Fewer do not tell how much they vary (Schmeiser 1982)."""

MIN_BATCH_REQUESTS = 10
MAX_CORRELATION = 0.1
"""Between neighbouring batches; above it they are made longer."""

TOO_CORRELATED = 0.4
MIN_MIXED_BATCHES = 5


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """What became of the requests of one run, in order of arrival.

    `end_s` is when a request left: its last token, its refusal, its failure; `inf` if it was still there when the run
    ended. `slo_class` is the index of its SLO class; `None` where there is one. `controls` are columns of what the
    simulator drew for each request less its *exactly* known mean (as the prompt's length over the mean length, less
    one); with them a draw that happened to be heavier than the workload is corrected for, and a load that drifts is
    told from a system that does not keep up. `ttft_used` and `tpot_used` are what was taken over what was allowed,
    `inf` for what never came; they tell how far off a target is.
    """

    arrival_s: FloatArray
    end_s: FloatArray
    ttft_ok: BoolArray
    tpot_ok: BoolArray
    controls: tuple[FloatArray, ...] = ()
    slo_class: IntArray | None = None
    ttft_used: FloatArray | None = None
    tpot_used: FloatArray | None = None
    flow: Flow = field(init=False, repr=False)

    def __post_init__(self) -> None:
        optional = (self.slo_class, self.ttft_used, self.tpot_used)
        for column in (self.end_s, self.ttft_ok, self.tpot_ok, *optional, *self.controls):
            if column is not None and len(column) != len(self.arrival_s):
                raise ConfigError(f"outcomes: {len(self.arrival_s)} arrivals, but {len(column)} values; give one each")
        if not (np.diff(self.arrival_s) >= 0).all():
            raise ConfigError("outcomes: arrivals are not in order; sort all columns by arrival_s")
        object.__setattr__(self, "flow", Flow(self.arrival_s, self.end_s, self.controls))

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def ok(self) -> BoolArray:
        return self.ttft_ok & self.tpot_ok

    def share(self, slo_class: int | None = None) -> float:
        """Of all requests of a class, or of all classes, that met both targets; 1 where there are none."""
        ok = self.ok
        if slo_class is not None and self.slo_class is not None:
            ok = ok[self.slo_class == slo_class]
        return float(ok.mean()) if ok.size else 1.0


class OutcomeLog:
    """Collects outcomes one by one, in any order, in seven numbers each."""

    def __init__(self) -> None:
        self._numbers = array("d")
        self._flags = array("q")

    def add(self, timing: RequestTiming, slo: SLO, *, failed: bool = False, slo_class: int = 0) -> None:
        """`failed` is a request that got tokens but not all of them; one that was refused has no first token anyway."""
        ttft_ms, tpot_ms = timing.ttft_ms(), timing.tpot_ms()
        is_lost = failed or ttft_ms is None
        ttft_used = math.inf if is_lost or ttft_ms is None else ttft_ms / slo.ttft_ms
        tpot_used = math.inf if is_lost else 0.0 if tpot_ms is None else tpot_ms / slo.tpot_ms
        ttft_ok = ttft_ms is not None and not failed and ttft_ms <= slo.ttft_ms
        tpot_ok = not is_lost and (tpot_ms is None or tpot_ms <= slo.tpot_ms)
        self._flags.extend((ttft_ok, tpot_ok, slo_class))
        end_s = math.inf if timing.end_s is None else timing.end_s
        self._numbers.extend((timing.scheduled_s, end_s, ttft_used, tpot_used))

    def outcomes(self, controls: Sequence[FloatArray] = ()) -> Outcomes:
        """All so far. `controls` are in the order of arrival."""
        numbers = np.array(self._numbers, dtype=np.float64).reshape(-1, 4)
        flags = np.array(self._flags, dtype=np.int64).reshape(-1, 3)
        order = np.argsort(numbers[:, 0], kind="stable")
        arrival_s, end_s, ttft_used, tpot_used = numbers[order].T
        ttft_ok, tpot_ok, slo_class = flags[order].T
        return Outcomes(
            arrival_s,
            end_s,
            ttft_ok.astype(np.bool_),
            tpot_ok.astype(np.bool_),
            controls=tuple(controls),
            slo_class=slo_class,
            ttft_used=ttft_used,
            tpot_used=tpot_used,
        )


@dataclass(frozen=True, slots=True)
class Attainment:
    """Share of requests that met both targets, with its 95 % interval; `ttft` and `tpot` are the shares of each.

    Of the simulated requests `num_requests` were judged, in `num_batches` batches; `warmup_requests` were cut at the
    starts of the runs and `tail_requests` at their ends.
    """

    value: float
    low: float
    high: float
    num_requests: int
    num_batches: int
    warmup_requests: int
    tail_requests: int
    ttft: float
    tpot: float
    is_enough: bool
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """What is judged of a run: its requests of one class without the run's ends. `gaps` are the times since the
    request before, of any class."""

    hits: FloatArray
    misses: FloatArray
    ttft: FloatArray
    tpot: FloatArray
    backlog: FloatArray
    gaps: FloatArray
    controls: tuple[FloatArray, ...]
    ttft_used: FloatArray | None
    tpot_used: FloatArray | None
    num_early: int
    num_late: int

    def __len__(self) -> int:
        return len(self.hits)


def judge(runs: Sequence[Outcomes], slo_class: int | None = None) -> list[Judged]:
    """Cuts warm-up and tail from all runs (`steady_spans`), and what is of another class."""
    spans = steady_spans([outcomes.flow for outcomes in runs])
    chosen = [_chosen(outcomes, first, last, slo_class) for outcomes, (first, last) in zip(runs, spans, strict=True)]
    return [
        _judged(outcomes, rows, first, len(outcomes) - last)
        for outcomes, rows, (first, last) in zip(runs, chosen, spans, strict=True)
    ]


def _chosen(outcomes: Outcomes, first: int, last: int, slo_class: int | None) -> IntArray:
    rows = np.arange(first, last)
    if slo_class is None or outcomes.slo_class is None:
        return rows
    of_class: IntArray = rows[outcomes.slo_class[first:last] == slo_class]
    return of_class


def _judged(outcomes: Outcomes, span: IntArray, num_early: int, num_late: int) -> Judged:
    return Judged(
        hits=outcomes.ok[span].astype(np.float64),
        misses=(~outcomes.ok[span]).astype(np.float64),
        ttft=outcomes.ttft_ok[span].astype(np.float64),
        tpot=outcomes.tpot_ok[span].astype(np.float64),
        backlog=outcomes.flow.backlog[span],
        gaps=np.diff(outcomes.arrival_s, prepend=0.0)[span],
        controls=tuple(column[span] for column in outcomes.controls),
        ttft_used=None if outcomes.ttft_used is None else outcomes.ttft_used[span],
        tpot_used=None if outcomes.tpot_used is None else outcomes.tpot_used[span],
        num_early=num_early,
        num_late=num_late,
    )


def measure(runs: Sequence[Outcomes], slo_class: int | None = None) -> Attainment:
    """The attainment of one or more runs of one system at one rate, of all requests or of those of one SLO class."""
    unknown = Attainment(math.nan, 0.0, 1.0, 0, 0, 0, 0, math.nan, math.nan, False, "hardly any requests")
    if min(len(outcomes) for outcomes in runs) < 2 * MIN_BATCH_REQUESTS:
        return unknown
    judged = [one for one in judge(runs, slo_class) if len(one) >= MIN_BATCH_REQUESTS]
    if sum(len(one) for one in judged) < 2 * MIN_BATCH_REQUESTS:
        return unknown
    size = _batch_size(judged)
    batches, misses, backlogs = (
        _split([getattr(one, name) for one in judged], size) for name in ("hits", "misses", "backlog")
    )
    means = np.concatenate(batches)
    value, ttft, tpot = (
        min(1.0, float(np.concatenate([getattr(one, name) for one in judged]).mean()))
        for name in ("hits", "ttft", "tpot")
    )
    num_requests = sum(len(one) for one in judged)
    correlation = pooled_correlation(batches)
    variance = float(means.var(ddof=1)) / len(means) * widening(correlation + 1 / len(means))
    num_independent = min(value * (1 - value) / variance, num_requests) if variance > 0 else math.inf
    if min(int((np.concatenate(misses) > 0).sum()), int((means > 0).sum())) < MIN_MIXED_BATCHES:
        # Too few batches with both hits and misses to say how these vary: a whole batch counts as one request.
        num_independent = min(num_independent, len(means) / widening(pooled_correlation(backlogs)))
    low, high = _wilson(value, num_independent, t_quantile(len(means) - 1))
    problem = ""
    if len(means) < MIN_BATCHES:
        problem = f"{len(means)} batches are too few"
    elif correlation > TOO_CORRELATED:
        problem = f"batches of {num_requests // len(means)} requests are still correlated ({correlation:.2f})"
    warmup, tail = sum(one.num_early for one in judged), sum(one.num_late for one in judged)
    reason = problem or f"{len(means)} batches of {num_requests // len(means)} requests"
    return Attainment(value, low, high, num_requests, len(means), warmup, tail, ttft, tpot, not problem, reason)


def _batch_size(judged: Sequence[Judged]) -> int:
    """The smallest batch at which neither hits nor backlog are correlated from batch to batch by more than chance; the
    largest that leaves `MIN_BATCHES` if there is none. The backlog speaks where nothing missed and hits tell nothing.
    """
    size = MIN_BATCH_REQUESTS
    while sum(max(1, len(one) // (2 * size)) for one in judged) >= MIN_BATCHES and size < len(judged[0]):
        hits, backlogs = _split([one.hits for one in judged], size), _split([one.backlog for one in judged], size)
        bound = MAX_CORRELATION + 1 / math.sqrt(sum(len(one) for one in hits))
        if pooled_correlation(hits) <= bound and pooled_correlation(backlogs) <= bound:
            break
        size *= 2
    return size


def _split(series: Sequence[FloatArray], size: int) -> list[FloatArray]:
    """Batch means of about `size` requests for each run; a run that is shorter is one batch."""
    return [batch_means(one, max(1, len(one) // size)) for one in series]


def pooled_correlation(batches: Sequence[FloatArray]) -> float:
    """Lag-1 correlation within runs, around the mean of all."""
    everything = np.concatenate(batches)
    mean, variance = float(everything.mean()), float(everything.var())
    num_pairs = len(everything) - len(batches)
    along = sum(float((one[1:] - mean) @ (one[:-1] - mean)) for one in batches)
    return along / num_pairs / variance if variance > 1e-12 and num_pairs else 0.0


def widening(correlation: float) -> float:
    """Factor on the variance of a mean over batches that are correlated."""
    correlation = min(0.9, max(0.0, correlation))
    return (1 + correlation) / (1 - correlation)


def _wilson(value: float, num_independent: float, z: float) -> tuple[float, float]:
    """Wilson's interval (1927): inside of [0, 1], and not empty when nothing missed."""
    spread = z**2 / num_independent
    middle = (value + spread / 2) / (1 + spread)
    half = math.sqrt(value * (1 - value) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def t_quantile(dof: float, probability: float = 0.975) -> float:
    """Of Student's distribution, by the Cornish-Fisher expansion; within 0.3 % from 5 degrees of freedom on."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / dof**power for power, term in enumerate(terms))
