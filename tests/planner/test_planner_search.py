"""The search for set-ups, over queues whose best set-up is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from planner_queues import exponential_times, single_server
from planner_setups import make_profile

from pdserve.cluster.planner.attainment import Attainment, Outcomes, measure
from pdserve.cluster.planner.caveats import caveats
from pdserve.cluster.planner.findings import Finding, Picture, Setup, Target
from pdserve.cluster.planner.fleets import Limit, fleets_of
from pdserve.cluster.planner.goodput import Goodput, find_goodput
from pdserve.cluster.planner.search import EFFORTS, Candidate, Effort, Ranked, Searched, search
from pdserve.cluster.planner.setups import Choices, start, wanted
from pdserve.cluster.planner.stationarity import Flow
from pdserve.cluster.planner.trials import Found, Hunt, Job, Probe, Result, View
from pdserve.proto.types import Role

SHARE = 0.9
LIMIT_S = 10.0
ONE_SERVER = 1 - math.log(1 / (1 - SHARE)) / LIMIT_S
"""About the rate at which nine tenths of an M/M/1 queue's requests wait less than that: P(W > t) = r exp(-(1-r)t)."""

QUICK = EFFORTS["quick"]
UNKNOWN = Attainment(math.nan, 0.0, 1.0, 0, 0, 0, 0, math.nan, math.nan, False, "")
Speed = Callable[[Setup], float]


class Queues:
    """Evaluates jobs as if each set-up were one server of its own speed. No target is ever met at speed 0."""

    def __init__(self, speed: Speed) -> None:
        self.speed = speed
        self.num_requests = 0
        self.stages: dict[str, list[Job]] = {}

    def __call__(self, stage: str, jobs: Sequence[Job]) -> list[Result]:
        self.stages.setdefault(stage, []).extend(jobs)
        results = [self._hunt(job) if isinstance(job, Hunt) else self._probe(job) for job in jobs]
        self.num_requests += sum(result.num_requests for result in results)
        return results

    def _probe(self, job: Probe) -> View:
        speed = self.speed(job.setup)
        outcomes = self._run(speed)(job.rate, job.seed, job.num_requests)
        took_s = (outcomes.end_s - outcomes.arrival_s)[job.num_requests // 10 :]
        stretch = float(np.quantile(took_s, SHARE)) / LIMIT_S if speed else 5.0
        picture = Picture(job.rate, (), (), (), {}, 1.0, 1.0)
        nearest = (Target("all", 1.0, 1.0, SHARE),)
        needed_s = 0.0
        if outcomes.flow.falls_behind():
            needed_s = outcomes.flow.needed_s() if outcomes.flow.needed_s() > outcomes.flow.duration_s else 0.0
            stretch = max(stretch, 1.5)
        failing = "TTFT" if stretch > 1 else ""
        return View(
            measure([outcomes]), stretch, picture, nearest, (), job.num_requests, needed_s=needed_s, failing=failing
        )

    def _hunt(self, job: Hunt) -> Found:
        goodput = find_goodput(
            self._run(self.speed(job.setup)),
            SHARE,
            seed=job.seed,
            precision=job.precision,
            max_requests=job.max_requests,
            start_rate=job.start_rate,
        )
        return Found(goodput, ())

    def _run(self, speed: float) -> Callable[[float, int, int], Outcomes]:
        run = single_server(exponential_times, LIMIT_S if speed else -1.0)
        return lambda rate, seed, num_requests: run(rate / (speed or 1.0), seed, num_requests)


def candidates(speed: Speed, num_gpus: int = 8, choices: Choices | None = None) -> list[Candidate]:
    """Every set-up of so many equal GPUs; guesses are off by a half, differently for each."""
    (fleet,) = fleets_of([make_profile()], {})
    choices = choices or Choices()
    setups = [start(fleet, counts, choices) for counts in wanted(fleet, Limit(num_gpus=num_gpus), choices)]
    random = np.random.default_rng(1)
    guesses = [(speed(setup) or 1.0) * float(random.uniform(0.5, 1.5)) for setup in setups]
    return [Candidate(setup, guess, 100.0, choices) for setup, guess in zip(setups, guesses, strict=True)]


def balanced(best_prefill: float, split: float = 1.0, mixed: float = 0.7) -> Speed:
    """Fastest at so many prefill workers; three-way set-ups lie between. Mixed workers have the speed `mixed`."""

    def speed(setup: Setup) -> float:
        num_prefill, num_mixed = setup.num_workers.get(Role.PREFILL, 0), setup.num_workers.get(Role.MIXED, 0)
        if not num_prefill:
            return 40 * mixed
        return 40 * split * math.exp(-0.15 * abs(num_prefill - best_prefill) - 0.1 * num_mixed)

    return speed


def run(speed: Speed, effort: Effort = QUICK, seed: int = 0, num_gpus: int = 8) -> tuple[Searched, Queues]:
    queues = Queues(speed)
    return search(candidates(speed, num_gpus), queues, effort, seed), queues


def first(found: Searched, is_split: bool) -> Ranked:
    return next(one for one in found.ranked if one.setup.is_split == is_split)


@pytest.mark.parametrize("num_prefill", [2, 3, 6])
def test_the_best_split_is_found_and_its_goodput_is_the_truth_within_its_interval(num_prefill: int) -> None:
    speed = balanced(num_prefill)
    found, _ = run(speed)
    best = found.ranked[0]
    assert best.setup.name == f"{num_prefill}P{8 - num_prefill}D"
    assert best.is_refined
    truth = ONE_SERVER * speed(best.setup)
    assert 0.97 * best.goodput.low <= truth <= 1.03 * best.goodput.high
    assert best.goodput.rate == pytest.approx(truth, rel=0.1)


def test_colocated_wins_where_it_is_better_and_the_best_split_is_kept_beside_it() -> None:
    found, _ = run(balanced(3, mixed=1.4))
    assert found.ranked[0].setup.name == "8M"
    split = first(found, is_split=True)
    assert split.setup.name == "3P5D"
    assert split.is_refined


def test_the_best_colocated_set_up_reaches_the_end_however_bad_it_is() -> None:
    found, queues = run(balanced(3, mixed=0.2))
    hunted = {job.setup.name for job in queues.stages["measuring the best"]}
    assert {"3P5D", "8M"} <= hunted
    assert first(found, is_split=False).is_refined


def test_every_static_split_has_a_figure() -> None:
    found, _ = run(balanced(3))
    rates = {one.setup.name: one.goodput.rate for one in found.ranked}
    assert {f"{num}P{8 - num}D" for num in range(1, 8)} <= set(rates)
    assert rates["7P1D"] == pytest.approx(ONE_SERVER * balanced(3)(found_setup(found, "7P1D")), rel=0.35)


def found_setup(found: Searched, name: str) -> Setup:
    return next(one.setup for one in found.ranked if one.setup.name == name)


def test_better_sizes_are_found_step_by_step_and_carried_over_to_the_neighbours() -> None:
    def speed(setup: Setup) -> float:
        """Half the chunk and twice the sequences that a search begins with are better by a fifth each."""
        chunk = setup.max_num_batched_tokens.get(Role.PREFILL, 1024)
        num_seqs = setup.max_num_seqs.get(Role.DECODE, 256)
        steps = abs(math.log2(chunk / 1024)) + abs(math.log2(num_seqs / 128))
        return balanced(3)(setup) * math.pow(1.2, -steps)

    found, _ = run(speed, EFFORTS["normal"])
    best = found.ranked[0].setup
    assert best.name == "3P5D"
    assert (best.max_num_batched_tokens[Role.PREFILL], best.max_num_seqs[Role.DECODE]) == (1024, 128)


def test_the_same_seed_gives_the_same_answer_and_another_one_other_figures() -> None:
    speed = balanced(3)
    (one, _), (again, _), (other, _) = run(speed), run(speed), run(speed, seed=1)
    assert one == again
    assert other.ranked[0].goodput.rate != one.ranked[0].goodput.rate
    assert other.ranked[0].setup.name == one.ranked[0].setup.name


@pytest.mark.parametrize("effort", EFFORTS.values(), ids=EFFORTS)
@pytest.mark.parametrize("num_gpus", [2, 8, 64])
def test_no_more_is_simulated_than_the_effort_allows_and_all_of_it_is_reported(effort: Effort, num_gpus: int) -> None:
    found, queues = run(balanced(num_gpus / 3), effort, num_gpus=num_gpus)
    assert found.num_requests == queues.num_requests <= effort.max_requests


def test_of_too_many_set_ups_the_likeliest_are_tried_and_the_others_are_counted() -> None:
    found, _ = run(balanced(20), num_gpus=64)
    assert found.num_left_out > 1000
    assert found.ranked[0].setup.num_workers[Role.PREFILL] == pytest.approx(20, abs=3)
    assert first(found, is_split=False).is_refined


def test_what_is_reported_was_measured_with_seeds_that_chose_nothing() -> None:
    _, queues = run(balanced(3))
    seeds = [{job.seed for job in jobs} for jobs in queues.stages.values()]
    assert len(seeds) >= 4
    assert all(len(some) == 1 for some in seeds), "all set-ups of a stage see the same requests"
    assert len(set.union(*seeds)) == len(seeds)


@pytest.mark.parametrize(("run_requests", "num_looked_at"), [(0, 500), (2_500, 2_500), (1_000_000, 6_000)])
def test_what_is_shown_of_a_goodput_is_a_run_as_long_as_those_that_found_it(
    run_requests: int, num_looked_at: int
) -> None:
    """As far as requests are left: at least a tenth of them all, for three at most."""

    class Longer(Queues):
        def _hunt(self, job: Hunt) -> Found:
            return replace(super()._hunt(job), run_requests=run_requests)

    queues = Longer(balanced(3))
    found = search(candidates(balanced(3)), queues, QUICK)
    looks = [job for job in queues.stages["last look"] if isinstance(job, Probe)]
    hunted = [job.setup.name for job in queues.stages["measuring the best"]]
    assert sorted(job.setup.name for job in looks) == sorted(hunted)
    assert min(job.num_requests for job in looks) >= min(num_looked_at, QUICK.max_requests // 10 // len(looks))
    for one in found.ranked:
        if one.setup.name in hunted:
            assert one.view is not None
            assert one.goodput.attainment_at_rate == one.view.attainment


@pytest.mark.parametrize(("run_requests", "is_kept"), [(500, False), (100_000, True)])
def test_a_goodput_of_unknown_interval_counts_where_its_runs_were_much_longer_than_the_ones_before(
    run_requests: int, is_kept: bool
) -> None:
    unbounded = Goodput(11.0, 0.0, 60.0, UNKNOWN, 4_000, 9, (), "the budget was spent", is_spent=True)

    class Unbounded(Queues):
        def _hunt(self, job: Hunt) -> Found:
            return Found(unbounded, (), run_requests=run_requests)

    found = search(candidates(balanced(3)), Unbounded(balanced(3)), QUICK)
    assert (found.ranked[0].goodput.rate == unbounded.rate) == is_kept
    assert found.ranked[0].goodput.is_spent


def test_where_no_rate_will_do_the_report_says_so_and_shows_what_was_nearest() -> None:
    found, _ = run(lambda setup: 0.0)
    assert found.ranked[0].goodput.rate == 0
    assert found.ranked[0].goodput.failing == "TTFT"
    assert found.ranked[0].view is not None


def test_one_gpu_is_one_mixed_worker() -> None:
    found, _ = run(balanced(3), num_gpus=1)
    assert [one.setup.name for one in found.ranked] == ["1M"]


@pytest.mark.parametrize(("spent", "warned"), [(True, True), (False, False)])
def test_an_interval_that_the_budget_left_wide_is_warned_of_by_what_it_is_not_by_its_words(
    spent: bool, warned: bool
) -> None:
    found, _ = run(balanced(3))
    best = found.ranked[0]
    goodput = replace(best.goodput, is_spent=spent, reason="a whole course has too many requests for the budget")
    findings = [Finding(best.setup, goodput, True)]
    profile = make_profile()
    for effort, option in (("normal", "--effort thorough"), ("thorough", "--max-requests")):
        lines = caveats(found, findings, 0, {profile.name: profile}, Choices(), effort)
        spent_lines = [line for line in lines if "were spent before the interval" in line]
        assert bool(spent_lines) == warned
        assert all(option in line for line in spent_lines)


def test_runs_that_cannot_be_long_enough_are_warned_of() -> None:
    found, _ = run(balanced(3))
    findings = [Finding(found.ranked[0].setup, found.ranked[0].goodput, True)]
    profiles = {"made up": make_profile()}
    short = replace(found, least_requests=4_000_000)
    (line,) = set(caveats(short, findings, 0, profiles, Choices())) - set(
        caveats(found, findings, 0, profiles, Choices())
    )
    assert "--max-requests 4000000" in line


@pytest.mark.parametrize(("tokens_per_s", "warned"), [(11_000.0, False), (13_000.0, True)])
def test_a_rate_that_no_router_process_could_deliver_is_warned_of(tokens_per_s: float, warned: bool) -> None:
    found, _ = run(balanced(3))
    picture = Picture(10.0, (), (), (), {}, 1000.0, tokens_per_s)
    findings = [Finding(found.ranked[0].setup, found.ranked[0].goodput, True, picture)]
    lines = caveats(found, findings, 0, {"made up": make_profile()}, Choices())
    assert any("more than one router process delivers" in line for line in lines) == warned


def test_with_answers_that_take_much_longer_than_guessed_runs_are_made_long_enough() -> None:
    """1,800 requests run at once where the guess was a hundred; nothing waits, up to a rate."""
    edge = 30.0

    class Delay(Queues):
        def _probe(self, job: Probe) -> View:
            random = np.random.default_rng(job.seed)
            arrival_s = np.cumsum(random.exponential(1 / job.rate, job.num_requests))
            flow = Flow(arrival_s, arrival_s + 60.0)
            stretch, needed_s = job.rate / edge, 0.0
            if flow.falls_behind():
                needed_s = flow.needed_s() if stretch <= 1 and flow.needed_s() > flow.duration_s else 0.0
                stretch = max(1.5, stretch)
            return replace(super()._probe(job), stretch=stretch, needed_s=needed_s)

    queues = Delay(lambda setup: 30.0)
    one = [replace(found, guess=10.0) for found in candidates(lambda setup: 30.0, num_gpus=1)]
    search(one, queues, EFFORTS["normal"])
    probes = [job for job in queues.stages["screening"] if isinstance(job, Probe)]
    assert max(job.rate for job in probes) > edge, "not stopped by the length of the runs"
    assert max(job.num_requests for job in probes) > 1_000
