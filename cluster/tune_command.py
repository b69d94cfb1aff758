"""`pdserve tune`: how many prefill, decode and mixed workers, run how, and whether to split at all.

Reads what was asked, shows how far it is, and shows and writes the answer; finding it is `planner.tuning`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from pdserve.cluster import command_options as options
from pdserve.cluster import tune_options as asked
from pdserve.cluster.interruptible import end_as_if_interrupted
from pdserve.cluster.planner.describe import describe_arrivals
from pdserve.cluster.planner.findings import Answer, Target
from pdserve.cluster.planner.fleets import Fleet, Limit, fleets_of, parse_split
from pdserve.cluster.planner.profile import Profile
from pdserve.cluster.planner.search import EFFORTS
from pdserve.cluster.planner.setup_config import deadline_s
from pdserve.cluster.planner.setups import Choices
from pdserve.cluster.planner.tuning import Request, candidates
from pdserve.cluster.planner.tuning import tune as find
from pdserve.cluster.planner.workload_spec import WorkloadSpec
from pdserve.cluster.profile_files import read_profile
from pdserve.cluster.report_html import require_report, write_report
from pdserve.cluster.simulation_sums import check_known
from pdserve.cluster.tune_jobs import Problem
from pdserve.cluster.tune_pool import Told, evaluator, usable_cores
from pdserve.cluster.tune_report import lines, plain, render, write_best
from pdserve.cluster.tune_targets import check_classes, targets_of
from pdserve.cluster.whole_files import require_writable
from pdserve.cluster.workload_files import course_warnings, first_ones, read_workload, share_beyond
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import Role

PAPER_COLUMNS = 160
"""Of what is not shown on a terminal."""


KV_MARGIN = 64
"""Tokens of a worker's memory that the longest request leaves: a block that is begun, and what a step takes ahead."""


def tune(
    profile: asked.Profiles,
    workload: asked.Workload = "azure-conv",
    gpus: Annotated[float | None, typer.Option(help="GPUs to share out; workers, where these have none.")] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="Money to share out, instead of --gpus.")] = None,
    price_per_gpu_hour: asked.PricePerGpuHour = None,
    ttft_ms: Annotated[float | None, typer.Option(help="Target time to first token.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="Target time per output token after the first.")] = None,
    attainment: Annotated[float, typer.Option(help="Share of requests that are to meet both targets.")] = 0.9,
    slo: asked.Slo = None,
    splits: Annotated[str, typer.Option(help="all, or some: 2P6D,8M,2P5D1M.")] = "all",
    chunk_sizes: Annotated[str | None, typer.Option(help="Prefill tokens of a step, to choose from.")] = None,
    max_num_seqs: Annotated[str | None, typer.Option(help="Running sequences of a worker, to choose from.")] = None,
    policies: Annotated[str | None, typer.Option(help="Router policies to choose from; default: all.")] = None,
    effort: asked.Effort = "normal",
    max_requests: asked.MaxRequests = None,
    processes: asked.Processes = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same answer.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write a report with plots.")] = None,
    write_config: asked.WriteConfig = None,
    model: Annotated[str | None, typer.Option(help="Model in the written file; default: the profile's.")] = None,
    as_json: options.Json = False,
) -> None:
    """Find the best set-up for a workload and its targets: split or not, how many of each, and how to run them.

    Exit status 1 when no set-up can hold the targets.
    """
    end_as_if_interrupted()
    targets = targets_of(slo or [], ttft_ms, tpot_ms, attainment)
    limit = Limit(gpus, price_per_hour, price_per_gpu_hour)
    limit.check()
    if effort not in EFFORTS:
        raise ConfigError(f"--effort: {effort!r} is none of {', '.join(EFFORTS)}")
    choices = _choices(splits, chunk_sizes, max_num_seqs, policies)
    _check_files(html, write_config)
    fleets = _fleets(profile)
    spec, looks = _look_at(workload, fleets, targets)
    amount = EFFORTS[effort] if max_requests is None else replace(EFFORTS[effort], max_requests=max_requests)
    request = Request(
        fleets=fleets,
        limit=limit,
        choices=choices,
        targets=targets,
        workload=workload,
        mean_prompt=looks.mean_prompt,
        mean_output=looks.mean_output,
        effort=amount,
        seed=seed,
        least_timeout_s=deadline_s(targets, looks.longest_output),
        notes=looks.notes,
    )
    candidates(request)  # what cannot be made is said before processes start
    answer = _ask(request, spec, processes or usable_cores(), is_quiet=as_json or not sys.stderr.isatty())
    _show(answer, as_json)
    if html is not None:
        write_report(answer, html)
    if write_config is not None and answer.recommended is not None:
        name = model or next(iter(request.profiles.values())).model
        write_best(answer, request.profiles, name, write_config, request.least_timeout_s)
    raise typer.Exit(0 if answer.recommended is not None else 1)


def _check_files(html: Path | None, write_config: Path | None) -> None:
    if html is not None:
        require_report(html)
    if write_config is not None:
        require_writable("--write-config", write_config)


def _choices(splits: str, chunk_sizes: str | None, max_num_seqs: str | None, policies: str | None) -> Choices:
    default = Choices()
    choices = Choices(
        chunk_sizes=default.chunk_sizes if chunk_sizes is None else _sizes("--chunk-sizes", chunk_sizes),
        max_num_seqs=default.max_num_seqs if max_num_seqs is None else _sizes("--max-num-seqs", max_num_seqs),
        policies=default.policies if policies is None else tuple(dict.fromkeys(policies.split(","))),
        splits=None if splits == "all" else tuple(splits.split(",")),
    )
    choices.check()
    for text in choices.splits or ():
        parse_split(text)
    return choices


def _sizes(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ConfigError(f"{option}: {text!r}: give whole numbers such as 512,1024") from None


def _fleets(written: list[str]) -> tuple[Fleet, ...]:
    common: list[Profile] = []
    by_role: dict[Role, list[Profile]] = {}
    for text in written:
        name, separator, path = text.partition("=")
        if separator and name in list(Role):
            by_role.setdefault(Role(name), []).append(read_profile(path))
        else:
            common.append(read_profile(text))
    return fleets_of(common, by_role)


@dataclass(frozen=True, slots=True)
class _Looks:
    """What the first requests of a workload are like, in tokens."""

    mean_prompt: float
    mean_output: float
    longest_output: int
    notes: tuple[str, ...]


def _look_at(workload: str, fleets: tuple[Fleet, ...], targets: tuple[Target, ...]) -> tuple[WorkloadSpec, _Looks]:
    """The workload, cut to what every worker can hold, and its first requests."""
    profiles = [profile for fleet in fleets for profile in fleet.profiles.values()]
    longest = min(min(profile.max_model_len, profile.kv_capacity_tokens - KV_MARGIN) for profile in profiles)
    if longest < 2:
        raise ConfigError("--profile: kv_capacity_tokens leaves no room for a request")
    whole = read_workload(workload).in_whole_courses()
    check_classes(targets, sorted(whole.slo_classes(), key=str))
    check_known(targets, whole.slo_classes())
    spec = whole.for_model(longest)
    arrivals, cut = first_ones(spec), share_beyond(whole, longest)
    known = describe_arrivals(arrivals)
    notes = (
        f"{cut:.1%} of the requests are longer than what a worker can hold, {longest:,} tokens, and were cut to it",
    )
    return spec, _Looks(
        mean_prompt=known.prompt_tokens / known.num_requests,
        mean_output=known.output_tokens / known.num_requests,
        longest_output=max(one.max_tokens for one in arrivals),
        notes=(*(notes if cut else ()), *course_warnings(spec)),
    )


def _ask(request: Request, spec: WorkloadSpec, num_processes: int, is_quiet: bool) -> Answer:
    problem = Problem(request.profiles, spec, request.targets, request.least_timeout_s)
    started_s = time.perf_counter()
    with _progress(request.effort.max_requests, is_quiet) as told, evaluator(problem, num_processes, told) as evaluate:
        answer = find(request, evaluate)
    return replace(answer, took_s=time.perf_counter() - started_s)


@contextmanager
def _progress(most_requests: int, is_quiet: bool) -> Iterator[Told]:
    """A bar of requests on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of at most {task.total:,.0f} requests"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=is_quiet, transient=True) as bar:
        task = bar.add_task("looking at the workload", total=most_requests)
        yield lambda stage, num_requests: bar.update(task, description=stage, advance=num_requests)


def _show(answer: Answer, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(plain(answer)))
        return
    console = Console() if sys.stdout.isatty() else Console(width=PAPER_COLUMNS)
    console.print(render(answer))
    for line in lines(answer):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
