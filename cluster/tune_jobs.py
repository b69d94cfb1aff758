"""Does a search's jobs with the simulator. The one place where `pdserve tune` simulates.

A problem is sent to each process once; jobs and results are small. Knows nothing of which jobs are worth doing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pdserve.cluster.planner.attainment import OutcomeLog, Outcomes, measure
from pdserve.cluster.planner.findings import Setup, Target
from pdserve.cluster.planner.goodput import Goodput, find_goodput
from pdserve.cluster.planner.picture import Run, Seen, Work, busy_shares
from pdserve.cluster.planner.profile import Profile
from pdserve.cluster.planner.setup_config import config_of
from pdserve.cluster.planner.simulation import Outcome, simulate
from pdserve.cluster.planner.trials import Found, Hunt, Job, Probe, Result, View
from pdserve.cluster.planner.virtual_router import Record
from pdserve.cluster.planner.workload_spec import WorkloadSpec
from pdserve.cluster.simulation_report import seen_of, was_handed_off
from pdserve.cluster.tune_targets import target_of
from pdserve.proto.types import SLO

BEHIND_STRETCH = 1.5
"""Of a run that met its targets only because it was over before the backlog was long."""

NEAR = 0.2
"""Runs within such a part of the goodput are at it, more or less."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What all jobs of a search share. Profiles are by name. No request is given up before `least_timeout_s`."""

    profiles: Mapping[str, Profile]
    workload: WorkloadSpec
    targets: tuple[Target, ...]
    least_timeout_s: float = 0.0


def perform(job: Job, problem: Problem) -> Result:
    """Any job, in this process."""
    return _view(job, problem) if isinstance(job, Probe) else _hunt(job, problem)


def run_once(setup: Setup, problem: Problem, rate: float, seed: int, num_requests: int) -> Outcome:
    """One simulation of a set-up."""
    by_role = {role: problem.profiles[name] for role, name in setup.profiles.items()}
    config = config_of(setup, problem.profiles, problem.targets[0], problem.least_timeout_s)
    source = problem.workload.source(rate, seed, num_requests)
    return simulate(config, by_role, source, are_prompts_shared=problem.workload.shares_prefixes())


def _view(job: Probe, problem: Problem) -> View:
    outcome = run_once(job.setup, problem, job.rate, job.seed, job.num_requests)
    records = sorted(outcome.records, key=lambda record: record.arrival.at_s)
    run, outcomes = Run(_seen(records, problem), problem.targets), _outcomes(records, problem)
    stretch, needed_s, flow = run.stretch(), 0.0, outcomes.flow
    if flow.falls_behind():
        # That it was served in time says nothing of a rate, if it could have gone on like this for a short while only.
        wanted_s = flow.needed_s() if stretch <= 1 else 0.0
        needed_s = wanted_s if wanted_s > flow.duration_s else 0.0
        stretch = max(stretch, BEHIND_STRETCH)
    return View(
        attainment=measure([outcomes]),
        stretch=stretch,
        picture=run.picture(
            job.rate, busy_shares(outcome.busy_s, _work(records), run.begin_s, max(run.end_s, run.begin_s + 1e-9))
        ),
        nearest=run.nearest(),
        extrapolated=outcome.extrapolation.summary(),
        num_requests=len(records),
        needed_s=needed_s,
        is_sure=_misses_surely(outcomes, problem.targets),
        failing=run.failing(),
        failure=_failure(records),
    )


def _misses_surely(outcomes: Outcomes, targets: Sequence[Target]) -> bool:
    """Whether some class falls below its share by more than chance."""
    if len(targets) == 1:
        return measure([outcomes]).high < targets[0].share
    return any(measure([outcomes], index).high < target.share for index, target in enumerate(targets))


def _failure(records: Sequence[Record]) -> str:
    """Why most of those failed that did; empty if none did."""
    reasons = Counter(record.failure for record in records if record.failure)
    if not reasons:
        return ""
    return f"{reasons.total() / len(records):.0%} of the requests fail: {reasons.most_common(1)[0][0]}"


def _hunt(job: Hunt, problem: Problem) -> Found:
    beyond: list[tuple[float, tuple[str, ...]]] = []
    failures: list[tuple[float, str]] = []
    lengths: list[tuple[float, int]] = []

    def run(rate: float, seed: int, num_requests: int) -> Outcomes:
        outcome = run_once(job.setup, problem, rate, seed, num_requests)
        beyond.append((rate, outcome.extrapolation.summary() if outcome.extrapolation.num_outside else ()))
        failures.append((rate, _failure(outcome.records)))
        lengths.append((rate, num_requests))
        return _outcomes(outcome.records, problem)

    goodput = find_goodput(
        run,
        [target.share for target in problem.targets],
        seed=job.seed,
        precision=job.precision,
        max_requests=job.max_requests,
        start_rate=job.start_rate,
        course_requests=problem.workload.course_requests(job.start_rate),
    )
    run_requests = max((num for rate, num in lengths if _is_near(rate, goodput)), default=0)
    return Found(goodput, _at(goodput, beyond), min(failures)[1] if goodput.failing else "", run_requests)


def _at(goodput: Goodput, beyond: Sequence[tuple[float, tuple[str, ...]]]) -> tuple[str, ...]:
    """What was beyond all measurements in the last of the runs near the goodput, as they are the longest."""
    near = [lines for rate, lines in beyond if _is_near(rate, goodput) and lines]
    return near[-1] if near else ()


def _is_near(rate: float, goodput: Goodput) -> bool:
    return abs(rate - goodput.rate) <= NEAR * goodput.rate


def _outcomes(records: Sequence[Record], problem: Problem) -> Outcomes:
    log = OutcomeLog()
    for record in records:
        index = target_of(problem.targets, record.arrival.slo_class)
        target = problem.targets[index]
        slo = SLO(target.ttft_ms, target.tpot_ms)
        log.add(record.timing(), slo, failed=bool(record.failure), slo_class=index)
    return log.outcomes()


def _seen(ordered: Sequence[Record], problem: Problem) -> list[Seen]:
    return [seen_of(record, target_of(problem.targets, record.arrival.slo_class)) for record in ordered]


def _work(records: Sequence[Record]) -> Iterator[Work]:
    """When requests that ended well had something to compute: their prompt, then, maybe elsewhere, their tokens."""
    for record in records:
        if record.failure or record.end_s is None:
            continue
        if was_handed_off(record):
            yield record.prefill_id, record.prefill_started_s, record.prefilled_s
            yield record.decode_id, record.decode_started_s, record.end_s
        else:
            yield record.prefill_id, record.prefill_started_s, record.end_s
