"""Which set-up is best: all of them roughly, the best few of each kind tuned, the best of those measured anew.

    screen    every combination, a few short runs at rates around its edge; what is surely worse is left alone
    climb     from the best of each kind, split and colocated: one step in one size or policy at a time
    compare   what is still close, with the sizes found, longer runs and new seeds
    finish    the best of each kind and what cannot be told from it: the goodput with its interval, with new seeds
    look      what of those is shown beside their goodput: one run at it, as long as the runs that found it

Set-ups are compared on the same requests (common random numbers): each stage has one seed for all of them. Whoever wins
a stage was partly lucky in it, so that its figures are too good (the winner's curse); therefore every stage has seeds
that no stage before has seen, and what is reported of the finalists is from the last one alone.

The best colocated and the best split set-up always reach the end. The search never simulates more requests than its
effort allows, and depends on nothing but the answers to its jobs. Knows nothing of simulators, processes or profiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pdserve.cluster.planner.bracket import Bracket
from pdserve.cluster.planner.climb import Climber
from pdserve.cluster.planner.findings import Setup
from pdserve.cluster.planner.goodput import Goodput
from pdserve.cluster.planner.looks import as_seen, shared_out
from pdserve.cluster.planner.setups import Choices, Key, key_of, place_of, with_sizes
from pdserve.cluster.planner.trials import Evaluate, Found, Hunt, Job, Probe, View

SCREEN_SHARE, CLIMB_SHARE, COMPARE_SHARE, PICTURE_SHARE = 0.27, 0.15, 0.15, 0.1
"""Of the budget. The rest is for the finish, and so is what a stage leaves."""

PROBES_EACH = 4
"""Short runs that a set-up takes in the mean until its edge is known."""

SURELY_WORSE = 0.85
COARSE = 1.35
NUM_COMPARED = 5
NUM_FINALISTS = 3
CLOSE = 0.93
USELESS, LONGER = 3.0, 2.0
"""A goodput whose interval is wider says less than the short runs do, unless its runs were so many times as long."""

NUM_SPLIT_CLIMBERS = 1
MAX_CLIMB_ROUNDS = 5
MIN_HUNT_REQUESTS = 2_000
MIN_CANDIDATES = 4
MIN_RUNS = 50
"""A run is at most such a part of the budget."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is simulated at most, in requests, and how narrow the intervals of the finalists are to be. Runs of a
    stage have at least `min_requests` and so many times what runs at once."""

    name: str
    max_requests: int
    precision: float
    min_requests: int
    screen_times: float
    climb_times: float
    compare_times: float


EFFORTS = {
    effort.name: effort
    for effort in (
        Effort("quick", 120_000, 0.15, 500, 3, 3, 5),
        Effort("normal", 700_000, 0.10, 1_000, 5, 5, 10),
        Effort("thorough", 2_000_000, 0.04, 2_000, 10, 15, 40),
    )
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A set-up to begin with, guesses of how many requests a second it takes and how many then run at once, and what
    may be chosen for it."""

    setup: Setup
    guess: float
    num_inflight: float
    choices: Choices


@dataclass(frozen=True, slots=True)
class Ranked:
    """A set-up's outcome. `view` is at its rate, or at the lowest one that was run if it has none. `failure` says why
    requests failed where no rate will do."""

    setup: Setup
    goodput: Goodput
    is_refined: bool
    view: View | None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Searched:
    """Best first: what reached the end, then the rest. `num_left_out` set-ups were never run. `least_requests` is the
    effort that would have been needed where runs were too short to show that set-ups keep up; 0 where none were."""

    ranked: tuple[Ranked, ...]
    num_requests: int
    num_left_out: int
    extrapolated: tuple[str, ...]
    least_requests: int = 0


def search(candidates: Sequence[Candidate], evaluate: Evaluate, effort: Effort, seed: int = 0) -> Searched:
    return _Search(candidates, evaluate, effort, seed).run()


class _Search:
    def __init__(self, candidates: Sequence[Candidate], evaluate: Evaluate, effort: Effort, seed: int) -> None:
        self._evaluate = evaluate
        self._effort = effort
        self._seed = seed
        self._left = effort.max_requests
        self._choices = {place_of(one.setup): one.choices for one in candidates}
        self._inflight = {place_of(one.setup): one.num_inflight for one in candidates}
        self._candidates = self._first_few(candidates)
        self._num_left_out = len(candidates) - len(self._candidates)
        self._brackets: dict[Key, Bracket] = {}
        self._compared: set[Key] = set()
        self._found: dict[Key, Found] = {}

    def run(self) -> Searched:
        self._screen()
        self._compare(self._climb())
        self._finish()
        return self._report()

    def _first_few(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those with the best guesses that the screening can pay for, at least four: colocated ones first, then plain
        splits, then such with mixed workers beside."""
        kinds: tuple[list[Candidate], ...] = ([], [], [])
        for one in candidates:
            has_mixed = len(one.setup.num_workers) == 3
            kinds[0 if not one.setup.is_split else 2 if has_mixed else 1].append(one)
        money = SCREEN_SHARE * self._effort.max_requests
        chosen: set[Key] = set()
        for one in (one for kind in kinds for one in sorted(kind, key=lambda one: -one.guess)):
            money -= PROBES_EACH * self._length(one.setup, self._effort.screen_times)
            if money < 0 and len(chosen) >= MIN_CANDIDATES:
                break
            chosen.add(place_of(one.setup))
        return [one for one in candidates if place_of(one.setup) in chosen]

    def _length(self, setup: Setup, times: float) -> int:
        """Of a run: long enough to get over its empty start, if there is money for some such runs."""
        wanted = max(self._effort.min_requests, round(times * self._inflight[place_of(setup)]))
        return min(wanted, self._longest)

    @property
    def _longest(self) -> int:
        return self._effort.max_requests // MIN_RUNS

    def _stage_seed(self, stage: int) -> int:
        """One for all jobs of a stage, and for no job of another stage."""
        return self._seed * 1_000_003 + stage * 100_003

    def _do(self, stage: str, jobs: Sequence[Job]) -> list[View | Found]:
        assert sum(job.most_requests for job in jobs) <= self._left, "beyond the budget"
        results = self._evaluate(stage, jobs)
        self._left -= sum(result.num_requests for result in results)
        return results

    def _views(self, stage: str, jobs: Sequence[Probe]) -> list[View]:
        views: list[View] = []
        for result in self._do(stage, jobs):
            assert isinstance(result, View)
            views.append(result)
        return views

    # The stages.

    def _screen(self) -> None:
        brackets = [Bracket(one.setup, one.guess) for one in self._candidates]
        self._brackets = {place_of(bracket.setup): bracket for bracket in brackets}
        self._narrow("screening", brackets, 0, self._effort.screen_times, SCREEN_SHARE)

    def _narrow(self, stage: str, brackets: Sequence[Bracket], number: int, times: float, share: float) -> None:
        """Runs all brackets' next rates, round by round, until each is done or the stage's money is spent."""
        floor = self._left - round(share * self._effort.max_requests)
        while True:
            best = max((bracket.below for bracket in brackets), default=0.0)
            going, jobs, left = list[Bracket](), list[Probe](), self._left - floor
            for one in (one for one in brackets if not _is_settled(one, best)):
                rate = one.next_rate()
                length = max(self._length(one.setup, times), min(one.at_least(rate), self._longest))
                if length <= left:
                    left -= length
                    going.append(one)
                    jobs.append(Probe(one.setup, rate, self._stage_seed(number), length))
            if not going:
                return
            for bracket, job, view in zip(going, jobs, self._views(stage, jobs), strict=True):
                bracket.add(job.rate, view, self._longest)

    def _climb(self) -> list[Climber]:
        """Tunes the best of each kind."""
        ranked = self._ranked()
        best = [
            *[bracket for bracket in ranked if bracket.setup.is_split][:NUM_SPLIT_CLIMBERS],
            *[bracket for bracket in ranked if not bracket.setup.is_split][:1],
        ]
        climbers = [
            Climber(one.setup, one.estimate or min(one.views), self._choices[place_of(one.setup)])
            for one in best
            if one.views
        ]
        floor = self._left - round(CLIMB_SHARE * self._effort.max_requests)
        for _ in range(MAX_CLIMB_ROUNDS):
            going = [climber for climber in climbers if not climber.is_done]
            jobs = [
                [
                    Probe(setup, climber.rate, self._stage_seed(1), self._climb_length(climber))
                    for setup in climber.to_try()
                ]
                for climber in going
            ]
            flat = [job for some in jobs for job in some]
            if not flat or sum(job.num_requests for job in flat) > self._left - floor:
                break
            views = iter(self._views("tuning sizes", flat))
            for climber, some in zip(going, jobs, strict=True):
                climber.see([next(views).stretch for _ in some])
        return climbers

    def _climb_length(self, climber: Climber) -> int:
        least = self._brackets[place_of(climber.setup)].at_least(climber.rate)
        return max(self._length(climber.setup, self._effort.climb_times), min(least, self._longest))

    def _compare(self, climbers: Sequence[Climber]) -> None:
        """Longer runs for what is still close, with the sizes that were found for the nearest kin."""
        ranked = self._ranked()
        best = ranked[0].estimate
        chosen = [one for one in ranked if one.estimate >= SURELY_WORSE * best > 0][:NUM_COMPARED]
        chosen = _distinct([*chosen, *self._firsts()])
        # What no rate would do for may have been helped by other sizes.
        helped = {place_of(one.setup): one.rate for one in climbers if one.stretch <= 1}
        longer = []
        for bracket in chosen:
            guess = bracket.estimate or helped.get(place_of(bracket.setup), 0.0)
            if guess > 0:
                setup = self._tuned(bracket.setup, climbers)
                longer.append(Bracket(setup, guess, step=1.1, narrow=1.06))
        self._narrow("comparing", longer, 2, self._effort.compare_times, COMPARE_SHARE)
        for bracket in longer:
            place = place_of(bracket.setup)
            before = self._brackets[place]
            # Sizes that suit the next of kin need not suit this one.
            if bracket.views and bracket.estimate >= SURELY_WORSE * before.estimate:
                self._brackets[place] = bracket
                self._compared.add(place)

    def _tuned(self, setup: Setup, climbers: Sequence[Climber]) -> Setup:
        choices = self._choices[place_of(setup)]
        kin = [one for one in climbers if one.setup.is_split == setup.is_split]
        same = [one for one in kin if place_of(one.setup) == place_of(setup)]
        alike = [one for one in kin if one.setup.profiles == setup.profiles]
        near = [*same, *alike, *kin]
        return with_sizes(setup, near[0].setup, choices) if near else setup

    def _finish(self) -> None:
        ranked = self._ranked()
        best = ranked[0].estimate
        close = [one for one in ranked if one.estimate >= CLOSE * best and place_of(one.setup) in self._compared]
        finalists = [one for one in _distinct([*self._firsts(), *close]) if one.estimate > 0][:NUM_FINALISTS]
        spare = round(PICTURE_SHARE * self._effort.max_requests)
        jobs: list[Hunt] = []
        while finalists and not jobs:
            each = (self._left - spare) // len(finalists)
            if each >= MIN_HUNT_REQUESTS:
                jobs = [self._hunt(one, each) for one in finalists]
            else:
                finalists.pop()
        for job, result in zip(jobs, self._do("measuring the best", jobs) if jobs else [], strict=True):
            assert isinstance(result, Found)
            self._found[key_of(job.setup)] = result

    def _hunt(self, bracket: Bracket, max_requests: int) -> Hunt:
        return Hunt(bracket.setup, bracket.estimate, self._stage_seed(3), self._effort.precision, max_requests)

    def _ranked(self) -> list[Bracket]:
        return sorted(self._brackets.values(), key=lambda bracket: bracket.order)

    def _firsts(self) -> list[Bracket]:
        """The best of each kind, the best of all first."""
        found: dict[bool, Bracket] = {}
        for bracket in self._ranked():
            found.setdefault(bracket.setup.is_split, bracket)
        return list(found.values())

    # What is told.

    def _report(self) -> Searched:
        seen = [bracket for bracket in self._brackets.values() if bracket.views]
        goodputs = [self._goodput(bracket) for bracket in seen]
        order = sorted(range(len(seen)), key=lambda index: self._rank(seen[index], goodputs[index]))
        rates = [goodput.rate for goodput in goodputs]
        views = self._pictures([seen[index] for index in order], [rates[index] for index in order])
        ranked = tuple(
            Ranked(
                setup=seen[index].setup,
                goodput=as_seen(goodputs[index], view),
                is_refined=place_of(seen[index].setup) in self._compared or key_of(seen[index].setup) in self._found,
                view=view,
                failure=self._failure(seen[index], view),
            )
            for index, view in zip(order, views, strict=True)
        )
        lines = [found.extrapolated for found in self._found.values()]
        lines += [view.extrapolated for view in views[:1] if view is not None and not lines]
        return Searched(
            ranked=ranked,
            num_requests=self._effort.max_requests - self._left,
            num_left_out=self._num_left_out,
            extrapolated=tuple(dict.fromkeys(line for some in lines for line in some)),
            least_requests=MIN_RUNS * max((self._needed(bracket) for bracket in seen), default=0),
        )

    def _needed(self, bracket: Bracket) -> int:
        """Requests that a run would have needed; what reached the end was looked at by other means."""
        return 0 if key_of(bracket.setup) in self._found else bracket.needed_requests

    def _failure(self, bracket: Bracket, view: View | None) -> str:
        found = self._found.get(key_of(bracket.setup))
        return (found.failure if found is not None else "") or (view.failure if view is not None else "")

    def _goodput(self, bracket: Bracket) -> Goodput:
        """The finish's; if that came to nothing for want of requests, and its runs were hardly longer than the ones
        before, the rate that these say, as uncertain as the finish found it."""
        found = self._found.get(key_of(bracket.setup))
        if found is None:
            return bracket.goodput()
        goodput = found.goodput
        is_bounded = goodput.high <= USELESS * goodput.low
        longest = max(view.num_requests for view in bracket.views.values())
        if is_bounded or goodput.failing or found.run_requests >= LONGER * longest:
            return goodput
        rough = bracket.goodput()
        return replace(
            rough,
            low=min(rough.low, goodput.low),
            high=max(rough.high, goodput.high),
            reason=f"the budget was too small: {goodput.reason}; {rough.reason}",
            is_spent=True,
        )

    def _rank(self, bracket: Bracket, goodput: Goodput) -> tuple[bool, float]:
        return key_of(bracket.setup) not in self._found or goodput.rate <= 0, -goodput.rate

    def _pictures(self, brackets: Sequence[Bracket], rates: Sequence[float]) -> list[View | None]:
        """A run at each one's rate; for those that reached the end a longer one, with a new seed for all."""
        views: list[View | None] = []
        wanted: dict[int, int] = {}
        for position, (bracket, rate) in enumerate(zip(brackets, rates, strict=True)):
            views.append(bracket.views.get(rate or min(bracket.views)))
            found = self._found.get(key_of(bracket.setup))
            if found is not None and rate:
                wanted[position] = max(self._length(bracket.setup, self._effort.compare_times), found.run_requests)
        lengths = shared_out(wanted, self._left)
        seed = self._stage_seed(4)
        jobs = [Probe(brackets[position].setup, rates[position], seed, num) for position, num in lengths.items()]
        for position, view in zip(lengths, self._views("last look", jobs), strict=True):
            views[position] = view
        return views


def _is_settled(bracket: Bracket, best: float) -> bool:
    """What is surely worse than the best need be known roughly only."""
    is_worse = bracket.above < SURELY_WORSE * best
    return bracket.is_done(COARSE if is_worse else None)


def _distinct(brackets: Iterable[Bracket]) -> list[Bracket]:
    return list({key_of(bracket.setup): bracket for bracket in brackets}.values())
