"""`pdserve simulate`: one configuration over one workload, on virtual time, and what would come of it.

Reads the files and shows the report; the simulation is `planner.simulation`.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pdserve.cluster import command_options as options
from pdserve.cluster import tune_options as asked
from pdserve.cluster.config import DEFAULT_CONFIG, load_config
from pdserve.cluster.load_report import LoadReport, render
from pdserve.cluster.planner.findings import ClassReport
from pdserve.cluster.planner.simulation import Outcome
from pdserve.cluster.planner.simulation import simulate as run
from pdserve.cluster.planner.timelapse import Timelapse
from pdserve.cluster.planner.workload_spec import WorkloadSpec
from pdserve.cluster.profile_files import FleetProfiles, other_model, read_fleet, worker_ids
from pdserve.cluster.report_html import require_report, write_simulation
from pdserve.cluster.report_story import name_of, picture_of, story_of
from pdserve.cluster.simulation_report import beyond_notes, cut_notes, render_workers, report_of
from pdserve.cluster.simulation_sums import (
    Spent,
    check_known,
    class_fields,
    classes_of,
    judged_by_classes,
    render_classes,
    spent_lines,
    spent_of,
)
from pdserve.cluster.steering_options import parse_script, undone_notes
from pdserve.cluster.tune_targets import targets_of
from pdserve.cluster.workload_files import read_workload
from pdserve.proto.types import SLO

DEFAULT_NUM_REQUESTS = 2000
DEFAULT_SHARE = 0.9
"""Of a class that says no other."""


def simulate(
    profile: Annotated[
        list[str],
        typer.Option(help="A file or a shipped one's name; ROLE=... for one role, WORKER=... for one, as decode-1=..."),
    ],
    workload: Annotated[
        str, typer.Option(help="A preset, trace:FILE, synthetic?..., sessions?..., FILE.yaml; see docs/planner.md.")
    ] = "azure-conv",
    config: Annotated[Path, typer.Option("--config", "-c", help="Cluster configuration (YAML).")] = DEFAULT_CONFIG,
    override: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    request_rate: Annotated[float | None, typer.Option(help="Requests per second; default: the workload's.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests to simulate.")] = DEFAULT_NUM_REQUESTS,
    ttft_ms: Annotated[float, typer.Option(min=0, help="Target time to first token.")] = 1000.0,
    tpot_ms: Annotated[float, typer.Option(min=0, help="Target time per output token after the first.")] = 100.0,
    slo: asked.Slo = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the workload.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write a report with a time-lapse.")] = None,
    fail: Annotated[list[str] | None, typer.Option(help="WORKER@SECONDS[+SECONDS]: dies, and comes back.")] = None,
    flip: Annotated[list[str] | None, typer.Option(help="WORKER@SECONDS=ROLE; may be repeated.")] = None,
    workers_per_host: Annotated[int | None, typer.Option(min=1, help="Default: all workers on one host.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Every token through the scheduler; slower.")] = False,
    as_json: options.Json = False,
) -> None:
    """Simulate a cluster: the real scheduler, hand-off, admission and policy over profiled step times.

    Exit status 1 when nothing completed.
    """
    settings = load_config(config, override or [])
    lapse = _lapse(html)
    fleet, general = read_fleet(profile, settings), SLO(ttft_ms, tpot_ms)
    longest, whole = min(one.max_model_len for one in fleet.by_name.values()), read_workload(workload)
    traffic = whole.for_model(longest)
    targets = targets_of(slo or (), ttft_ms, tpot_ms, DEFAULT_SHARE)
    check_known(targets, traffic.slo_classes())
    source = traffic.source(request_rate, seed, num_prompts)
    steering = parse_script(fail or [], flip or [], worker_ids(settings))
    started_s = time.perf_counter()
    outcome = run(
        settings,
        fleet.ever,
        source,
        exact=exact,
        are_prompts_shared=traffic.shares_prefixes(),
        workers_per_host=workers_per_host,
        steering=steering,
        lapse=lapse,
    )
    took_s = time.perf_counter() - started_s
    classes = classes_of(outcome, targets)
    report = judged_by_classes(report_of(outcome, general), classes)
    # What single workers of their own cost is not in the sums by role.
    spent = Spent(None, None) if fleet.by_worker else spent_of(outcome, settings, fleet.by_role)
    words = other_model(fleet.by_name.values(), settings)
    before = (*_model_notes(words), *cut_notes(whole, longest), *_course_notes(traffic, request_rate, num_prompts))
    notes = (*before, *undone_notes(outcome, steering), *beyond_notes(outcome))
    done = _Done(name_of(settings), workload, seed, fleet, outcome, report, classes, spent, notes, took_s)
    if html is not None and lapse is not None:
        _write_report(done, lapse, html)
    _show_json(done) if as_json else _show(done)
    raise typer.Exit(0 if done.report.num_completed else 1)


def _lapse(html: Path | None) -> Timelapse | None:
    if html is None:
        return None
    require_report(html)
    return Timelapse()


@dataclass(frozen=True, slots=True)
class _Done:
    """A simulation, and everything that is said of it. `notes` are what the user must know before believing it."""

    setup: str
    workload: str
    seed: int
    fleet: FleetProfiles
    outcome: Outcome
    report: LoadReport
    classes: tuple[ClassReport, ...]
    spent: Spent
    notes: tuple[str, ...]
    took_s: float


def _model_notes(words: str) -> tuple[str, ...]:
    return (f"{words}: step times are the profile's",) if words else ()


def _course_notes(traffic: WorkloadSpec, rate: float | None, num_requests: int) -> tuple[str, ...]:
    """Traffic that changes over a time that was not simulated."""
    course = traffic.course_requests(rate)
    if traffic.whole_course or num_requests >= course:
        return ()
    return (
        f"{num_requests:,} requests are {num_requests / course:.0%} of the workload's course; --num-prompts {course} "
        "sees all of it, and whole_course in the workload lets it pass faster",
    )


def _write_report(done: _Done, lapse: Timelapse, path: Path) -> None:
    story = story_of(
        done.report,
        setup=done.setup,
        workload=done.workload,
        profiles=done.fleet.by_role,
        seed=done.seed,
        picture=picture_of(done.outcome, [one.target for one in done.classes], done.report.offered_rate),
        lapse=lapse.lapse(),
        classes=done.classes,
        warnings=done.notes,
    )
    profiles = tuple(f"{name}: {profile.name}, {profile.source}" for name, profile in done.fleet.by_name.items())
    write_simulation(replace(story, profiles=profiles), path)


def _show_json(done: _Done) -> None:
    outcome = done.outcome
    tree: dict[str, Any] = asdict(done.report) | {
        "prefix_query_tokens": outcome.num_prefix_query_tokens,
        "prefix_hit_tokens": outcome.num_prefix_hit_tokens,
        "busy": outcome.busy,
        "profiles": {
            name: {"name": profile.name, "source": profile.source} for name, profile in done.fleet.by_name.items()
        },
        "classes": [class_fields(one) for one in done.classes],
        **asdict(done.spent),
        "extrapolated": outcome.extrapolation.summary(),
        "notes": done.notes,
    }
    typer.echo(json.dumps(tree))


def _show(done: _Done) -> None:
    console, outcome = Console(), done.outcome
    has_classes = len(done.classes) > 1
    judged_by = "each class by its own targets" if has_classes else None
    for table in (*render(done.report, judged_by), render_workers(outcome)):
        console.print(table)
    if has_classes:
        console.print(render_classes(done.classes))
    for name, profile in done.fleet.by_name.items():
        console.print(f"{name}: step times of {profile.name}, {profile.source}", highlight=False, markup=False)
    if outcome.num_prefix_query_tokens:
        share = outcome.num_prefix_hit_tokens / outcome.num_prefix_query_tokens
        console.print(f"prefix caches held {share:.0%} of the prompts' tokens", highlight=False, markup=False)
    for line in (*spent_lines(done.spent), *done.notes):
        console.print(line, highlight=False, markup=False)
    num_requests = len(outcome.records)
    rate = num_requests / max(done.took_s, 1e-9)
    console.print(f"{num_requests:,} requests in {done.took_s:.1f} s, {rate:,.0f} a second")
