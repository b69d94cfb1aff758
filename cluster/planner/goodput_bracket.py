"""The bracket of a goodput: from a guess to a rate near the boundary, by the looks of short runs.

Up or down in growing steps, then halving the logarithm, until a rate cannot be told from the boundary by its looks. A
system that misses at a low rate is run so slowly that requests hardly meet: what is missed there is missed at any rate.
On the way it keeps what is clear beyond looks: the highest rate that surely does, and the lowest that surely does not.

It does not say what the goodput is: that is `goodput`.
"""

from __future__ import annotations

import math
import operator
from enum import Enum

import numpy as np

from pdserve.cluster.planner.probes import Probe, Probes
from pdserve.cluster.planner.stationarity import MAX_CORRELATION, ROUGH_CORRELATION, Verdict
from pdserve.proto.errors import ConfigError

FIRST_REQUESTS = 500
"""For a rate's looks."""

MAX_LENGTHENINGS = 5
MAX_STEPS_UP = 30
STEPS = (1.6, 2.5, 4.0)
"""Factors from a guess that was wrong; the last one again and again."""

LEANING = 0.6
"""How far from the target a rate is that is surely not near it, in the logarithm of the misses."""

VANISHING_BACKLOG = 0.05
VANISHING_REQUESTS = 1_000

NARROW = 0.1
"""A bracket of so much on both sides is left to the refining, at any precision."""

ROUGH = 0.1
"""A precision for which runs may be so short that they are a little flattering."""


class Side(Enum):
    """Where a rate's attainment is, seen from the target."""

    ABOVE = "above"
    BELOW = "below"
    CLOSE = "close"


class Bracket:
    """`low` is the highest rate that surely does and `high` the lowest that surely does not, as far as is known.

    With `course_requests` every run is a whole course, whose attainment is no estimate: all sides are clear then.
    """

    def __init__(self, probes: Probes, targets: tuple[float, ...], precision: float, course_requests: int) -> None:
        self.probes = probes
        self.targets = targets
        self.course_requests = course_requests
        self.narrow = precision if course_requests else NARROW
        self.max_correlation = ROUGH_CORRELATION if precision >= ROUGH else MAX_CORRELATION
        self.low = 0.0
        self.high = math.inf
        self.needed_s = 0.0
        self.problem = ""
        self.is_checked = False

    def find(self, rate: float) -> float | None:
        """A rate near the boundary; `None` if no rate will do."""
        side = self._settle(rate)
        low, high = 0.0, math.inf
        for step in range(MAX_STEPS_UP):
            if side is not Side.ABOVE:
                break
            low = rate
            rate *= STEPS[min(step, len(STEPS) - 1)]
            side = self._settle(rate)
        else:
            raise ConfigError(f"run: the target is still met at {rate:.3g} requests/s; does the load reach the system?")
        for factor in STEPS[:2]:
            if side is Side.BELOW and not low:
                high = rate
                rate /= factor
                side = self._settle(rate)
        if side is Side.BELOW and not low:
            high = rate
            side, rate = self._settle_vanishing(rate)
            if side is Side.BELOW:
                return None
        divisor = STEPS[0]
        while side is not Side.CLOSE:
            low, high = (rate, high) if side is Side.ABOVE else (low, rate)
            # After a jump down the boundary is likelier to be near the upper end.
            rate = max(math.sqrt(low * high), high / divisor)
            if high <= low * (1 + self.narrow) ** 2:
                break
            side = self._settle(rate)
            divisor = divisor**2 if side is Side.BELOW else math.inf
        return rate

    def _settle(self, rate: float) -> Side:
        """Runs the rate, longer while that was much too short, and says its side by its looks."""
        if self.course_requests:
            return self._settle_course(rate)
        num_requests = self.at_least(rate, FIRST_REQUESTS)
        for _ in range(MAX_LENGTHENINGS):
            if num_requests > self.probes.left:
                self.problem = "too few requests were left to tell a rate's side"
                return Side.CLOSE
            self.probes.add(rate, num_requests)
            probe = self.note(rate)
            self.needed_s = max(self.needed_s, probe.stationarity.needed_s)
            if num_requests >= self.at_least(rate, 0) or rate >= self.high:
                break
            num_requests = self.at_least(rate, 2 * num_requests)
        return Side.BELOW if rate >= self.high else self._side(probe)

    def _settle_course(self, rate: float) -> Side:
        """What comes out of a whole course is the answer for it, not an estimate."""
        if self.course_requests > self.probes.left:
            return Side.CLOSE
        outcomes = self.probes.add(rate, self.course_requests)
        shares = [outcomes.share(one) for one in self.probes.classes]
        if all(map(operator.ge, shares, self.targets)):
            self.low = max(self.low, rate)
            return Side.ABOVE
        self.high = min(self.high, rate)
        return Side.BELOW

    def note(self, rate: float) -> Probe:
        """Keeps what is clear. A run that starts empty is flattering: a miss counts even if the run is too short."""
        probe = self.probes.look(rate, self.max_correlation)
        pairs = list(zip(probe.by_class, self.targets, strict=True))
        verdict = probe.stationarity.verdict
        if verdict is Verdict.GROWING or any(one.high < target for one, target in pairs):
            self.high = min(self.high, rate)
        elif verdict is not Verdict.TOO_SHORT and all(one.low >= target for one, target in pairs):
            self.low = max(self.low, rate)
        return probe

    def _side(self, probe: Probe) -> Side:
        pairs = list(zip(probe.by_class, self.targets, strict=True))
        leanings = [log_misses(one.value) - log_misses(target) for one, target in pairs if one.num_requests]
        # A class of which hardly any request was seen may be anywhere.
        leaning = max([*leanings, 0.0] if len(leanings) < len(pairs) else leanings)
        if abs(leaning) <= LEANING:
            return Side.CLOSE
        return Side.BELOW if leaning > 0 else Side.ABOVE

    def at_least(self, rate: float, num_requests: int) -> int:
        """So many, or what arrives while runs have to last."""
        return max(num_requests, math.ceil(1.1 * self.needed_s * rate))

    def is_feasible(self, rate: float) -> bool:
        """Asked of a rate that looks as if it were too high: whether a lower one does better, as far as is known."""
        if self.low or self.is_checked or self.probes.left < VANISHING_REQUESTS:
            return True
        self.is_checked = True
        return self._settle_vanishing(rate)[0] is not Side.BELOW

    def _settle_vanishing(self, rate: float) -> tuple[Side, float]:
        """At a rate so low that requests hardly meet, starting from one that is below the target.

        Requests take less time the fewer there are, so that one jump may not be enough.
        """
        while True:
            flow = self.probes.at(rate)[-1].flow
            if float(flow.backlog.mean()) <= VANISHING_BACKLOG:
                return self._settle_closely(rate), rate
            took_s = min(1e6 / rate, max(1e-6 / rate, flow.early_took_s()))
            rate = min(rate / 4, VANISHING_BACKLOG / 2 / took_s)
            if self.probes.left < max(FIRST_REQUESTS, self.course_requests):
                return Side.CLOSE, rate
            side = self._settle(rate)
            if side is Side.ABOVE:
                return side, rate

    def _settle_closely(self, rate: float) -> Side:
        """Where no rate is better, looks do not do, and requests do not depend on each other."""
        if not self.course_requests and self.probes.left >= VANISHING_REQUESTS:
            self.probes.add(rate, VANISHING_REQUESTS)
        shares = [np.mean([run.share(one) for run in self.probes.at(rate)]) for one in self.probes.classes]
        return Side.CLOSE if all(map(operator.ge, shares, self.targets)) else Side.BELOW


def log_misses(share: float) -> float:
    """Grows about evenly with the rate, from hardly any misses to hardly any hits."""
    return math.log(-math.log(min(0.9999, max(0.0001, share))))
