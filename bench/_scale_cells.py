"""10,000 simulated GPUs as cells of one size or another: what a request sees there, and what one lost worker costs.

Cells share nothing but the traffic, which is split among them at random or by turns, so that each is simulated by
itself and a sample of them stands for all. Knows nothing of what the control plane of a cell costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from simulator import made_up_profile

from pdserve.cluster.config import ClusterConfig
from pdserve.cluster.planner.profile import DecodeRegion, PrefillRegion, Profile
from pdserve.cluster.planner.simulation import simulate
from pdserve.cluster.planner.steering import Fail, Script
from pdserve.cluster.planner.virtual_router import Record
from pdserve.cluster.planner.workload import parse_workload
from pdserve.proto.types import SLO, Role

NUM_GPUS = 10_000
SLO_HELD = SLO(1000.0, 40.0)
PREFILL_SHARE = 0.75
NUM_PROCESSES = 2
SETTLED = 0.5
"""Requests that come before such a part of the time meet a cell that is still filling up; they are not counted."""

LAST_S = 1.0
"""Nor are those of the last moment, after which nobody comes."""


@dataclass(frozen=True, slots=True)
class CellRun:
    """One cell for `seconds`. `lost` are workers that die when the counting begins and do not come back."""

    size: int
    rate_per_gpu: float
    seconds: float
    seed: int
    trace: Path | None = None
    split: str = "random"
    lost: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Seen:
    """Of the requests that were counted: how many, how many met the target, and the latencies of those that ended.

    `num_failed` is of all: those that a lost worker takes along came before.
    """

    num_requests: int
    num_good: int
    num_failed: int
    ttft_ms: NDArray[np.float64]
    tpot_ms: NDArray[np.float64]

    @property
    def attainment(self) -> float:
        return self.num_good / max(1, self.num_requests)

    def describe(self) -> str:
        ttft, tpot = (np.percentile(values, (50, 99)) for values in (self.ttft_ms, self.tpot_ms))
        return (
            f"{self.num_requests:,} requests; TTFT p50 {ttft[0]:.0f} p99 {ttft[1]:.0f} ms, "
            f"TPOT p50 {tpot[0]:.1f} p99 {tpot[1]:.1f} ms"
        )


def num_prefill(size: int) -> int:
    return round(PREFILL_SHARE * size)


def run_all(runs: Sequence[CellRun]) -> Iterator[Seen]:
    """Each in turn, some at a time, in the order given."""
    with ProcessPoolExecutor(NUM_PROCESSES) as pool:
        yield from pool.map(run_cell, runs)


def run_cell(run: CellRun) -> Seen:
    profile = large_model_profile()
    rate = run.rate_per_gpu * run.size
    workload = parse_workload(traffic(run)).for_model(profile.max_model_len)
    source = workload.source(rate, run.seed, round(rate * run.seconds))
    first_s, last_s = SETTLED * run.seconds, run.seconds - LAST_S
    steering = Script((first_s, Fail(worker_id)) for worker_id in run.lost)
    outcome = simulate(config(run.size), dict.fromkeys(Role, profile), source, steering=steering)
    counted = seen(record for record in outcome.records if first_s <= record.arrival.at_s < last_s)
    return replace(counted, num_failed=sum(bool(record.failure) for record in outcome.records))


def traffic(run: CellRun) -> dict[str, Any]:
    """What one of the cells gets of Poisson arrivals: again such, or, by turns, every n-th of them (gamma gaps)."""
    num_cells = NUM_GPUS // run.size
    arrivals = "poisson" if run.split == "random" else f"gamma:{num_cells**-0.5}"
    if run.trace is None:
        return {"preset": "azure-conv", "arrivals": arrivals}
    return {"kind": "synthetic", "lengths": str(run.trace), "arrivals": arrivals}


def seen(records: Iterable[Record]) -> Seen:
    num_requests = num_good = 0
    ttft_ms, tpot_ms = list[float](), list[float]()
    for record in records:
        timing = record.timing()
        num_requests += 1
        num_good += not record.failure and timing.meets(SLO_HELD)
        if not record.failure:
            ttft_ms.append(timing.ttft_ms() or 0.0)
            tpot_ms.append(timing.tpot_ms() or 0.0)
    return Seen(num_requests, num_good, 0, np.array(ttft_ms), np.array(tpot_ms))


def together(some: Sequence[Seen]) -> Seen:
    """Several cells as one."""
    return Seen(
        sum(one.num_requests for one in some),
        sum(one.num_good for one in some),
        sum(one.num_failed for one in some),
        np.concatenate([one.ttft_ms for one in some]),
        np.concatenate([one.tpot_ms for one in some]),
    )


def config(size: int) -> ClusterConfig:
    engine = {"max_num_batched_tokens": 2048, "max_num_seqs": 256}
    pools = {"prefill": {"replicas": num_prefill(size)}, "decode": {"replicas": size - num_prefill(size)}}
    router = {"max_inflight_requests": 1_000_000}
    return ClusterConfig.model_validate({"model": "simulated", "engine": engine, "router": router, **pools})


def large_model_profile() -> Profile:
    """Made up: of the order of a 70-billion-parameter model in 8 bits on one GPU of 141 GB."""
    return replace_costs(
        made_up_profile(),
        PrefillRegion(num_samples=0, fixed_s=0.018, per_token_s=1.4e-4, per_pair_s=5e-10),
        DecodeRegion(num_samples=0, fixed_s=0.018, per_sequence_s=6e-5, per_context_token_s=4.3e-8),
    )


def replace_costs(profile: Profile, prefill: PrefillRegion, decode: DecodeRegion) -> Profile:
    changes = {"prefill": (prefill,), "decode": (decode,), "model": "70B", "kv_bytes_per_token": 163_840}
    return profile.model_copy(update={**changes, "kv_capacity_tokens": 360_000})


def seeds(run: CellRun, num_cells: int) -> list[CellRun]:
    """Cells of one kind that differ in what comes."""
    return [replace(run, seed=seed) for seed in range(num_cells)]
