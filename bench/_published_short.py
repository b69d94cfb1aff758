"""Short prompts, decode-heavy traffic: an equal split is far from the best one, and a pair loses to two colocated.

sgl-project/sglang-omni, docs/developer_reference/pd_vs_colocated.md (and #1599: "1P:1D is the worst ratio"): the
language part of Qwen3-Omni (30 billion parameters, 3 active) on two H200s, prompts of 42 tokens, 128 output tokens, at
most 64 running requests, Poisson. One pair serves 10.6 requests/s where two colocated serve at least 37.8.
dstack: gpt-oss-120b (5 billion active) on eight H200s, 1:3 best nearly everywhere of 3:1, 2:2 and 1:3.
llm-d's guide: a 10:1 ratio of input to output wants equal numbers of GPUs.

Here: dense models with predicted steps on H200s, the one whose active parameters are nearest. Nobody gives SLOs: ours
are 500 and 30 ms for 8 billion parameters, as MLPerf's interactive class, and 2 s and 60 ms for 32 billion.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from _cluster import Row, row
from _published import SEED, Effort, best, fleet, goodputs, listed, unknown

from pdserve.cluster.planner.findings import Setup, Target
from pdserve.cluster.planner.profile import Profile
from pdserve.cluster.planner.workload import parse_workload
from pdserve.cluster.planner.workload_spec import WorkloadSpec
from pdserve.cluster.tune_jobs import Problem, run_once
from pdserve.proto.types import Role

FILE = "aic_0.12.0_h200_sxm_vllm_bf16_tp1_predictions.csv"
SMALL, LARGE = "qwen3-8b-h200-tp1", "qwen3-32b-h200-tp1"
SHORT = "synthetic?prompt=42&output=128"
SHORT_NUM_SEQS = 64
EVEN = "synthetic?prompt=512/1024&output=512/1024"
"""dstack's lengths are not noted in what was read: as many tokens in as out, in the middle of what is usual."""

TEN_TO_ONE = "synthetic?prompt=4000&output=400"
SMALL_TARGET, LARGE_TARGET = Target("all", 500.0, 30.0, 0.9), Target("all", 2000.0, 60.0, 0.9)
FAR = 0.7
"""An equal split that serves less than this part of the best one is far from it."""


def rows(profiles: Mapping[str, Profile], effort: Effort) -> list[Row]:
    return [
        *short_rows(profiles[SMALL], effort),
        *dstack_rows(profiles[SMALL], effort),
        *llmd_rows(profiles[LARGE], effort),
    ]


def short_rows(profile: Profile, effort: Effort) -> list[Row]:
    workload = parse_workload(SHORT)
    pair, alone = split(profile, 1, 1, SHORT_NUM_SEQS), colocated(profile, 2, SHORT_NUM_SEQS)
    setups = [split(profile, number, 8 - number, SHORT_NUM_SEQS) for number in range(1, 8)]
    rates = rates_of([*setups, pair, alone], profile, workload, SMALL_TARGET, effort)
    splits = {setup.name: rates[setup.name] for setup in setups}
    chosen, equal = best(splits), splits["4P4D"] / max(splits.values())
    busy = prefill_busy(pair, profile, workload, rates[pair.name])
    gain = rates[pair.name] / rates[alone.name]
    of_pair = f"{rates[pair.name]:.1f}/s against {rates[alone.name]:.1f}/s of 2M; published 10.6 against 37.8 or more"
    return [
        row("short_equal_split_of_best", equal, "share", None, equal < FAR, f"best {chosen}; {listed(splits)}"),
        row("short_pair_of_two_colocated", gain, "share", 0.28, gain < FAR, of_pair),
        row("short_pair_prefill_busy", busy, "share", 0.101, busy < 0.3, "of the prefill GPU of 1P1D at its goodput"),
    ]


def dstack_rows(profile: Profile, effort: Effort) -> list[Row]:
    setups = [split(profile, number, 4 - number) for number in (1, 2, 3)]
    rates = rates_of(setups, profile, parse_workload(EVEN), SMALL_TARGET, effort)
    chosen = best(rates)
    return [row("dstack_best_prefill_workers_of_4", float(chosen[0]), "workers", 1.0, chosen == "1P3D", listed(rates))]


def llmd_rows(profile: Profile, effort: Effort) -> list[Row]:
    setups = [split(profile, number, 8 - number) for number in (3, 4, 5, 6)]
    rates = rates_of(setups, profile, parse_workload(TEN_TO_ONE), LARGE_TARGET, effort)
    share = int(best(rates)[0]) / 8
    return [row("llmd_10_to_1_prefill_share", share, "share", 0.5, abs(share - 0.5) <= 0.125, listed(rates))]


def split(profile: Profile, prefill: int, decode: int, num_seqs: int = 256) -> Setup:
    workers = {Role.PREFILL: (profile, prefill), Role.DECODE: (profile, decode)}
    return fleet(workers, chunk_tokens=4096, num_seqs=num_seqs)


def colocated(profile: Profile, number: int, num_seqs: int) -> Setup:
    return fleet({Role.MIXED: (profile, number)}, chunk_tokens=1024, num_seqs=num_seqs)


def rates_of(
    setups: list[Setup], profile: Profile, workload: WorkloadSpec, target: Target, effort: Effort
) -> dict[str, float]:
    found = goodputs(setups, {profile.name: profile}, workload, target, effort)
    by_name = dict(zip((setup.name for setup in setups), found, strict=True))
    if remark := unknown(by_name):
        print(f"{profile.name}{remark}", file=sys.stderr)
    return {name: goodput.rate for name, goodput in by_name.items()}


def prefill_busy(setup: Setup, profile: Profile, workload: WorkloadSpec, rate: float) -> float:
    outcome = run_once(setup, Problem({profile.name: profile}, workload, (SMALL_TARGET,)), rate, SEED, 2_000)
    return sum(busy_s for name, busy_s in outcome.busy_s.items() if name.startswith("prefill")) / outcome.end_s
