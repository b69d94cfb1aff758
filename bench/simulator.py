"""How fast the planner's simulator is, on one core.

    python bench/simulator.py [--json] [--requests N] [--trace FILE]

Rows:

    exact_requests_per_s_8w    simulated requests per second: 8 workers, every engine step through the real scheduler

Traffic is a trace of Azure's conversations if one is given, else synthetic of the same statistics. The profile is made
up, of the order of an 8-billion-parameter model on a large GPU; the rate loads the cluster to about four fifths.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from _cluster import Row, row

from pdserve.cluster.config import ClusterConfig
from pdserve.cluster.planner.profile import (
    DecodeRegion,
    Domain,
    LinkCost,
    Overheads,
    PrefillRegion,
    Profile,
    Range,
)
from pdserve.cluster.planner.simulation import Outcome, simulate
from pdserve.cluster.planner.workload import parse_workload
from pdserve.proto.types import Role

RATE = 110.0
NUM_PREFILL, NUM_DECODE = 4, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--trace", type=Path, help="azure_2023_conv.csv or another one")
    arguments = parser.parse_args()
    workload = "azure-conv" if arguments.trace is None else f"trace:{arguments.trace}"
    found = exact_row(workload, arguments.requests)
    text = f"{found['name']:>26} {found['value']:>10} {found['unit']:<11} {found['note']}"
    print(json.dumps(found) if arguments.json else text, flush=True)


def exact_row(workload: str, num_requests: int) -> Row:
    profile = made_up_profile()
    source = parse_workload(workload).for_model(profile.max_model_len).source(RATE, 0, num_requests)
    started_s = time.process_time()
    outcome = simulate(config(), dict.fromkeys(Role, profile), source)
    value = num_requests / (time.process_time() - started_s)
    return row("exact_requests_per_s_8w", value, "requests/s", 1500.0, value >= 1500.0, describe(workload, outcome))


def describe(workload: str, outcome: Outcome) -> str:
    busy = {name: busy_s / outcome.end_s for name, busy_s in outcome.busy_s.items()}
    shares = {role: [busy[name] for name in busy if name.startswith(role)] for role in ("prefill", "decode")}
    words = ", ".join(f"{role} workers busy {sum(found) / len(found):.0%}" for role, found in shares.items())
    num_failed = sum(bool(record.failure) for record in outcome.records)
    tokens = sum(record.num_output_tokens for record in outcome.records) / len(outcome.records)
    return f"{workload} at {RATE:g}/s, {tokens:.0f} tokens a request; {words}; {num_failed} failed"


def config() -> ClusterConfig:
    engine = {"max_num_batched_tokens": 2048, "max_num_seqs": 256}
    pools = {"prefill": {"replicas": NUM_PREFILL}, "decode": {"replicas": NUM_DECODE}}
    return ClusterConfig.model_validate({"model": "simulated", "engine": engine, **pools})


def made_up_profile() -> Profile:
    wide = Range(smallest=0, largest=1e9)
    return Profile(
        format=1,
        name="made up",
        model="8B",
        hardware="a large GPU",
        source="predicted",
        origin="of the right order",
        num_gpus=1,
        kv_bytes_per_token=131_072,
        kv_capacity_tokens=400_000,
        max_model_len=32_768,
        prefill=(PrefillRegion(num_samples=0, fixed_s=0.006, per_token_s=2.2e-5, per_pair_s=1e-10),),
        decode=(DecodeRegion(num_samples=0, fixed_s=0.008, per_sequence_s=3e-5, per_context_token_s=4.5e-8),),
        domain=Domain(chunk_tokens=wide, context_tokens=wide, decode_batch=wide, decode_context_tokens=wide),
        links={"nccl": LinkCost(latency_s=1e-4, bandwidth_bytes_per_s=5e10)},
        overheads=Overheads(request_s=0.003, handoff_s=0.001, token_s=0.001),
        startup_s=60.0,
        flip_s=1.0,
    )


if __name__ == "__main__":
    main()
