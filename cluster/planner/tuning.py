"""The question of `pdserve tune` from end to end: set-ups to begin with, the search over them, and what it amounts to.

    Request --candidates--> search --Ranked--> findings (cost, energy) --verdict, caveats--> Answer

Knows nothing of files, of the screen, or of how jobs are done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pdserve.cluster.planner.capacity import Capacity, Lengths
from pdserve.cluster.planner.caveats import caveats
from pdserve.cluster.planner.costing import cost_of, energy_of
from pdserve.cluster.planner.findings import Answer, Finding, Question, Target
from pdserve.cluster.planner.fleets import Fleet, Limit
from pdserve.cluster.planner.profile import Profile
from pdserve.cluster.planner.search import Candidate, Effort, Ranked, Searched, search
from pdserve.cluster.planner.setups import Choices, clipped, start, wanted
from pdserve.cluster.planner.trials import Evaluate
from pdserve.cluster.planner.verdict import decide
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import Role


@dataclass(frozen=True, slots=True)
class Request:
    """Everything that is asked, checked. `mean_prompt` and `mean_output` are tokens of the workload, `notes` what must
    be said of it. The router must give no request up before `least_timeout_s`."""

    fleets: tuple[Fleet, ...]
    limit: Limit
    choices: Choices
    targets: tuple[Target, ...]
    workload: str
    mean_prompt: float
    mean_output: float
    effort: Effort
    seed: int
    least_timeout_s: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def profiles(self) -> dict[str, Profile]:
        """By name."""
        return {profile.name: profile for fleet in self.fleets for profile in fleet.profiles.values()}


def candidates(request: Request) -> list[Candidate]:
    """Every set-up to begin with.

    Raises:
        ConfigError: there is none.
    """
    tightest_ms = min(target.tpot_ms for target in request.targets)
    capacity = Capacity(request.profiles, Lengths(request.mean_prompt, request.mean_output, tightest_ms))
    found = []
    for fleet in request.fleets:
        choices = clipped(request.choices, fleet)
        for counts in wanted(fleet, request.limit, request.choices):
            setup = start(fleet, counts, choices)
            found.append(Candidate(setup, capacity.rate(setup), capacity.num_inflight(setup), choices))
    if not found:
        raise ConfigError(f"no set-up can be made of this: {_too_little(request)}")
    return found


def _too_little(request: Request) -> str:
    if request.choices.splits is not None:
        return "--splits names none that the profiles have workers for"
    least = min(fleet.gpus_per_worker for fleet in request.fleets)
    return f"a worker needs {least:g} GPUs, and a split needs two workers; raise --gpus or --price-per-hour"


def tune(request: Request, evaluate: Evaluate) -> Answer:
    """The answer, but for the time that it took.

    Raises:
        ConfigError: there is nothing to choose from.
    """
    found = search(candidates(request), evaluate, request.effort, request.seed)
    findings = tuple(_finding(one, request) for one in found.ranked)
    nearest = [one.view.nearest if one.view is not None else () for one in found.ranked]
    decided = decide(findings, nearest, request.targets, [one.failure for one in found.ranked])
    return Answer(
        question=_question(request, findings),
        findings=findings,
        verdict=decided.verdict,
        reasons=decided.reasons,
        warnings=_warnings(request, found, findings, decided.recommended),
        best_split=decided.best_split,
        best_colocated=decided.best_colocated,
        plateau=decided.plateau,
        num_requests=found.num_requests,
        took_s=0.0,
        recommended=decided.recommended,
    )


def _warnings(request: Request, found: Searched, findings: Sequence[Finding], chosen: int | None) -> tuple[str, ...]:
    choices = request.choices
    if chosen is not None:
        names = set(findings[chosen].setup.profiles.values())
        fleet = next(one for one in request.fleets if names <= {profile.name for profile in one.profiles.values()})
        choices = clipped(choices, fleet)
    return (*request.notes, *caveats(found, findings, chosen, request.profiles, choices, request.effort.name))


def _finding(one: Ranked, request: Request) -> Finding:
    by_role: Mapping[Role, Profile] = {role: request.profiles[name] for role, name in one.setup.profiles.items()}
    if one.view is None or not one.goodput.rate:
        return Finding(one.setup, one.goodput, one.is_refined)
    picture = one.view.picture
    return Finding(
        setup=one.setup,
        goodput=one.goodput,
        is_refined=one.is_refined,
        picture=picture,
        cost=cost_of(one.setup, picture, by_role, request.limit.price_per_gpu_hour),
        energy=energy_of(one.setup, picture, by_role),
    )


def _question(request: Request, findings: Sequence[Finding]) -> Question:
    profiles = list(request.profiles.values())
    hardware = list(dict.fromkeys(profile.hardware for profile in profiles))
    degrees = [profile.tensor_parallel_size for profile in profiles]
    num_gpus = request.limit.num_gpus or max(one.setup.num_gpus for one in findings)
    return Question(
        num_gpus=num_gpus,
        targets=request.targets,
        workload=request.workload,
        model=profiles[0].model,
        hardware=", ".join(hardware),
        profiles=tuple(f"{profile.name} ({profile.source}: {profile.origin})" for profile in profiles),
        seed=request.seed,
        precision=request.effort.precision,
        are_profiles_told=len(profiles) > 1 and (len(hardware) > 1 or len(set(degrees)) < len(degrees)),
    )
