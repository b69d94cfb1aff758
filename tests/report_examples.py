"""Answers and stories that nobody simulated, to try reports on: plausible figures, the same each time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from pdserve.cluster.planner.attainment import Attainment
from pdserve.cluster.planner.findings import (
    QUANTILES,
    Answer,
    ClassReport,
    Cost,
    Energy,
    Finding,
    Phase,
    Picture,
    Question,
    Setup,
    Target,
)
from pdserve.cluster.planner.goodput import Goodput
from pdserve.cluster.planner.timelapse import Lapse, SimulationStory, Spread, Timelapse, WorkerSample
from pdserve.proto.types import Role

TARGET = Target("chat", ttft_ms=500.0, tpot_ms=50.0, share=0.9)
PHASES = ("router queue", "prefill queue", "prefill", "transfer", "decode queue", "decode")


def make_setup(prefill: int = 0, decode: int = 0, mixed: int = 0, chunk: int = 2048) -> Setup:
    counts = {Role.PREFILL: prefill, Role.DECODE: decode, Role.MIXED: mixed}
    workers = {role: count for role, count in counts.items() if count}
    return Setup(workers, dict.fromkeys(workers, chunk), dict.fromkeys(workers, 256), "least_loaded")


def make_attainment(value: float, width: float = 0.012) -> Attainment:
    low, high = max(0.0, value - width), min(1.0, value + width)
    return Attainment(value, low, high, 4000, 40, 200, 100, min(1.0, value + 0.03), min(1.0, value + 0.05), True, "")


def make_goodput(rate: float, width: float = 0.03) -> Goodput:
    """The curve falls through 90 % at `rate`; at 0 no rate will do."""
    if rate <= 0:
        at = make_attainment(0.31)
        return Goodput(0.0, 0.0, 0.0, at, 8000, 2, ((0.1, at), (1.0, make_attainment(0.2))), "no rate will do", "TTFT")
    around = (0.25, 0.5, 0.8, 0.92, 0.97, 1.0, 1.02, 1.06, 1.15, 1.4, 2.0)
    probes = tuple((rate * part, make_attainment(1 / (1 + math.exp(9 * (part - 1.2442))))) for part in around)
    return Goodput(
        rate,
        rate * (1 - width),
        rate * (1 + width),
        make_attainment(0.9),
        92_000,
        23,
        probes,
        "the curve crosses 90.0%",
    )


def make_picture(rate: float, *, is_split: bool = True) -> Picture:
    tail = [-math.log(1 - share) for share in QUANTILES]
    scale = 1.0 if is_split else 1.45
    means = (2.0, 60.0, 140.0, 35.0, 12.0, 4200.0) if is_split else (2.0, 92.0, 171.0, 0.0, 0.0, 5410.0)
    charged = (0.0, 0.62, 0.1, 0.08, 0.05, 0.15) if is_split else (0.0, 0.28, 0.1, 0.0, 0.0, 0.62)
    return Picture(
        rate=rate,
        ttft_ms=tuple(120 + 130 * scale * share for share in tail),
        tpot_ms=tuple(18 + 9 * scale * share**0.8 for share in tail),
        phases=tuple(
            Phase(name, mean, 0.8 * mean, 3.1 * mean, part)
            for name, mean, part in zip(PHASES, means, charged, strict=True)
            if mean
        ),
        busy={"prefill": 0.82, "decode": 0.64} if is_split else {"mixed": 0.79},
        prompt_tokens_per_s=rate * 1155,
        output_tokens_per_s=rate * 211,
    )


def make_finding(setup: Setup, rate: float, *, is_refined: bool = True, is_priced: bool = True) -> Finding:
    if rate <= 0:
        return Finding(setup, make_goodput(0.0), is_refined)
    per_hour = 2.5 * setup.num_gpus
    per_second = per_hour / 3600 / rate
    return Finding(
        setup,
        make_goodput(rate, 0.03 if is_refined else 0.12),
        is_refined,
        make_picture(rate, is_split=setup.is_split),
        Cost(per_hour, per_second * 1e6, per_second * 1e6 / 1155 * 0.6, per_second * 1e6 / 211 * 0.4)
        if is_priced
        else None,
        Energy(2900.0 / rate, 13.7 / rate, True) if is_priced else None,
    )


SPLIT_RATES = (0.0, 9.1, 17.35, 21.4, 20.9, 14.2, 6.8)


def make_answer(**changes: object) -> Answer:
    """Eight GPUs: all splits, colocation in three chunk sizes, and one with a mixed worker."""
    findings = [
        make_finding(make_setup(prefill, 8 - prefill), rate, is_refined=rate > 14)
        for prefill, rate in enumerate(SPLIT_RATES, start=1)
    ]
    findings += [make_finding(make_setup(mixed=8, chunk=chunk), rate) for chunk, rate in ((512, 16.9), (1024, 18.6))]
    findings += [make_finding(make_setup(mixed=8, chunk=4096), 12.2, is_refined=False)]
    findings += [make_finding(make_setup(3, 4, 1), 20.1)]
    findings.sort(key=lambda finding: -finding.goodput.rate)
    question = Question(
        num_gpus=8,
        targets=(TARGET,),
        workload="azure-conv: 1,155 prompt and 211 output tokens in the mean",
        model="llama-2-70b",
        hardware="H100-80GB",
        profiles=("splitwise-h100: fitted to public measurements",),
        seed=7,
        precision=0.03,
    )
    answer = Answer(
        question=question,
        findings=tuple(findings),
        verdict="Split 4P4D: 21.4 requests/s, 15 % more than the best colocated set-up.",
        reasons=(
            "Colocated decode steps wait behind prompts: 62 % of its misses are TPOT.",
            "The interval of 4P4D (20.8 to 22.0) lies above that of 8M (18.0 to 19.2).",
            "5P3D is on the same plateau.",
        ),
        warnings=("The profile has no mixed steps: colocated workers come out pessimistic.",),
        best_split=0,
        best_colocated=next(at for at, finding in enumerate(findings) if not finding.setup.is_split),
        plateau=("4P4D", "5P3D"),
        num_requests=1_284_000,
        took_s=41.7,
    )
    return replace(answer, **changes)  # type: ignore[arg-type]


def make_lapse(num_prefill: int = 3, num_decode: int = 5, num_samples: int = 400, max_samples: int = 512) -> Lapse:
    """Two bursts; the last decode worker comes late."""
    lapse = Timelapse(0.1, max_samples)
    for step in range(num_samples):
        at_s = step * 0.1
        burst = math.exp(-(((at_s - 12) / 4) ** 2)) + 0.8 * math.exp(-(((at_s - 29) / 3) ** 2))
        workers = [
            WorkerSample(f"prefill-{at}", Role.PREFILL, round(14 * burst * (1 - 0.1 * at)), 2, round(900 * burst), 2000)
            for at in range(num_prefill)
        ]
        workers += [
            WorkerSample(f"decode-{at}", Role.DECODE, round(3 * burst), round(40 + 60 * burst), _pool(at_s, at), 2000)
            for at in range(num_decode)
            if at < num_decode - 1 or at_s > 6
        ]
        lapse.sample(at_s, max(0, round(30 * (burst - 0.7))), round(120 + 300 * burst), workers)
    return lapse.lapse()


def _pool(at_s: float, worker: int) -> int:
    return round(1000 + 800 * math.sin(at_s / 6 + worker / 3) ** 2)


SPREADS: Mapping[str, Spread] = {
    "TTFT": Spread(210.0, 455.0, 980.5, 260.1, 1830.0),
    "TPOT": Spread(24.0, 36.0, 58.0, 26.2, 91.0),
    "E2E": Spread(4900.0, 9800.0, 15100.0, 5440.0, 22400.0),
}


def make_story(**changes: object) -> SimulationStory:
    story = SimulationStory(
        setup="3P5D",
        workload="azure-conv?rate=16",
        profiles=("splitwise-h100: fitted to public measurements",),
        seed=7,
        classes=(ClassReport(Target("all", 500.0, 50.0, 0.9), 2000, 1857),),
        num_requests=2000,
        num_completed=1994,
        duration_s=126.2,
        offered_rate=16.02,
        requests_per_s=15.8,
        goodput_per_s=14.71,
        attainment=0.9285,
        spreads=SPREADS,
        errors={"RESOURCE_EXHAUSTED": 6},
        picture=make_picture(16.02),
        lapse=make_lapse(),
        warnings=("decode batch up to 310, measured up to 256: 0.4 % of steps",),
    )
    return replace(story, **changes)  # type: ignore[arg-type]
