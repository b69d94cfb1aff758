"""`pdserve validate`: the same requests through real clusters and through the simulator, and how far apart they end.

Checks what was asked for, starts the clusters, and shows the table; both sides of one point are `validation_point`'s.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pdserve.cluster import command_options as options
from pdserve.cluster import launch
from pdserve.cluster.arrivals import Arrival
from pdserve.cluster.config import DEFAULT_CONFIG, ClusterConfig, load_config
from pdserve.cluster.interruptible import end_as_if_interrupted, run_interruptible
from pdserve.cluster.planner.profile import Profile
from pdserve.cluster.planner.source import drain
from pdserve.cluster.planner.workload_spec import WorkloadSpec
from pdserve.cluster.profile_files import other_model, read_profiles
from pdserve.cluster.profiling_clusters import running
from pdserve.cluster.session_groups import warn_of_starved_clients
from pdserve.cluster.simulation_report import cut_notes
from pdserve.cluster.validation import Comparison, Point, compare
from pdserve.cluster.validation_notes import beyond_lines, clipped_lines, missing_lines
from pdserve.cluster.validation_order import Order, orders
from pdserve.cluster.validation_point import Asked, Judgement, Sides, both_sides
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
        bool,
        typer.Option("--strict", help="Exit status 1 when a figure is off by more than allowed, or two set-ups swap."),
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
    end_as_if_interrupted()
    settings = load_config(config, override or [])
    launch.check_model_dir(Path(settings.model))
    skipped = num_prompts // 10 if warm_up_prompts is None else warm_up_prompts
    if num_prompts - skipped < MIN_JUDGED:
        raise ConfigError(f"--num-prompts: {num_prompts} less {skipped} leave fewer than {MIN_JUDGED} to judge")
    judgement = Judgement(SLO(ttft_ms, tpot_ms), skipped, refit, timeout_s)
    seeds = range(seed, seed + repeats)
    traffic = _Traffic(workload or [DEFAULT_WORKLOAD], request_rate or [], seeds, num_prompts, refit)
    plans = [_plan(one, profile, traffic) for one in _set_ups(settings, setup or [""], traffic)]
    warn_of_starved_clients()
    found = _Found(plans)
    try:
        for plan in plans:
            _validate_set_up(plan, judgement, seed, found)
    finally:
        # What took minutes to measure is not lost to what went wrong after it.
        if found.comparisons:
            _show(found, as_json)
    raise typer.Exit(1 if strict and not found.is_right else 0)


def _set_ups(settings: ClusterConfig, names: Sequence[str], traffic: _Traffic) -> list[ClusterConfig]:
    """
    Raises:
        ConfigError: a set-up, a workload or a rate is given twice, however it is written.
    """
    _check_once("--workload", traffic.workloads)
    _check_once("--request-rate", [f"{rate:g}" for rate in traffic.rates])
    configs = [set_up_config(settings, name) for name in names]
    _check_once("--setup", [_label(config) for config in configs])
    return configs


def _check_once(option: str, values: Sequence[str]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ConfigError(f"{option}: {value} is given twice")


@dataclass(frozen=True, slots=True)
class _Traffic:
    """The points of every set-up. Without rates each workload comes at its own. `needs_decodes`: a run without decode
    steps would be of no use."""

    workloads: Sequence[str]
    rates: Sequence[float]
    seeds: Sequence[int]
    num_prompts: int
    needs_decodes: bool


@dataclass(frozen=True, slots=True)
class _Plan:
    """One set-up, and its points with the requests of each repeat: all is known before anything starts."""

    label: str
    settings: ClusterConfig
    by_role: dict[Role, Profile]
    runs: Sequence[tuple[Point, list[list[Arrival]]]]
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Found:
    """What was measured so far, of all that was asked for."""

    plans: Sequence[_Plan]
    comparisons: list[Comparison] = field(default_factory=list)
    ran: list[tuple[Point, Sides]] = field(default_factory=list)

    @property
    def orders(self) -> tuple[Order, ...]:
        return orders(self.comparisons)

    @property
    def is_right(self) -> bool:
        is_close = all(comparison.is_within for comparison in self.comparisons)
        return is_close and not any(order.swapped for order in self.orders)

    def notes(self) -> Iterator[str]:
        for plan in self.plans:
            yield from plan.notes
        yield from clipped_lines((point, sides.real.num_clipped) for point, sides in self.ran)
        yield from beyond_lines((point, sides.beyond) for point, sides in self.ran)
        num_asked = sum(len(repeats) for plan in self.plans for _, repeats in plan.runs)
        yield from missing_lines(len(self.ran), num_asked)

    def add(self, point: Point, repeats: Sequence[Sides]) -> None:
        """A point, or what there is of it."""
        if not repeats:
            return
        self.ran += [(point, sides) for sides in repeats]
        real, simulated = [sides.real for sides in repeats], [sides.simulated for sides in repeats]
        self.comparisons.append(compare(point, real, simulated, [sides.step_error for sides in repeats]))


def _plan(settings: ClusterConfig, profile: list[str], traffic: _Traffic) -> _Plan:
    by_role = read_profiles(profile, settings)
    longest = min(known.max_model_len for known in by_role.values())
    if words := other_model(by_role.values(), settings):
        name_it = f"--set served_model_name={next(iter(by_role.values())).model}"
        raise ConfigError(f"--profile: {words}; profile that model, or, if they are the same, {name_it}")
    label, runs, notes = _label(settings), [], []
    for text in traffic.workloads:
        spec = read_workload(text)
        for rate in _rates(text, spec, traffic.rates):
            repeats = [_requests(spec, longest, rate, seed, traffic.num_prompts) for seed in traffic.seeds]
            if traffic.needs_decodes:
                _check_decodes(text, repeats)
            runs.append((Point(label, text, rate), repeats))
        notes += [f"{label}, {text}: {note}" for note in cut_notes(spec, longest)]
    return _Plan(label, settings, by_role, runs, tuple(notes))


def _check_decodes(text: str, repeats: Iterable[Sequence[Arrival]]) -> None:
    """The first token of an answer is its prompt's."""
    if any(all(arrival.max_tokens <= 1 for arrival in arrivals) for arrivals in repeats):
        raise ConfigError(
            f"--refit: {text}: every answer is one token long, so there is no decode step to take step times from; "
            "give longer answers, or leave --refit out"
        )


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


def _label(settings: ClusterConfig) -> str:
    """The same for whatever was written, as 1M, 1m and 01M are one set-up."""
    counts = ((role, settings.replicas(role)) for role in Role)
    return "".join(f"{count}{role[0].upper()}" for role, count in counts if count)


def _validate_set_up(plan: _Plan, judgement: Judgement, seed: int, found: _Found) -> None:
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
            spinner.update(point.words)
            done: list[Sides] = []
            try:
                for arrivals in repeats:
                    asked = Asked(point, arrivals, next(prompt_seeds))
                    sides = both_sides(cluster, plan.settings, plan.by_role, asked, judgement)
                    done.append(run_interruptible(runner, sides))
            finally:
                found.add(point, done)


def _show(found: _Found, as_json: bool) -> None:
    notes = list(found.notes())
    if as_json:
        points = [asdict(one) | {"is_within": one.is_within} for one in found.comparisons]
        typer.echo(
            json.dumps({"points": points, "orders": [_order_fields(one) for one in found.orders], "notes": notes})
        )
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    for part in render(found.comparisons, found.orders, notes):
        console.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))


def _order_fields(order: Order) -> dict[str, Any]:
    pairs = [asdict(pair) | {"kind": pair.kind} for pair in order.pairs]
    return asdict(order) | {"pairs": pairs, "verdict": order.verdict}
