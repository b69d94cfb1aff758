"""`pdserve validate`: the same requests through real clusters and through the simulator, and how far apart they end.

Checks what was asked for, starts the clusters, and shows the table; both sides of one point are `validation_point`'s.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pdserve.cluster import command_options as options
from pdserve.cluster import launch
from pdserve.cluster.arrivals import Arrival
from pdserve.cluster.config import DEFAULT_CONFIG, ClusterConfig, load_config
from pdserve.cluster.interruptible import run_interruptible
from pdserve.cluster.planner.profile import Profile
from pdserve.cluster.planner.source import drain
from pdserve.cluster.planner.workload_spec import WorkloadSpec
from pdserve.cluster.profile_files import other_model, read_profiles
from pdserve.cluster.profiling_clusters import running
from pdserve.cluster.session_groups import warn_of_starved_clients
from pdserve.cluster.validation import Comparison, Point, compare, orders
from pdserve.cluster.validation_point import Judgement, both_sides
from pdserve.cluster.validation_report import render
from pdserve.cluster.validation_run import warm_up
from pdserve.cluster.validation_setups import set_up_config
from pdserve.cluster.workload_files import read_workload
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import SLO, Role

DEFAULT_WORKLOAD = "synthetic?prompt=256&output=32"
MIN_JUDGED = 10
PROMPT_SEEDS = 10_000


def validate(
    profile: Annotated[
        list[str],
        typer.Option(help="Profile of the workers: a JSON file or a shipped one's name; ROLE=... for one role."),
    ],
    config: Annotated[Path, typer.Option("--config", "-c", help="Cluster configuration (YAML).")] = DEFAULT_CONFIG,
    override: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    setup: Annotated[
        list[str] | None, typer.Option(help="Workers, as 2M, 1P1D or 1P1D1M; may be repeated. Default: the file's.")
    ] = None,
    workload: Annotated[
        list[str] | None, typer.Option(help=f"As of `simulate`; may be repeated. Default: {DEFAULT_WORKLOAD}.")
    ] = None,
    request_rate: Annotated[
        list[float] | None, typer.Option(help="Mean requests per second; may be repeated. Default: the workload's.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests of one run.")] = 200,
    warm_up_prompts: Annotated[
        int | None, typer.Option("--warm-up", min=0, help="The first of them, not judged; default: a tenth.")
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Runs of each point, with seeds of their own; medians count.")
    ] = 1,
    refit: Annotated[
        bool, typer.Option("--refit", help="Take step times from the measured run itself: judges the simulator alone.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit status 1 when a figure is off by more than allowed.")
    ] = False,
    ttft_ms: Annotated[float, typer.Option(min=0, help="Target time to first token.")] = 1000.0,
    tpot_ms: Annotated[float, typer.Option(min=0, help="Target time per output token after the first.")] = 100.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the first run's workload and prompts.")] = 0,
    timeout_s: options.TimeoutS = 600.0,
    as_json: options.Json = False,
) -> None:
    """Run real clusters and the simulator on the same requests and show how far apart they are.

    Needs as many quiet cores as the configuration has workers, and some for router and clients.
    """
    settings = load_config(config, override or [])
    launch.check_model_dir(Path(settings.model))
    skipped = num_prompts // 10 if warm_up_prompts is None else warm_up_prompts
    if num_prompts - skipped < MIN_JUDGED:
        raise ConfigError(f"--num-prompts: {num_prompts} less {skipped} leave fewer than {MIN_JUDGED} to judge")
    judgement = Judgement(SLO(ttft_ms, tpot_ms), skipped, refit, timeout_s)
    asked = _Asked(workload or [DEFAULT_WORKLOAD], request_rate or [], range(seed, seed + repeats), num_prompts)
    plans = [_plan(set_up_config(settings, name), name, profile, asked) for name in setup or [""]]
    warn_of_starved_clients()
    found = [comparison for plan in plans for comparison in _validate_set_up(plan, judgement, seed)]
    _show(found, as_json)
    raise typer.Exit(1 if strict and not all(comparison.is_within for comparison in found) else 0)


@dataclass(frozen=True, slots=True)
class _Asked:
    """The points of every set-up. Without rates each workload comes at its own."""

    workloads: Sequence[str]
    rates: Sequence[float]
    seeds: Sequence[int]
    num_prompts: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """One set-up, and its points with the requests of each repeat: all is known before anything starts."""

    settings: ClusterConfig
    by_role: dict[Role, Profile]
    runs: Sequence[tuple[Point, list[list[Arrival]]]]


def _plan(settings: ClusterConfig, name: str, profile: list[str], asked: _Asked) -> _Plan:
    by_role = read_profiles(profile, settings)
    longest = min(known.max_model_len for known in by_role.values())
    if words := other_model(by_role.values(), settings):
        name_it = f"--set served_model_name={next(iter(by_role.values())).model}"
        raise ConfigError(f"--profile: {words}; profile that model, or, if they are the same, {name_it}")
    label, runs = _label(name, settings), []
    for text in asked.workloads:
        spec = read_workload(text)
        for rate in _rates(text, spec, asked.rates):
            repeats = [_requests(spec, longest, rate, seed, asked.num_prompts) for seed in asked.seeds]
            runs.append((Point(label, text, rate), repeats))
    return _Plan(settings, by_role, runs)


def _rates(text: str, spec: WorkloadSpec, asked: Sequence[float]) -> Sequence[float]:
    if asked:
        for rate in asked:
            if not (math.isfinite(rate) and rate > 0):
                raise ConfigError(f"--request-rate: {rate!r} is not a positive number of requests per second")
        return asked
    own = spec.own_rate()
    if own is None:
        raise ConfigError(f"--workload: {text}: has no rate of its own; give --request-rate")
    return [own]


def _requests(spec: WorkloadSpec, max_model_len: int, rate: float, seed: int, num_prompts: int) -> list[Arrival]:
    """Raises ConfigError for conversations: when a turn comes depends there on who answers."""
    arrivals = list(drain(spec.for_model(max_model_len).source(rate, seed, num_prompts)))
    if any(arrival.session is not None for arrival in arrivals):
        raise ConfigError("--workload: sessions wait for their answers, so both sides would not get the same requests")
    return arrivals


def _label(name: str, settings: ClusterConfig) -> str:
    counts = ((role, settings.replicas(role)) for role in Role)
    return name.upper() or "".join(f"{count}{role[0].upper()}" for role, count in counts if count)


def _validate_set_up(plan: _Plan, judgement: Judgement, seed: int) -> list[Comparison]:
    found: list[Comparison] = []
    console = Console(stderr=True)
    # The same prompts again would be found in the prefix cache, which the simulation begins without.
    prompt_seeds = itertools.count(PROMPT_SEEDS * (seed + 1))
    with (
        console.status("starting") as spinner,
        running(plan.settings, spinner.update) as cluster,
        asyncio.Runner() as runner,
    ):
        run_interruptible(runner, warm_up(cluster, plan.runs[0][1][0], judgement.timeout_s))
        for point, repeats in plan.runs:
            spinner.update(f"{point.setup}, {point.workload} at {point.rate:g}/s")
            sides = [
                run_interruptible(
                    runner, both_sides(cluster, plan.settings, plan.by_role, arrivals, judgement, next(prompt_seeds))
                )
                for arrivals in repeats
            ]
            real, simulated = [side.real for side in sides], [side.simulated for side in sides]
            found.append(compare(point, real, simulated, [side.step_error for side in sides]))
    return found


def _show(found: list[Comparison], as_json: bool) -> None:
    ranked = orders(found)
    if as_json:
        points = [asdict(one) | {"is_within": one.is_within} for one in found]
        typer.echo(json.dumps({"points": points, "orders": [asdict(order) for order in ranked]}))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    for part in render(found, ranked):
        console.print(part, highlight=False)
