"""DistServe (OSDI'24): the shape of a prefill and a decode instance for OPT on A100s, and what splitting gains.

As its algorithm for slow links does: one prefill and one decode instance within a node of 8 GPUs, every pair of tensor-
parallel degrees, the pair with the highest goodput per GPU at 90 % joint attainment. Colocated are its baseline, vLLM
of early 2024 with the degree that it was given (the fits of vLLM's own steps, whole prompts in one step), and a
stronger one that it did not have: its own engine's steps with the better of two chunk sizes.

There is no pipeline parallelism in the fits: of the published shapes it is the number of GPUs that can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from _cluster import Row, row
from _published import EFFORTS, Effort, best, fleet, goodputs, listed, num_gpus

from pdserve.cluster.planner.findings import Setup, Target
from pdserve.cluster.planner.profile import Profile
from pdserve.cluster.planner.workload import parse_workload
from pdserve.proto.types import Role

FILES = ("distserve_profiler-a100-80g.distserve.json", "distserve_profiler-a100-80g.vllm.json")
CHUNKS = (512, 2048)
QUICK_SHAPES = {
    "opt-13b": ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1)),
    "opt-66b": ((2, 2), (2, 4), (4, 2), (3, 3), (4, 4)),
}
"""The published one, its neighbours, and the extremes that fit; with more effort all are tried."""

WHOLE_PROMPTS = 2048
"""No prompt is longer: the context of OPT."""

# Lognormal with the means that the paper gives for what it drew (ShareGPT 755 and 200 tokens, LongBench 1,738 and 91);
# how they spread is assumed, and a context of 2,048 tokens cuts the longest.
SHAREGPT = "synthetic?prompt=570/1480&output=140/420"
LONGBENCH = "synthetic?prompt=1760/1980&output=60/205"


@dataclass(frozen=True, slots=True)
class App:
    """One row of the paper's tables: SLO, GPUs of each published instance, and gains over vLLM from `low` to `high`."""

    name: str
    model: str
    workload: str
    ttft_ms: float
    tpot_ms: float
    degrees: tuple[int, ...]
    vllm_degree: int
    placement: tuple[int, int]
    gain: tuple[float, float]


APPS = (
    App("chatbot_13b", "opt-13b", SHAREGPT, 250, 100, (1, 2, 4), 1, (2, 1), (2.0, 4.6)),
    App("chatbot_66b", "opt-66b", SHAREGPT, 2500, 150, (2, 3, 4), 4, (4, 4), (2.0, 4.6)),
    App("summarisation_66b", "opt-66b", LONGBENCH, 15_000, 150, (2, 3, 4), 4, (4, 4), (4.3, 4.3)),
)
ROUGH = 2.0
"""A gain within this factor of the published one is of its size: it also holds what schedulers and kernels were."""


def rows(profiles: Mapping[str, Profile], effort: Effort) -> list[Row]:
    return [found for app in APPS for found in app_rows(app, profiles, effort)]


def app_rows(app: App, profiles: Mapping[str, Profile], effort: Effort) -> list[Row]:
    setups = {**pairs(app, profiles, effort), **colocated(app, profiles)}
    workload = parse_workload(app.workload).for_model(2048)
    target = Target("all", app.ttft_ms, app.tpot_ms, 0.9)
    found = goodputs(list(setups.values()), profiles, workload, target, effort)
    each_gpu = {
        name: goodput.rate / num_gpus(setup, profiles)
        for (name, setup), goodput in zip(setups.items(), found, strict=True)
    }
    split = {name: rate for name, rate in each_gpu.items() if name.startswith("P")}
    mixed = {name: rate for name, rate in each_gpu.items() if name.startswith("M")}
    chosen, tuned = best(split), best(mixed)
    ours, published = [number(split_name(one)) for one in (chosen, pair_name(*app.placement))]
    is_near = split[pair_name(*app.placement)] >= 0.9 * split[chosen] or ours == published
    words = f"published {pair_name(*app.placement)}; {listed(split)}"
    vllm = each_gpu["vLLM"]
    gain, low, high = split[chosen] / vllm, *app.gain
    gain_words = f"{split[chosen]:.2f} against {vllm:.2f} requests/s/GPU; published {low:g} to {high:g}"
    honest = split[chosen] / mixed[tuned]
    honest_words = f"{tuned} with the same engine's steps: {mixed[tuned]:.2f} requests/s/GPU; not published"
    return [
        row(
            f"distserve_{app.name}_prefill_per_decode_gpu",
            ours,
            "ratio",
            round(published, 2),
            is_near,
            f"{chosen}: {words}",
        ),
        row(
            f"distserve_{app.name}_gain_over_vllm", gain, "times", low, low / ROUGH <= gain <= ROUGH * high, gain_words
        ),
        row(f"distserve_{app.name}_gain_over_tuned", honest, "times", None, None, honest_words),
    ]


def pairs(app: App, profiles: Mapping[str, Profile], effort: Effort) -> dict[str, Setup]:
    """One instance of each, of the degrees that are tried."""
    shapes = QUICK_SHAPES[app.model] if effort is EFFORTS["quick"] else tuple(product(app.degrees, repeat=2))
    return {
        pair_name(ours, theirs): fleet(
            {
                Role.PREFILL: (profiles[profile_name(app, ours)], 1),
                Role.DECODE: (profiles[profile_name(app, theirs)], 1),
            },
        )
        for ours, theirs in shapes
    }


def colocated(app: App, profiles: Mapping[str, Profile]) -> dict[str, Setup]:
    """vLLM as it was run, and the engine of the splits with several chunk sizes and vLLM's degree."""
    found = {
        f"M{app.vllm_degree} chunk {chunk}": fleet(
            {Role.MIXED: (profiles[profile_name(app, app.vllm_degree)], 1)}, chunk_tokens=chunk
        )
        for chunk in CHUNKS
    }
    vllm = profiles[f"{profile_name(app, app.vllm_degree)}-vllm"]
    return {**found, "vLLM": fleet({Role.MIXED: (vllm, 1)}, chunk_tokens=WHOLE_PROMPTS)}


def profile_name(app: App, degree: int) -> str:
    return f"{app.model}-a100-80gb-tp{degree}"


def pair_name(prefill: int, decode: int) -> str:
    return f"P{prefill}+D{decode}"


def split_name(name: str) -> tuple[int, int]:
    prefill, decode = name.removeprefix("P").split("+D")
    return int(prefill), int(decode)


def number(pair: tuple[int, int]) -> float:
    return pair[0] / pair[1]
