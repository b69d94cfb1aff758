"""How fast the planner is: its simulator on one core, and a whole `pdserve tune` on all of them.

    python bench/simulator.py [--json] [--requests N] [--trace FILE] [--only ROW]

Rows:

    exact_requests_per_s_8w      simulated requests per second: 8 workers, every token through the real scheduler
    fast_requests_per_s_8w       the same without visiting decodes that only go on
    fast_vs_exact_error          the largest relative difference of any latency between the two, over the same requests
    fast_requests_per_s_1024w    1,024 workers and 128 times the traffic, for as many simulated seconds as it takes
    request_cost_growth          what a request costs there by what it costs with 8 workers
    simulator_growth_bytes       memory that a request leaves behind when records are handed out as they come
    tune_8gpu_s                  `pdserve tune --gpus 8` from the command line, imports and processes and all

Traffic is a trace of Azure's conversations if one is given, else synthetic of the same statistics. The profile is made
up, of the order of an 8-billion-parameter model on a large GPU; the rate loads the cluster to about four fifths.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from _cluster import PDSERVE, Row, row

from pdserve.cluster.config import ClusterConfig
from pdserve.cluster.planner import profile as profiles
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
from pdserve.cluster.planner.virtual_router import Record
from pdserve.cluster.planner.workload import parse_workload
from pdserve.proto.types import Role

RATE_PER_WORKER = 110.0 / 8
NUM_WORKERS, NUM_MANY = 8, 1024
NUM_SHORT_RUNS = 20
TARGET_EXACT, TARGET_FAST, TARGET_TUNE_S, TARGET_ERROR = 1500.0, 10_000.0, 60.0, 0.01
TARGET_GROWTH = 3.3
"""As ten doublings are to three."""

TARGET_GROWTH_BYTES = 100.0
ROW_WIDTH = 26


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--requests", type=int, default=3000, help="with 8 workers; with 1,024 it is twenty times that")
    parser.add_argument("--trace", type=Path, help="azure_2023_conv.csv or another one")
    parser.add_argument("--only", help="one of the rows above")
    arguments = parser.parse_args()
    workload = "azure-conv" if arguments.trace is None else f"trace:{arguments.trace.resolve()}"
    measures: dict[str, Callable[[], list[Row]]] = {
        "exact_requests_per_s_8w": lambda: [speed_row("exact", workload, arguments.requests)],
        "fast_requests_per_s_8w": lambda: [speed_row("fast", workload, arguments.requests)],
        "fast_vs_exact_error": lambda: [error_row(workload, arguments.requests)],
        "fast_requests_per_s_1024w": lambda: many_rows(workload, arguments.requests),
        "simulator_growth_bytes": lambda: [memory_row(workload, arguments.requests)],
        "tune_8gpu_s": lambda: [tune_row(workload)],
    }
    for name, measure in measures.items():
        if arguments.only in (None, name):
            for found in measure():
                text = f"{found['name']:>{ROW_WIDTH}} {found['value']:>10} {found['unit']:<11} {found['note']}"
                print(json.dumps(found) if arguments.json else text, flush=True)


def run(
    workload: str, num_requests: int, num_workers: int = NUM_WORKERS, *, exact: bool = False, seed: int = 0
) -> tuple[Outcome, float]:
    """The outcome and the processor time that it took."""
    profile = made_up_profile()
    rate = RATE_PER_WORKER * num_workers
    source = parse_workload(workload).for_model(profile.max_model_len).source(rate, seed, num_requests)
    started_s = time.process_time()
    outcome = simulate(config(num_workers), dict.fromkeys(Role, profile), source, exact=exact)
    return outcome, time.process_time() - started_s


def speed_row(mode: str, workload: str, num_requests: int) -> Row:
    outcome, took_s = run(workload, num_requests, exact=mode == "exact")
    value, target = num_requests / took_s, TARGET_EXACT if mode == "exact" else TARGET_FAST
    return row(f"{mode}_requests_per_s_8w", value, "requests/s", target, value >= target, describe(workload, outcome))


def error_row(workload: str, num_requests: int) -> Row:
    outcomes = [run(workload, num_requests, exact=exact)[0] for exact in (True, False)]
    moments = [
        [(record.first_token_s or 0.0, record.end_s or 0.0) for record in outcome.records] for outcome in outcomes
    ]
    errors = [
        abs(one - other) / one
        for exact, fast in zip(*moments, strict=True)
        for one, other in zip(exact, fast, strict=True)
        if one
    ]
    same = all(
        (one.prefill_id, one.decode_id, one.failure) == (other.prefill_id, other.decode_id, other.failure)
        for one, other in zip(outcomes[0].records, outcomes[1].records, strict=True)
    )
    note = f"{num_requests} requests, every placement the same" if same else "PLACEMENTS DIFFER"
    return row("fast_vs_exact_error", max(errors), "share", TARGET_ERROR, same and max(errors) <= TARGET_ERROR, note)


def many_rows(workload: str, num_requests: int) -> list[Row]:
    """As many simulated seconds with few workers, over and over: what has just begun takes more steps a request."""
    num_many = 20 * num_requests
    many, many_s = run(workload, num_many, NUM_MANY)
    num_few = num_many * NUM_WORKERS // NUM_MANY
    fews = [run(workload, num_few, seed=seed) for seed in range(NUM_SHORT_RUNS)]
    few_s = sum(took_s for _, took_s in fews) / (num_few * NUM_SHORT_RUNS)
    value, growth = num_many / many_s, many_s / num_many / few_s
    few_steps = sum(steps_of(outcome) for outcome, _ in fews) / NUM_SHORT_RUNS
    rate = RATE_PER_WORKER * NUM_MANY
    note = f"{num_many} requests at {rate:,.0f}/s, {num_many / rate:.1f} s; {steps_of(many):.1f} steps a request"
    compared = f"from 8 to 1,024 workers over the same {num_many / rate:.1f} s; {few_steps:.1f} steps a request with 8"
    return [
        row("fast_requests_per_s_1024w", value, "requests/s", None, None, note),
        row("request_cost_growth", growth, "times", TARGET_GROWTH, growth <= TARGET_GROWTH, compared),
    ]


def steps_of(outcome: Outcome) -> float:
    """A request."""
    return sum(outcome.num_steps.values()) / len(outcome.records)


def memory_row(workload: str, num_requests: int) -> Row:
    """Live memory at the middle of a run and at its end, neither counting what is running."""
    profile, seen, marks = made_up_profile(), 0, list[int]()

    def on_record(record: Record) -> None:
        nonlocal seen
        seen += 1
        if seen in (num_requests // 2, num_requests - num_requests // 20):
            marks.append(tracemalloc.get_traced_memory()[0])

    source = (
        parse_workload(workload).for_model(profile.max_model_len).source(RATE_PER_WORKER * NUM_WORKERS, 0, num_requests)
    )
    tracemalloc.start()
    simulate(config(NUM_WORKERS), dict.fromkeys(Role, profile), source, on_record=on_record)
    tracemalloc.stop()
    value = max(0.0, (marks[1] - marks[0]) / (0.45 * num_requests))
    return row("simulator_growth_bytes", value, "bytes", TARGET_GROWTH_BYTES, value <= TARGET_GROWTH_BYTES, "a request")


def tune_row(workload: str) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        path.write_text(profiles.dump(made_up_profile()))
        command = [*PDSERVE, "tune", "--profile", str(path), "--gpus", "8", "--workload", workload, "--json"]
        started_s = time.perf_counter()
        done = subprocess.run([*command, "--ttft-ms", "500", "--tpot-ms", "30"], check=True, stdout=subprocess.PIPE)
        took_s = time.perf_counter() - started_s
    answer = json.loads(done.stdout)
    note = f"{answer['num_requests']:,} requests in {len(answer['findings'])} set-ups: {answer['verdict']}"
    return row("tune_8gpu_s", took_s, "s", TARGET_TUNE_S, took_s <= TARGET_TUNE_S, note)


def describe(workload: str, outcome: Outcome) -> str:
    busy = {name: busy_s / outcome.end_s for name, busy_s in outcome.busy_s.items()}
    shares = {role: [busy[name] for name in busy if name.startswith(role)] for role in ("prefill", "decode")}
    words = ", ".join(f"{role} workers busy {sum(found) / len(found):.0%}" for role, found in shares.items())
    num_failed = sum(bool(record.failure) for record in outcome.records)
    tokens = sum(record.num_output_tokens for record in outcome.records) / len(outcome.records)
    return f"{Path(workload).name}, {tokens:.0f} tokens a request; {words}; {num_failed} failed"


def config(num_workers: int) -> ClusterConfig:
    engine = {"max_num_batched_tokens": 2048, "max_num_seqs": 256}
    pools = {role: {"replicas": num_workers // 2} for role in ("prefill", "decode")}
    router = {"max_inflight_requests": 1_000_000}
    return ClusterConfig.model_validate({"model": "simulated", "engine": engine, "router": router, **pools})


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
