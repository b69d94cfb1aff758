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
from _published import EFFORTS, Effort, best, fleet, goodputs, is_known, listed, num_gpus, unknown

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
SHAREGPT = "synthetic?prompt=690/1150&output=140/420"
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
NEAR = 0.9
MOST = 100.0
"""Shown for a gain over what serves next to nothing."""

ROUGH = 2.0
"""A gain within this factor of the published one is of its size: it also holds what schedulers and kernels were."""


def rows(profiles: Mapping[str, Profile], effort: Effort) -> list[Row]:
    return [found for app in APPS for found in app_rows(app, profiles, effort)]


def app_rows(app: App, profiles: Mapping[str, Profile], effort: Effort) -> list[Row]:
    setups = {**pairs(app, profiles, effort), **colocated(app, profiles)}
    workload = parse_workload(app.workload).for_model(WHOLE_PROMPTS)
    target = Target("all", app.ttft_ms, app.tpot_ms, 0.9)
    found = dict(zip(setups, goodputs(list(setups.values()), profiles, workload, target, effort), strict=True))
    each_gpu = {name: found[name].rate / num_gpus(setup, profiles) for name, setup in setups.items()}
    split = {name: rate for name, rate in each_gpu.items() if name.startswith("P")}
    chosen, published = best(split), pair_name(*app.placement)
    ours, theirs = (number(split_name(one)) for one in (chosen, published))
    is_near = split[published] >= NEAR * split[chosen] or ours == theirs
    are_known = is_known(found[chosen]) and is_known(found[published])
    words = f"{chosen}; published {published}; {listed(split)}{unknown(found)}"
    ratio = row(
        f"distserve_{app.name}_p_per_d_gpu", ours, "ratio", round(theirs, 2), is_near if are_known else None, words
    )
    return [ratio, *gain_rows(app, each_gpu, chosen, is_known(found[chosen]) and is_known(found["vLLM"]))]


def gain_rows(app: App, each_gpu: Mapping[str, float], chosen: str, are_known: bool) -> list[Row]:
    """What the best pair serves per GPU, by what colocated serve."""
    low, high = app.gain
    tuned = best({name: rate for name, rate in each_gpu.items() if name.startswith("M")})
    gain, honest = (min(MOST, each_gpu[chosen] / max(each_gpu[name], 1e-9)) for name in ("vLLM", tuned))
    is_near = low / ROUGH <= gain <= ROUGH * high
    words = f"{each_gpu[chosen]:.2f} against {each_gpu['vLLM']:.2f} requests/s/GPU; published {low:g} to {high:g}"
    honest_words = f"{tuned} with the same engine's steps: {each_gpu[tuned]:.2f} requests/s/GPU; not published"
    return [
        row(f"distserve_{app.name}_gain_over_vllm", gain, "times", low, is_near if are_known else None, words),
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
