"""`pdserve simulate`: one configuration over one workload, on virtual time, and what would come of it.

Reads the files and shows the report; the simulation is `planner.simulation`.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pdserve.cluster import command_options as options
from pdserve.cluster.config import DEFAULT_CONFIG, ClusterConfig, load_config
from pdserve.cluster.load_report import LoadReport, render
from pdserve.cluster.planner.profile import Profile
from pdserve.cluster.planner.simulation import Outcome
from pdserve.cluster.planner.simulation import simulate as run
from pdserve.cluster.planner.timelapse import Timelapse
from pdserve.cluster.planner.workload import parse_workload
from pdserve.cluster.profile_files import read_profiles
from pdserve.cluster.report_html import require_report, write_simulation
from pdserve.cluster.report_story import name_of, picture_of, story_of
from pdserve.cluster.simulation_report import render_workers, report_of
from pdserve.cluster.steering_options import parse_script
from pdserve.proto.types import SLO, Role

DEFAULT_NUM_REQUESTS = 2000


def simulate(
    profile: Annotated[list[str], typer.Option(help="A file or a shipped one's name; ROLE=... for one role.")],
    workload: Annotated[
        str, typer.Option(help="A preset, trace:FILE, synthetic?..., sessions?...; see docs/planner.md.")
    ] = "azure-conv",
    config: Annotated[Path, typer.Option("--config", "-c", help="Cluster configuration (YAML).")] = DEFAULT_CONFIG,
    override: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    request_rate: Annotated[float | None, typer.Option(help="Requests per second; default: the workload's.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests to simulate.")] = DEFAULT_NUM_REQUESTS,
    ttft_ms: Annotated[float, typer.Option(min=0, help="Target time to first token.")] = 1000.0,
    tpot_ms: Annotated[float, typer.Option(min=0, help="Target time per output token after the first.")] = 100.0,
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
    if html is not None:
        require_report(html)
    lapse = None if html is None else Timelapse()
    by_role, slo = read_profiles(profile, settings), SLO(ttft_ms, tpot_ms)
    longest = min(one.max_model_len for one in by_role.values())
    traffic = parse_workload(workload, Path.cwd()).for_model(longest)
    source = traffic.source(request_rate, seed, num_prompts)
    started_s = time.perf_counter()
    outcome = run(
        settings,
        by_role,
        source,
        exact=exact,
        are_prompts_shared=traffic.shares_prefixes(),
        workers_per_host=workers_per_host,
        steering=parse_script(fail or [], flip or [], _worker_ids(settings)),
        lapse=lapse,
    )
    took_s = time.perf_counter() - started_s
    report = report_of(outcome, slo)
    if html is not None and lapse is not None:
        story = story_of(
            report,
            setup=name_of(settings),
            workload=workload,
            profiles=by_role,
            seed=seed,
            picture=picture_of(outcome, slo, report.offered_rate),
            lapse=lapse.lapse(),
            warnings=_warnings(outcome),
        )
        write_simulation(story, html)
    _show(report, outcome, by_role, took_s, as_json)
    raise typer.Exit(0 if report.num_completed else 1)


def _worker_ids(settings: ClusterConfig) -> list[str]:
    return [f"{role}-{ordinal}" for role in Role for ordinal in range(settings.replicas(role))]


def _warnings(outcome: Outcome) -> tuple[str, ...]:
    return tuple(f"beyond what was measured: {line}" for line in outcome.extrapolation.summary())


def _show(report: LoadReport, outcome: Outcome, by_role: dict[Role, Profile], took_s: float, as_json: bool) -> None:
    used = {str(role): {"name": profile.name, "source": profile.source} for role, profile in by_role.items()}
    if as_json:
        busy = {name: busy_s / max(outcome.end_s, 1e-9) for name, busy_s in outcome.busy_s.items()}
        hits = {
            "prefix_query_tokens": outcome.num_prefix_query_tokens,
            "prefix_hit_tokens": outcome.num_prefix_hit_tokens,
        }
        typer.echo(
            json.dumps(
                {
                    **asdict(report),
                    **hits,
                    "busy": busy,
                    "profiles": used,
                    "extrapolated": outcome.extrapolation.summary(),
                }
            )
        )
        return
    console = Console()
    for table in (*render(report), render_workers(outcome)):
        console.print(table)
    for role, words in used.items():
        console.print(f"{role}: step times of {words['name']}, {words['source']}", highlight=False)
    if outcome.num_prefix_query_tokens:
        share = outcome.num_prefix_hit_tokens / outcome.num_prefix_query_tokens
        console.print(f"prefix caches held {share:.0%} of the prompts' tokens", highlight=False)
    for line in _warnings(outcome):
        console.print(line, highlight=False)
    num_requests = len(outcome.records)
    console.print(f"{num_requests:,} requests in {took_s:.1f} s, {num_requests / max(took_s, 1e-9):,.0f} a second")
