"""What `pdserve simulate` saw, as the story of its report: the sums of the load report, latencies, a time-lapse.

Only puts together; the sums are made where real load is summed up, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from pdserve.cluster.config import ClusterConfig
from pdserve.cluster.load_report import LoadReport
from pdserve.cluster.planner.findings import ClassReport, Picture, Setup, Target
from pdserve.cluster.planner.picture import Run
from pdserve.cluster.planner.profile import Profile
from pdserve.cluster.planner.simulation import Outcome
from pdserve.cluster.planner.timelapse import Lapse, SimulationStory, Spread
from pdserve.cluster.simulation_report import seen_of
from pdserve.cluster.tune_targets import target_of
from pdserve.proto.types import Role


def story_of(
    report: LoadReport,
    *,
    setup: str,
    workload: str,
    profiles: Mapping[Role, Profile],
    seed: int,
    picture: Picture | None,
    lapse: Lapse,
    classes: tuple[ClassReport, ...],
    warnings: tuple[str, ...] = (),
) -> SimulationStory:
    """`setup` is its name, as in `3P5D`; `warnings` are what the user must know before believing it."""
    spreads = {"TTFT": report.ttft, "TPOT": report.tpot, "ITL": report.itl, "E2E": report.e2e}
    return SimulationStory(
        setup=setup,
        workload=workload,
        profiles=tuple(f"{role}: {profile.name}, {profile.source}" for role, profile in profiles.items()),
        seed=seed,
        classes=classes,
        num_requests=report.num_requests,
        num_completed=report.num_completed,
        duration_s=report.duration_s,
        offered_rate=report.offered_rate,
        requests_per_s=report.requests_per_s,
        goodput_per_s=report.goodput_per_s,
        attainment=report.attainment,
        spreads={name: Spread(**asdict(one)) for name, one in spreads.items() if one is not None},
        errors=report.errors,
        picture=picture,
        lapse=lapse,
        warnings=warnings,
    )


def name_of(config: ClusterConfig) -> str:
    """As in `3P5D`."""
    return Setup({role: config.replicas(role) for role in Role}, {}, {}, config.router.policy).name


def picture_of(outcome: Outcome, targets: Sequence[Target], rate: float) -> Picture | None:
    """Latencies and phases of a simulation, without its start; `None` if nothing completed."""
    records = sorted(outcome.records, key=lambda record: record.arrival.at_s)
    if all(record.failure for record in records):
        return None
    run = Run([seen_of(record, target_of(targets, record.arrival.slo_class)) for record in records], targets)
    return run.picture(rate, outcome.busy)
