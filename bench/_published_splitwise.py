"""Splitwise (ISCA'24): which part of a fleet prefills, for code and for conversation.

Its clusters were simulated from the same table of step times, with splits in steps of 5 in 40 machines (8 GPUs each);
here it is 1 in 8 machines, 2 in 16 with more effort. Its SLO is nine slowdowns against a lone request on a DGX-A100,
and so it is here: percentiles 50, 90 and 99 of TTFT, TPOT and the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from _cluster import Row, row
from _published import SEED, Effort, best, each, fleet, guesses, listed

from pdserve.cluster.planner.findings import Setup, Target
from pdserve.cluster.planner.profile import Profile
from pdserve.cluster.planner.step_model import StepModel
from pdserve.cluster.planner.step_shape import StepShape, chunk_pairs
from pdserve.cluster.planner.virtual_router import Record
from pdserve.cluster.planner.workload import parse_workload
from pdserve.cluster.tune_jobs import Problem, run_once
from pdserve.proto.types import Role

FILE = "splitwise_sim_perf_model.csv.gz"
QUANTILES = (0.5, 0.9, 0.99)
TTFT_SLOWDOWNS, TOKEN_SLOWDOWNS = (2.0, 3.0, 6.0), (1.25, 1.5, 5.0)
"""Of TTFT; of the time between tokens and of the whole. notebooks/plots.ipynb, `get_slo`."""

# Code: lognormal through the 50th and 90th percentile of Azure's code trace, which is not among the public files here;
# both traces of the paper draw prompts and outputs apart, with Poisson arrivals.
CODE = "synthetic?prompt=1469/5188&output=13/55"
CONVERSATION = "synthetic?prompt=1020/2734&output=129/424"

GRID = 0.125
"""The paper's: 5 of 40. A share that is one step off is the same answer."""

# Prefill share of machines: 35P5T and 25P15T of 40 DGX-H100; 54P10T and 45P25T of DGX-A100.
PUBLISHED = {
    ("h100-80gb", "code"): (35 / 40, "35P5T of 40"),
    ("h100-80gb", "conv"): (25 / 40, "25P15T of 40"),
    ("a100-80gb", "code"): (54 / 64, "54P10T of 64"),
    ("a100-80gb", "conv"): (45 / 70, "45P25T of 70"),
}
FLEETS = (("bloom-176b", "h100-80gb"), ("bloom-176b", "a100-80gb"), ("llama2-70b", "h100-80gb"))
PUBLISHED_MODEL = "bloom-176b"
"""The model of the repository's configurations; which one the 40 machines of the paper serve was not noted."""

HOPELESS = 0.65
LARGE_RUN = 10_000
WARMUP_PART = 1 / 3
STEP, NARROW = 1.25, 1.06
MAX_RUNS = 16


@dataclass(frozen=True, slots=True)
class Job:
    """One split under one traffic; `alone` is the worker that slowdowns are measured against."""

    setup: Setup
    problem: Problem
    alone: Profile
    start_rate: float
    num_requests: int


def rows(profiles: Mapping[str, Profile], effort: Effort) -> list[Row]:
    return [found for model, gpu in FLEETS for found in fleet_rows(profiles, model, gpu, effort)]


def fleet_rows(profiles: Mapping[str, Profile], model: str, gpu: str, effort: Effort) -> list[Row]:
    """The share of machines that prefill for each traffic, and that it is larger for code."""
    found, shares = list[Row](), dict[str, float]()
    suffix = f"{model.partition('-')[0]}_{gpu.partition('-')[0]}"
    for traffic, text in (("code", CODE), ("conv", CONVERSATION)):
        target, words = PUBLISHED[gpu, traffic]
        rates = split_rates(profiles, model, gpu, text, effort, target)
        by_name = {name: rate for name, (_, rate) in rates.items()}
        chosen = best(by_name)
        shares[traffic] = rates[chosen][0]
        is_close = abs(shares[traffic] - on_grid(target)) <= GRID + 1e-9
        note = f"{chosen} at {by_name[chosen]:.1f}/s; published {words}; {listed(by_name)}"
        name = f"splitwise_{traffic}_prefill_share_{suffix}"
        is_published = model == PUBLISHED_MODEL
        found.append(
            row(
                name,
                shares[traffic],
                "share",
                round(target, 3) if is_published else None,
                is_close if is_published else None,
                note,
            )
        )
    difference = shares["code"] - shares["conv"]
    published = PUBLISHED[gpu, "code"][0] - PUBLISHED[gpu, "conv"][0]
    note = "code needs more prefill"
    over = row(f"splitwise_code_over_conv_{suffix}", difference, "share", round(published, 3), difference > 0, note)
    return [*found, over]


def on_grid(share: float) -> float:
    """The split of ours that is nearest."""
    return round(share / GRID) * GRID


def split_rates(
    profiles: Mapping[str, Profile], model: str, gpu: str, text: str, effort: Effort, published: float
) -> dict[str, tuple[float, float]]:
    """The prefill share and the highest rate of the published split, and of each that is not hopeless by its mean
    lengths."""
    profile, alone = profiles[f"{model}-{gpu}-tp8"], profiles[f"{model}-a100-80gb-tp8"]
    workload = parse_workload(text).for_model(profile.max_model_len)
    num_machines = 8 if effort.num_requests < LARGE_RUN else 16
    setups = [
        fleet({Role.PREFILL: (profile, number), Role.DECODE: (profile, num_machines - number)}, num_seqs=512)
        for number in range(1, num_machines)
    ]
    target = Target("all", 1e3, TOKEN_SLOWDOWNS[0] * lone_tpot_s(StepModel(alone), 1000, 200) * 1e3, 0.9)
    starts = guesses(setups, {profile.name: profile}, workload, target.tpot_ms)
    problem = Problem({profile.name: profile}, workload, (target,))
    shares = [setup.num_workers[Role.PREFILL] / num_machines for setup in setups]
    jobs = {
        setup.name: (share, Job(setup, problem, alone, start, effort.num_requests))
        for setup, start, share in zip(setups, starts, shares, strict=True)
        if start >= HOPELESS * max(starts) or abs(share - on_grid(published)) < GRID / 4
    }
    rates = each(highest_rate, [job for _, job in jobs.values()])
    return {name: (share, rate) for (name, (share, _)), rate in zip(jobs.items(), rates, strict=True)}


def highest_rate(job: Job) -> float:
    """The highest at which all nine slowdowns hold, to a few percent; all runs bring the same requests."""
    low, high, rate = 0.0, math.inf, job.start_rate
    for _ in range(MAX_RUNS):
        outcome = run_once(job.setup, job.problem, rate, SEED, job.num_requests)
        if stretch(outcome.records, job.alone) <= 1.0:
            low = rate
        else:
            high = rate
        if high <= NARROW * low:
            break
        rate = low * STEP if high == math.inf else high / STEP if low == 0.0 else math.sqrt(low * high)
    return low


def stretch(records: Sequence[Record], alone: Profile) -> float:
    """How far the worst of the nine slowdowns is from its limit; 1 just holds."""
    model = StepModel(alone)
    judged = sorted(records, key=lambda record: record.arrival.at_s)[round(WARMUP_PART * len(records)) :]
    ratios = np.array([slowdowns(record, model) for record in judged])
    worst = 0.0
    for column, limits in enumerate((TTFT_SLOWDOWNS, TOKEN_SLOWDOWNS, TOKEN_SLOWDOWNS)):
        values = np.quantile(ratios[:, column], QUANTILES, method="higher")
        worst = max(worst, float((values / limits).max()))
    return worst


def slowdowns(record: Record, model: StepModel) -> tuple[float, float, float]:
    """Of TTFT, of the time between tokens and of the whole; a request that failed is infinitely slow."""
    timing, arrival = record.timing(), record.arrival
    ttft_ms, e2e_ms = timing.ttft_ms(), timing.e2e_ms()
    if record.failure or ttft_ms is None or e2e_ms is None:
        return math.inf, math.inf, math.inf
    prompt, output = arrival.num_prompt_tokens, record.num_output_tokens
    first_s = model.duration_s(StepShape(prompt, chunk_pairs(prompt, 0), 0, 0))
    token_s = lone_tpot_s(model, prompt, output)
    tpot_ms = timing.tpot_ms()
    whole_s = first_s + token_s * (output - 1)
    return ttft_ms / first_s / 1e3, 0.0 if tpot_ms is None else tpot_ms / token_s / 1e3, e2e_ms / whole_s / 1e3


def lone_tpot_s(model: StepModel, prompt_tokens: int, output_tokens: int) -> float:
    """Half-way through the output."""
    return model.duration_s(StepShape(0, 0.0, 1, prompt_tokens + output_tokens // 2))
