"""Both sides of one point: a measured run, and the simulation of the same requests.

The prompts of a measured run are token ids, so nothing is tokenised, and the simulation is told so. Knows nothing of
how clusters are started, nor which points are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pdserve.cluster.arrivals import Arrival
from pdserve.cluster.config import ClusterConfig
from pdserve.cluster.load_report import LoadReport, summarize
from pdserve.cluster.planner.fit import fit_steps
from pdserve.cluster.planner.profile import Profile
from pdserve.cluster.planner.simulation import Outcome, simulate
from pdserve.cluster.planner.source import OpenLoop
from pdserve.cluster.planner.step_model import StepModel
from pdserve.cluster.planner.step_sample import StepSample
from pdserve.cluster.profiling_samples import Timing, samples_of
from pdserve.cluster.simulation_report import beyond_notes, report_of
from pdserve.cluster.state import ClusterState
from pdserve.cluster.validation import Point
from pdserve.cluster.validation_notes import Beyond
from pdserve.cluster.validation_run import MeasuredRun, measure
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import SLO, Role


@dataclass(frozen=True, slots=True)
class Judgement:
    """How a run is judged: the first `num_skipped` requests do not count; `refit` takes step times from the run."""

    slo: SLO
    num_skipped: int
    refit: bool
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Asked:
    """One run: the requests of a point, and the seed of what their prompts say."""

    point: Point
    arrivals: Sequence[Arrival]
    seed: int


@dataclass(frozen=True, slots=True)
class Sides:
    """One run as it was and as it was foretold. `step_error` is of the profile, over all steps that were taken;
    `beyond` is what the simulation had to assume."""

    real: LoadReport
    simulated: LoadReport
    step_error: float
    beyond: Beyond


async def both_sides(
    cluster: ClusterState,
    settings: ClusterConfig,
    by_role: Mapping[Role, Profile],
    asked: Asked,
    judgement: Judgement,
) -> Sides:
    """
    Raises:
        Unavailable: the cluster does not answer.
        ConfigError: with `refit`, a phase that had no step of its own.
    """
    run = await measure(cluster, asked.arrivals, asked.seed, judgement.timeout_s)
    if judgement.refit:
        every = [timing for timings in run.timings.values() for timing in timings]
        used = refitted(by_role, samples_of(every, with_disturbed=True), asked.point)
    else:
        used = {role: adapted(profile, ()) for role, profile in by_role.items()}
    outcome = foretold(settings, used, asked.arrivals)
    return Sides(
        real=judged_real(run, judgement),
        simulated=judged_simulated(outcome, judgement),
        step_error=step_error(used, run.timings),
        beyond=beyond_of(outcome),
    )


def refitted(by_role: Mapping[Role, Profile], samples: Sequence[StepSample], point: Point) -> dict[Role, Profile]:
    """The profiles with the step times of one run.

    Raises:
        ConfigError: the run does not tell of both phases; names the point.
    """
    try:
        if not samples:
            raise ConfigError("no step was recorded")
        return {role: adapted(profile, samples) for role, profile in by_role.items()}
    except ConfigError as error:
        raise ConfigError(f"--refit: {point.words}: {_lacking(samples) or error.message}") from error


def _lacking(samples: Sequence[StepSample]) -> str:
    """The phase that cannot be fitted, in the words of who asked for the run; empty where it is something else."""
    if not samples:
        return ""
    if all(sample.shape.num_prefill_tokens for sample in samples):
        return "the run had no decode step to take step times from; give longer answers, or leave --refit out"
    if all(sample.shape.num_decodes for sample in samples):
        return "the run had no prefill step to take step times from; give a lower rate, or leave --refit out"
    return ""


def beyond_of(outcome: Outcome) -> Beyond:
    seen = outcome.extrapolation
    return Beyond(seen.num_outside / max(1, seen.num_steps), beyond_notes(outcome))


def foretold(settings: ClusterConfig, used: Mapping[Role, Profile], arrivals: Sequence[Arrival]) -> Outcome:
    """The simulation of the requests. Prompts that begin alike are equal there, too: `PromptMaker` makes equal blocks
    of equal prefix ids, and the engines find them in their caches."""
    are_shared = any(arrival.prefix_ids for arrival in arrivals)
    return simulate(settings, used, OpenLoop(iter(arrivals)), are_prompts_shared=are_shared)


def step_error(used: Mapping[Role, Profile], timings: Mapping[Role, Sequence[Timing]]) -> float:
    """How far the profiles are off the sum of all steps that were taken, as a share."""
    measured_s = math.fsum(one.cost_s for of_role in timings.values() for one in of_role)
    models = {role: StepModel(used[role]) for role in timings}
    told_s = math.fsum(
        models[role].contended_s(one.shape, one.company) for role, of_role in timings.items() for one in of_role
    )
    return told_s / measured_s - 1.0 if measured_s else 0.0


def adapted(profile: Profile, samples: Sequence[StepSample]) -> Profile:
    """The profile for prompts that are token ids already; with samples, with step times fitted to them."""
    changes: dict[str, object] = {"overheads": profile.overheads.model_copy(update={"tokenize_s_per_token": 0.0})}
    if samples:
        fit = fit_steps(samples)
        changes |= {
            name: getattr(fit, name) for name in ("prefill", "decode", "decode_bend", "mixed", "contention", "domain")
        }
    return profile.model_copy(update=changes)


def judged_real(run: MeasuredRun, judgement: Judgement) -> LoadReport:
    """Without the first requests, in order of their schedule."""
    return summarize(replace(run.result, records=run.result.records[judgement.num_skipped :]), judgement.slo)


def judged_simulated(outcome: Outcome, judgement: Judgement) -> LoadReport:
    """The same requests."""
    records = sorted(outcome.records, key=lambda record: record.arrival.at_s)
    return report_of(replace(outcome, records=tuple(records[judgement.num_skipped :])), judgement.slo)
