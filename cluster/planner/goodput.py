"""The highest arrival rate at which enough requests meet both their targets: a search over rates, with an interval.

Two stages. *Bracket* (`goodput_bracket`): from a guess to the neighbourhood of the boundary. *Refine*: rounds of runs
at and beside the boundary, and one curve through all that are near (`crossing`), until its interval is as narrow as
asked for. What ends a search is its interval: the number of requests is a result. Where the budget ends first, what is
known then is the answer, with the interval that it has.

Traffic that replays a course from its beginning (`course_requests`) has one right answer over the whole of it, and no
steady state: every run is then a whole course, and halving goes on until the rates on both sides are near enough.

Several SLO classes each have their own target. Goodput is then the lowest of the rates at which one of them falls to
its own.

It does not know what is simulated. `run` must keep its mean arrival rate at the rate that it is given.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pdserve.cluster.planner.attainment import Attainment, Outcomes, judge, measure
from pdserve.cluster.planner.crossing import Crossing, cross
from pdserve.cluster.planner.goodput_bracket import FIRST_REQUESTS, ROUGH, Bracket
from pdserve.cluster.planner.probes import Probes, Run
from pdserve.cluster.planner.stationarity import Verdict, check_stationarity
from pdserve.proto.errors import ConfigError

MIN_BUDGET = 2_000
ROUND_RUNS = 3
ROUND_REQUESTS = 100
"""A run of the refining is so long over the precision."""

WIDEST = 0.15
WIDE_PRECISIONS = 1.5
WIDE_EXPONENT = 1.5
"""How far from the boundary runs for the slope are: farther is a better slope, nearer is a straighter curve."""

MIN_ROUNDS = 2
CONFIDENCE = 0.97
"""Of the curve. Looking at it again after every round costs some: what comes out covers in about 95 %."""

MIN_COURSES = 4
"""With a budget for fewer, parts of a course are run."""

COMPLETION = "completion"
"""What is missed where requests fail."""

UNSEEN_PART = 0.5
"""An interval is never narrower than so much of the precision: what short runs and a bent curve do, it does not see."""


@dataclass(frozen=True, slots=True)
class Goodput:
    """`rate`, in requests per second, is the best estimate, and 0 where no rate will do; `low` and `high` are its 95 %
    interval, (0, inf) at worst.

    `attainment_at_rate` is that of the runs around the rate. `failing` names the target that cannot be met at any
    rate, `completion` where too many requests failed. `probes` are all rates that were run, ascending, each with the
    attainment of its longest runs. `limiting` is the class that falls to its target first, where there are several.
    `is_spent` says that the requests that may be simulated were spent before the interval was narrow.
    """

    rate: float
    low: float
    high: float
    attainment_at_rate: Attainment
    num_requests: int
    num_runs: int
    probes: tuple[tuple[float, Attainment], ...]
    reason: str
    failing: str = ""
    limiting: int | None = None
    is_spent: bool = False


def find_goodput(
    run: Run,
    target: float | Sequence[float],
    *,
    seed: int,
    precision: float = 0.03,
    max_requests: int = 400_000,
    start_rate: float = 1.0,
    course_requests: int = 0,
) -> Goodput:
    """Searches until the interval is no wider than the rate plus and minus `precision` of it, or until `max_requests`
    have been simulated. `start_rate` is a guess; a good one saves requests. `target` is the share of all requests, or
    one share for each SLO class, by the index in `Outcomes.slo_class`. `course_requests` is after how many requests
    the traffic has shown all it has, where that matters: a trace that is replayed in its order.

    Raises:
        ConfigError: an argument out of range, or a `run` that does not do what it is asked to.
    """
    targets = (target,) if isinstance(target, int | float) else tuple(target)
    if not targets:
        raise ConfigError("attainment target: there is none; give a share such as 0.9, or one for each SLO class")
    for one in targets:
        if not 0.0 < one < 1.0:
            raise ConfigError(f"attainment target: {one!r} is not between 0 and 1; give a share such as 0.9")
    if not 0.0 < precision < 1.0:
        raise ConfigError(f"precision: {precision!r} is not between 0 and 1; give a share of the rate such as 0.03")
    if not (start_rate > 0 and math.isfinite(start_rate)):
        raise ConfigError(f"start rate: {start_rate!r} is not a positive number of requests per second")
    if max_requests < MIN_BUDGET:
        raise ConfigError(f"requests to simulate: {max_requests} are too few; give {MIN_BUDGET} or more")
    if course_requests < 0:
        raise ConfigError(f"course: {course_requests} requests are fewer than none; give 0 where any stretch will do")
    return _Search(Probes(run, seed, max_requests, len(targets)), targets, precision, course_requests).find(start_rate)


class _Search:
    """One search: the bracket, and then the refining."""

    def __init__(self, probes: Probes, targets: tuple[float, ...], precision: float, course_requests: int) -> None:
        self.probes = probes
        self.targets = targets
        self.precision = precision
        fits = MIN_COURSES * course_requests <= probes.left
        self.course_requests = course_requests if fits else 0
        words = (
            f"; a whole course has {course_requests} requests, too many for the budget: runs were parts of it, or went "
            "through it faster"
        )
        self.note = "" if fits else words
        self.bracket = Bracket(probes, targets, precision, self.course_requests)
        self.widest = max(WIDEST, min(0.3, WIDE_PRECISIONS * precision))
        self.unseen = UNSEEN_PART * precision
        self.min_runs = ROUND_RUNS + 1 if precision >= ROUGH else MIN_ROUNDS * ROUND_RUNS
        self.problem = ""
        self.too_short = 0
        self.flattered: Crossing | None = None
        self.drifts = False

    def find(self, start_rate: float) -> Goodput:
        center = self.bracket.find(start_rate)
        self.problem = self.bracket.problem
        if center is None:
            return self._infeasible()
        return self._over_courses(center) if self.course_requests else self._refine(center)

    def _over_courses(self, center: float) -> Goodput:
        low, high = self.bracket.low, self.bracket.high
        is_narrow = high <= low * (1 + self.bracket.narrow) ** 2
        spent = "" if is_narrow else f"the budget was spent before the interval was +-{self.precision:.1%}; "
        reason = f"whole courses of {self.course_requests} requests each: the interval is between two that were run"
        return self._report(min(max(center, low), high), low, high, spent + reason, is_spent=not is_narrow)

    def _refine(self, center: float) -> Goodput:
        """Rounds of runs around the boundary until the interval is narrow enough."""
        round_requests = max(FIRST_REQUESTS, round(ROUND_REQUESTS / self.precision))
        first, wide, best = 0, self.widest, None
        while True:
            num_requests = self._fitting(center * (1 + wide / 2), round_requests)
            if num_requests is None:
                return self._unrefined(center) if best is None else self._refined(*best, is_done=False)
            for factor in (1 - wide, 1.0, 1 + wide / 2):
                self.probes.add(center * factor, num_requests)
                self.bracket.note(center * factor)
            near = self._near(center, wide, first)
            verdict, found = self._verdict(near, center), self._cross(near)
            before, center = center, self._moved(center, wide, near, found)
            if found is None and center < before and not self.bracket.is_feasible(before):
                return self._infeasible()
            is_run = found is not None and before * (1 - 2 * wide) <= found[0].rate <= before * (1 + wide)
            self.flattered = found[0] if verdict is Verdict.TOO_SHORT and found is not None and is_run else None
            if verdict is Verdict.GROWING:
                center = min(center, before * (1 - wide))
            elif verdict is Verdict.TOO_SHORT and center >= before:
                # Runs that are too short flatter the system: only what they say is too much is too much.
                first, round_requests, center = len(self.probes.runs), 2 * num_requests, before
                self.too_short = num_requests
            elif verdict is not Verdict.TOO_SHORT and found is not None and abs(center / before - 1) <= wide / 2:
                best = found
                width = (found[0].high - found[0].low) / found[0].rate / (2 * self.precision)
                if width <= 1 and len(near) >= self.min_runs:
                    return self._refined(*best, is_done=True)
                wide = min(self.widest, max(WIDE_PRECISIONS * self.precision, WIDE_EXPONENT / found[0].slope))
                # By how much the interval is too wide, but not too little: a search that looks at its interval after
                # every few runs stops when it is narrow by chance.
                missing = min(1.5, max(0.15, min(2.0, width) ** 2 - 1))
                round_requests = max(round_requests, round(sum(len(run) for _, run in near) * missing / ROUND_RUNS))

    def _fitting(self, highest: float, num_requests: int) -> int | None:
        """How long the next round's runs are: as wanted, or as is left if that is not too short."""
        shortest = self.bracket.at_least(highest, FIRST_REQUESTS)
        fitting = min(max(shortest, num_requests), self.probes.left // ROUND_RUNS)
        # Where such as were too short say something, shorter ones, which flatter more, must not have the last word.
        is_waste = self.flattered is not None and fitting <= self.too_short
        return fitting if fitting >= shortest and not is_waste else None

    def _near(self, center: float, wide: float, first: int) -> list[tuple[float, Outcomes]]:
        low, high = center * (1 - 1.4 * wide), center * (1 + 0.9 * wide)
        return [
            (rate, run)
            for number, (rate, run) in enumerate(self.probes.runs)
            if low <= rate <= high and number >= first and len(run) >= self.bracket.at_least(rate, 0)
        ]

    def _cross(self, near: list[tuple[float, Outcomes]]) -> tuple[Crossing, int | None] | None:
        """The class that falls first, and the joint interval: each class has its part of the chance to be wrong."""
        confidence = 1 - (1 - CONFIDENCE) / len(self.targets)
        found = []
        for one, target in zip(self.probes.classes, self.targets, strict=True):
            crossing = cross(near, target, one, confidence)
            if crossing is not None:
                found.append((crossing, one))
            elif measure([run for _, run in near], one).low < target:
                if one is not None:
                    self.problem = f"class {one} has too few requests to tell where it falls to {target:.1%}"
                return None
        if not found:
            return None
        limiting, slo_class = min(found, key=lambda pair: pair[0].rate)
        low, high = min(one.low for one, _ in found), min(one.high for one, _ in found)
        return Crossing(limiting.rate, low, high, limiting.slope), slo_class

    def _moved(
        self, center: float, wide: float, near: list[tuple[float, Outcomes]], found: tuple[Crossing, int | None] | None
    ) -> float:
        """Where to run next: at the crossing, but not far from what was run, and inside of what is clear."""
        if found is not None:
            wanted = found[0].rate
        else:
            shares = [measure([run for _, run in near], one).value for one in self.probes.classes]
            wanted = math.inf if all(map(operator.ge, shares, self.targets)) else 0.0
        wanted = min(max(wanted, self.bracket.low / (1 + wide)), self.bracket.high * (1 + wide))
        return min(max(wanted, center * (1 - 2 * wide)), center * (1 + 2 * wide))

    def _verdict(self, near: list[tuple[float, Outcomes]], center: float) -> Verdict:
        """Of the runs up to the boundary. `problem` is why these do not tell the goodput, if they do not."""
        flows = [run.flow for rate, run in near if rate <= center]
        stationarity = check_stationarity(flows, self.bracket.max_correlation)
        is_bad = stationarity.verdict in (Verdict.GROWING, Verdict.TOO_SHORT)
        self.problem = "the boundary was still being looked for"
        if is_bad:
            self.problem = f"runs of {len(near[-1][1])} requests are not stationary: {stationarity.reason}"
        self.bracket.needed_s = max(self.bracket.needed_s, stationarity.needed_s)
        self.drifts = stationarity.verdict is Verdict.DRIFTING
        return stationarity.verdict

    def _infeasible(self) -> Goodput:
        rate = self.probes.rates()[0]
        runs = self.probes.at(rate)
        parts, failing = [], set[str]()
        for one, target in zip(self.probes.classes, self.targets, strict=True):
            attainment = measure(runs, one)
            # A class that hardly came is not to blame.
            if not attainment.num_requests or attainment.value >= target:
                continue
            missed = {name for name, share in (("TTFT", attainment.ttft), ("TPOT", attainment.tpot)) if share < target}
            failing |= {COMPLETION} if fails(runs, one, target) else missed or {"TTFT", "TPOT"}
            parts.append(
                f"{'' if one is None else f'class {one}: '}{attainment.value:.1%} instead of {target:.1%} "
                f"(TTFT is met by {attainment.ttft:.1%}, TPOT by {attainment.tpot:.1%}); {closest(runs, one, target)}"
            )
        names = " and ".join(sorted(failing, reverse=True)) or "TTFT and TPOT"
        reason = f"no rate will do: {names} fails even for requests that hardly meet ({rate:.3g}/s): {'; '.join(parts)}"
        return self._report(0.0, 0.0, rate, reason, failing=names)

    def _unrefined(self, center: float) -> Goodput:
        """What the runs that were too short say, as far down as they may flatter; else what the bracket knows. They say
        nothing of rates far from theirs: a curve through hits alone crosses the target anywhere."""
        rate, low, high = min(max(center, self.bracket.low), self.bracket.high), self.bracket.low, self.bracket.high
        known = "the interval is that of the rates whose side is clear"
        if self.flattered is not None and self.flattered.low > 0.0 and self.flattered.high < math.inf:
            rate = self.flattered.rate
            low, high = self.flattered.low * (1 - self.precision), max(self.flattered.high, rate * (1 + self.unseen))
            known = f"such runs flatter, so the interval goes {self.precision:.0%} further down"
        reason = f"the budget was spent: {self.problem or 'too few requests were left to refine'}; {known}"
        return self._report(rate, low, high, reason, is_spent=True)

    def _refined(self, crossing: Crossing, limiting: int | None, *, is_done: bool) -> Goodput:
        """The curve's interval; that of the bracket where the curve has none."""
        low = crossing.low if crossing.low > 0 else self.bracket.low
        high = crossing.high if crossing.high < math.inf else self.bracket.high
        low, high = min(low, crossing.rate * (1 - self.unseen)), max(high, crossing.rate * (1 + self.unseen))
        shares = ", ".join(f"{target:.1%}" for target in self.targets)
        reason = f"the curve through the runs around it crosses {shares}"
        if not is_done:
            reason = f"the budget was spent before the interval was +-{self.precision:.1%}; {reason}"
        if self.drifts:
            reason += "; the load changes over a run: attainment is that of whole runs, not of a steady state"
        return self._report(crossing.rate, low, high, reason, limiting=limiting, is_spent=not is_done)

    def _report(
        self,
        rate: float,
        low: float,
        high: float,
        reason: str,
        *,
        failing: str = "",
        limiting: int | None = None,
        is_spent: bool = False,
    ) -> Goodput:
        probes = self.probes
        return Goodput(
            rate=rate,
            low=low,
            high=high,
            attainment_at_rate=measure(probes.around(rate, self.unseen)),
            num_requests=probes.num_requests,
            num_runs=len(probes.runs),
            probes=probes.attainments(),
            reason=reason + self.note,
            failing=failing,
            limiting=limiting,
            is_spent=is_spent,
        )


def fails(runs: Sequence[Outcomes], slo_class: int | None, target: float) -> bool:
    """Whether so many requests failed that no target could be met."""
    columns = [one.ttft_used for one in judge(runs, slo_class) if one.ttft_used is not None]
    return bool(columns) and float(np.isfinite(np.concatenate(columns)).mean()) < target


def closest(runs: Sequence[Outcomes], slo_class: int | None, target: float) -> str:
    """The closest target that these runs do meet, in words."""
    judged = [one for one in judge(runs, slo_class) if len(one)]
    if not judged:
        return "nothing is known of it"
    share = float(np.concatenate([one.hits for one in judged]).mean())
    words = f"the closest feasible share is {share:.1%}"
    for name, field in (("TTFT", "ttft_used"), ("TPOT", "tpot_used")):
        columns = [getattr(one, field) for one in judged]
        if any(column is None for column in columns):
            continue
        times = float(np.quantile(np.concatenate(columns), target, method="higher"))
        if 1.0 < times < math.inf:
            words += f", or a {name} target {times:.2f} times as long"
    return words
