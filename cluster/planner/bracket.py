"""How much one set-up takes, from a few short runs: rates up and down until the edge lies between two of them.

A run meets the targets or not, and by how much (`View.stretch`); the edge is interpolated. A run that was too short to
show that the system keeps up is done again, longer; only where it cannot be made long enough its rate counts as too
much. Short runs start empty and flatter a system, and one run each is one draw: enough to see which set-ups are far
from the best, and where a search with an interval of its own should begin. The interval here is the two rates around
the edge, widened by a tenth each. Knows nothing of who runs what it asks for.
"""

from __future__ import annotations

import math

from pdserve.cluster.planner.findings import Setup
from pdserve.cluster.planner.goodput import Goodput
from pdserve.cluster.planner.trials import View

MAX_PROBES = 10
FAR_BELOW = 2.9
"""When even this part of the guess is too much, a rate is tried at which requests hardly meet."""

MAX_STEP = 2.0

VANISHING_BACKLOG = 0.1
FAR_STRETCH = 3.0
"""Beyond saturation a queue grows for as long as the run lasts; how far says nothing."""

MARGIN = 1.1
SPARE_LENGTH = 1.1
SURER = 4
"""So many times the requests, where a miss may be chance and would end everything."""


class Bracket:
    """The runs of one set-up. `step` is how far apart the first rates are, `narrow` when the edge is known."""

    def __init__(self, setup: Setup, guess: float, *, step: float = 1.5, narrow: float = 1.12) -> None:
        self.setup = setup
        self.views: dict[float, View] = {}
        self.is_infeasible = False
        self._num_requests = 0
        self._num_runs = 0
        self._needed_s = 0.0
        self._needed_requests = 0
        self._is_lost = False
        self._guess = guess
        self._step = step
        self._narrow = narrow
        self._vanishing: float | None = None

    def add(self, rate: float, view: View, most_requests: int = 0) -> None:
        """A run that should have been longer counts only if it could not be, with `most_requests` for a run."""
        self._num_requests += view.num_requests
        self._num_runs += 1
        is_vanishing = rate == self._vanishing and view.stretch > 1
        needed = round(SPARE_LENGTH * view.needed_s * rate)
        if view.num_requests < needed <= most_requests:
            self._needed_s = SPARE_LENGTH * view.needed_s
            return
        if is_vanishing and not view.is_sure and not self._needed_requests and view.num_requests < most_requests:
            self._needed_requests = min(SURER * view.num_requests, most_requests)
            return
        self.views[rate] = view
        self.is_infeasible |= is_vanishing and view.is_sure
        self._is_lost |= is_vanishing

    def at_least(self, rate: float) -> int:
        """How many requests a run at that rate must have to tell anything, as far as that is known."""
        return max(round(self._needed_s * rate), self._needed_requests)

    @property
    def needed_requests(self) -> int:
        """What a run would have needed to tell whether the lowest rate that counts as too high is; 0 if it told it."""
        return round(SPARE_LENGTH * self.views[self.above].needed_s * self.above) if self.above < math.inf else 0

    @property
    def above(self) -> float:
        """The lowest rate that is too high; infinity if none was seen."""
        return min((rate for rate, view in self.views.items() if view.stretch > 1), default=math.inf)

    @property
    def below(self) -> float:
        """The highest rate below that one which is not; 0 if none was seen."""
        above = self.above
        return max((rate for rate in self.views if rate < above), default=0.0)

    @property
    def estimate(self) -> float:
        """Where the edge is, most likely."""
        if self.is_infeasible:
            return 0.0
        below, above = self.below, self.above
        if not below:
            return above / 2 if above < math.inf else self._guess
        if above == math.inf:
            return below
        under = -math.log(max(1e-3, self.views[below].stretch))
        over = math.log(min(FAR_STRETCH, self.views[above].stretch))
        part = min(0.9, max(0.1, under / max(1e-9, under + over)))
        return float(below * (above / below) ** part)

    @property
    def order(self) -> tuple[float, float]:
        """Ascending from the best; of those that no rate will do for, by how far they are from it."""
        at = self.below or min(self.views, default=0.0)
        return -self.estimate, self.views[at].stretch if self.views else math.inf

    def is_done(self, narrow: float | None = None) -> bool:
        """`narrow` may ask for less than this bracket was made for."""
        is_narrow = self.below > 0 and self.above <= self.below * max(self._narrow, narrow or 0.0)
        return self._is_lost or is_narrow or len(self.views) >= MAX_PROBES

    def next_rate(self) -> float:
        """The rate to run next."""
        if not self.views:
            return self._guess
        below, above = self.below, self.above
        # Farther each time: the guess may be far off.
        step = min(MAX_STEP, float(self._step ** (2 ** (len(self.views) - 1))))
        if above == math.inf:
            is_far = self.views[below].stretch < 0.5
            return below * (MAX_STEP if is_far else step)
        if below:
            return math.sqrt(below * above)
        if above * FAR_BELOW <= self._guess:
            self._vanishing = self._vanishing_rate(above)
            return self._vanishing
        return above / step

    def _vanishing_rate(self, rate: float) -> float:
        took_s = sum(phase.p50_ms for phase in self.views[rate].picture.phases) / 1e3
        return min(rate / 16, VANISHING_BACKLOG / took_s if took_s > 0 else rate / 64)

    def goodput(self) -> Goodput:
        """What the runs amount to."""
        views, num_requests, num_runs = self.views, self._num_requests, self._num_runs
        probes = tuple((rate, views[rate].attainment) for rate in sorted(views))
        if self.is_infeasible:
            lowest, view = probes[0][0], views[probes[0][0]]
            failing = view.failing or "TTFT and TPOT"
            reason = f"{failing} is missed even at {lowest:.3g} requests/s, where requests hardly meet"
            return Goodput(0.0, 0.0, 0.0, view.attainment, num_requests, num_runs, probes, reason, failing)
        rate = self.below
        low, high = rate / MARGIN, self.above * MARGIN
        reason = f"seen early: {num_runs} short runs at different rates"
        if not rate:
            reason = f"{num_runs} short runs found no rate that holds the targets, the lowest at {probes[0][0]:.3g}/s"
        at_rate = views[rate].attainment if rate else probes[0][1]
        return Goodput(rate, low, high, at_rate, num_requests, num_runs, probes, reason)
