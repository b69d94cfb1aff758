"""`pdserve bench`: open-loop load against a running router, and what came of it.

Chooses the plan and shows the report; sending is `load`, plans are `arrivals` and `trace`, sums `load_report`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pdserve.client import AsyncClient
from pdserve.cluster import command_options as options
from pdserve.cluster.arrivals import WORKLOADS, Arrival, Lengths, PromptMaker, Survey, Workload, survey, synthesize
from pdserve.cluster.interruptible import run_interruptible
from pdserve.cluster.load import ClientExchange, LoadGenerator, LoadResult, RequestRecord
from pdserve.cluster.load_report import LoadReport, render, summarize
from pdserve.cluster.state import resolve_endpoint
from pdserve.cluster.trace import Trace, TraceOptions, parse_window
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import SLO

DEFAULT_NUM_PROMPTS = 100


@dataclass(frozen=True, slots=True)
class Plan:
    """Arrivals that can be gone through again: once to survey them, once to send them."""

    source: Workload | Trace
    num_requests: int | None
    seed: int

    def arrivals(self) -> Iterable[Arrival]:
        if isinstance(self.source, Trace):
            return itertools.islice(self.source, self.num_requests)
        num_requests = DEFAULT_NUM_PROMPTS if self.num_requests is None else self.num_requests
        return synthesize(self.source, num_requests, np.random.default_rng(self.seed))


def bench(
    endpoint: options.Endpoint = None,
    name: options.Name = "local",
    workload: Annotated[str, typer.Option(help=f"Synthetic traffic: {', '.join(WORKLOADS)}.")] = "short",
    trace: Annotated[
        Path | None, typer.Option(help="Trace to replay instead: Azure or BurstGPT CSV, Mooncake JSONL; .gz too.")
    ] = None,
    request_rate: Annotated[
        float | None, typer.Option(help="Mean requests per second; default: the workload's.")
    ] = None,
    burstiness: Annotated[
        float | None, typer.Option(help="Shape of gamma gaps; 1 is Poisson, less is burstier.")
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Requests to send; default: 100, or all of a trace.")
    ] = None,
    input_len: Annotated[int | None, typer.Option(min=1, help="Prompt length in place of the workload's.")] = None,
    output_len: Annotated[int | None, typer.Option(min=1, help="Answer length in place of the workload's.")] = None,
    rate_scale: Annotated[float, typer.Option(help="Replay a trace this many times faster.")] = 1.0,
    length_scale: Annotated[float, typer.Option(help="Multiply a trace's token counts.")] = 1.0,
    window: Annotated[str | None, typer.Option(help="Part of a trace, as START:END in its seconds.")] = None,
    spread_s: Annotated[
        float, typer.Option(help="Resolution of coarse JSONL time stamps; 0 takes them as they are.")
    ] = 3.0,
    ttft_ms: Annotated[float, typer.Option(min=0, help="Target time to first token.")] = 1000.0,
    tpot_ms: Annotated[float, typer.Option(min=0, help="Target time per output token after the first.")] = 100.0,
    max_concurrency: Annotated[int, typer.Option(min=1, help="Safety cap on requests in flight.")] = 1024,
    seed: Annotated[int, typer.Option(min=0, help="Of the plan and the prompts.")] = 0,
    timeout_s: options.TimeoutS = 600.0,
    as_json: options.Json = False,
) -> None:
    """Send open-loop load and report latency, throughput and goodput.

    Latency counts from the scheduled send time. Prompts are random tokens. Exit status 1 when nothing completed.
    """
    if trace is not None:
        _refuse_with_trace(request_rate=request_rate, burstiness=burstiness, input_len=input_len, output_len=output_len)
        bounds_s = parse_window(window) if window is not None else (0.0, math.inf)
        source: Workload | Trace = Trace(trace, TraceOptions(rate_scale, bounds_s, spread_s, length_scale))
    else:
        source = choose_workload(workload, request_rate, burstiness, input_len, output_len)
    plan = Plan(source, num_prompts, seed)
    planned = survey(plan.arrivals())  # a bad line in a trace ends the command here, not in the middle of the load
    target = resolve_endpoint(endpoint, name)
    work = _send(plan, planned, target, max_concurrency=max_concurrency, timeout_s=timeout_s)
    with asyncio.Runner() as runner:
        result = run_interruptible(runner, work)
    report = summarize(result, SLO(ttft_ms, tpot_ms), source.num_skipped if isinstance(source, Trace) else 0)
    _show(report, as_json)
    raise typer.Exit(0 if report.num_completed else 1)


def choose_workload(
    name: str, rate: float | None, burstiness: float | None, input_len: int | None, output_len: int | None
) -> Workload:
    """A preset with what was given in place of its own.

    Raises:
        ConfigError: no such preset.
    """
    if name not in WORKLOADS:
        raise ConfigError(f"--workload: {name!r} is none of {', '.join(WORKLOADS)}")
    chosen = WORKLOADS[name]
    return replace(
        chosen,
        rate=chosen.rate if rate is None else rate,
        burstiness=chosen.burstiness if burstiness is None else burstiness,
        prompt=chosen.prompt if input_len is None else Lengths(input_len, input_len),
        output=chosen.output if output_len is None else Lengths(output_len, output_len),
    )


def _refuse_with_trace(**given: object) -> None:
    """A trace has its own times and lengths."""
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: has no meaning with --trace")


async def _send(plan: Plan, planned: Survey, endpoint: str, *, max_concurrency: int, timeout_s: float) -> LoadResult:
    async with AsyncClient(endpoint, timeout_s=timeout_s) as client:
        model = await client.model_info()
        prompts = PromptMaker(model.vocab_size, model.eos_token_ids, plan.seed)
        columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
            bar = progress.add_task("requests", total=planned.num_requests)

            def on_done(record: RequestRecord) -> None:
                progress.advance(bar)

            generator = LoadGenerator(
                ClientExchange(client, timeout_s),
                prompts,
                max_model_len=model.max_model_len,
                max_concurrency=max_concurrency,
                on_done=on_done,
            )
            return await generator.run(plan.arrivals())


def _show(report: LoadReport, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(report)))
        return
    console = Console()
    for table in render(report):
        console.print(table)
    if report.first_error:
        typer.echo(f"first error: {' '.join(report.first_error.split())}", err=True)
