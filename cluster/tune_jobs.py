"""Does a search's jobs with the simulator. The one place where `pdserve tune` simulates.

A problem is sent to each process once; jobs and results are small. Knows nothing of which jobs are worth doing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from pdserve.cluster.planner.attainment import OutcomeLog, Outcomes, measure
from pdserve.cluster.planner.findings import Setup, Target
from pdserve.cluster.planner.goodput import find_goodput
from pdserve.cluster.planner.picture import Run, Seen, busy_shares
from pdserve.cluster.planner.profile import Profile
from pdserve.cluster.planner.setup_config import config_of
from pdserve.cluster.planner.simulation import Outcome, simulate
from pdserve.cluster.planner.trials import Found, Hunt, Job, Probe, Result, View
from pdserve.cluster.planner.virtual_router import Record
from pdserve.cluster.planner.workload_spec import WorkloadSpec
from pdserve.cluster.simulation_report import seen_of
from pdserve.proto.types import SLO

MAX_DRAIN = 1.5
"""A run that goes on for longer than so many times its arrivals was a burst: that it was served in time says nothing of
a rate, and so counts as too much. Runs are several times as long as requests take, so that others end soon after."""

GENERAL = "all"
"""The class of requests that no other class was given for."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What all jobs of a search share. Profiles are by name."""

    profiles: Mapping[str, Profile]
    workload: WorkloadSpec
    targets: tuple[Target, ...]

    def target_of(self, slo_class: str | None) -> int:
        """Which of the targets a class is judged by."""
        names = [target.name for target in self.targets]
        if len(names) == 1:
            return 0
        return names.index(slo_class if slo_class in names else GENERAL)

    @property
    def share(self) -> float:
        """Of all requests by weight, those that are to meet their targets."""
        weights = sum(target.weight for target in self.targets)
        return sum(target.share * target.weight for target in self.targets) / weights


def perform(job: Job, problem: Problem) -> Result:
    """Any job, in this process."""
    return _view(job, problem) if isinstance(job, Probe) else _hunt(job, problem)


def run_once(setup: Setup, problem: Problem, rate: float, seed: int, num_requests: int) -> Outcome:
    """One simulation of a set-up."""
    by_role = {role: problem.profiles[name] for role, name in setup.profiles.items()}
    config = config_of(setup, problem.profiles, problem.targets[0])
    source = problem.workload.source(rate, seed, num_requests)
    return simulate(config, by_role, source, are_prompts_shared=problem.workload.shares_prefixes())


def _view(job: Probe, problem: Problem) -> View:
    outcome = run_once(job.setup, problem, job.rate, job.seed, job.num_requests)
    run = Run(_seen(outcome.records, problem), problem.targets)
    last_arrival_s = max(record.arrival.at_s for record in outcome.records)
    return View(
        attainment=measure([_outcomes(outcome.records, problem)]),
        stretch=max(run.stretch(), outcome.end_s / (MAX_DRAIN * max(last_arrival_s, 1e-9))),
        picture=run.picture(job.rate, busy_shares(outcome.busy_s, last_arrival_s, outcome.end_s)),
        nearest=run.nearest(),
        extrapolated=outcome.extrapolation.summary(),
        num_requests=len(outcome.records),
    )


def _hunt(job: Hunt, problem: Problem) -> Found:
    lines: list[tuple[str, ...]] = []

    def run(rate: float, seed: int, num_requests: int) -> Outcomes:
        outcome = run_once(job.setup, problem, rate, seed, num_requests)
        if outcome.extrapolation.num_outside:
            lines.append(outcome.extrapolation.summary())
        return _outcomes(outcome.records, problem)

    goodput = find_goodput(
        run,
        [target.share for target in problem.targets] if len(problem.targets) > 1 else problem.share,
        seed=job.seed,
        precision=job.precision,
        max_requests=job.max_requests,
        start_rate=job.start_rate,
        course_requests=problem.workload.course_requests(),
    )
    # The last runs are the ones beside the goodput.
    return Found(goodput, tuple(dict.fromkeys(chain.from_iterable(lines[-1:]))))


def _outcomes(records: Sequence[Record], problem: Problem) -> Outcomes:
    log = OutcomeLog()
    for record in records:
        index = problem.target_of(record.arrival.slo_class)
        target = problem.targets[index]
        slo = SLO(target.ttft_ms, target.tpot_ms)
        log.add(record.timing(), slo, failed=bool(record.failure), weight=target.weight, slo_class=index)
    return log.outcomes()


def _seen(records: Sequence[Record], problem: Problem) -> list[Seen]:
    ordered = sorted(records, key=lambda record: record.arrival.at_s)
    return [seen_of(record, problem.target_of(record.arrival.slo_class)) for record in ordered]
