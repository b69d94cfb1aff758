"""What `pdserve tune` has found out: the values between the search, the tables, the JSON and the HTML report.

    Question --search--> Finding for every set-up that was tried --verdict--> Answer

Knows nothing of how set-ups are chosen, simulated or shown. Latencies are in milliseconds, rates in requests per second
for the whole set-up, money in the currency of the profile's price.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pdserve.cluster.planner.goodput import Goodput
from pdserve.proto.types import Role


@dataclass(frozen=True, slots=True)
class Setup:
    """Workers of one kind of GPU and how they are run. One prompt chunk is at most `max_num_batched_tokens`.

    Sizes are by role, for the roles that have workers. `profiles` names each role's profile: roles may differ in
    hardware, but not in their tensor-parallel degree.
    """

    num_workers: Mapping[Role, int]
    max_num_batched_tokens: Mapping[Role, int]
    max_num_seqs: Mapping[Role, int]
    policy: str
    tensor_parallel_size: int = 1
    gpus_per_worker: float = 1.0
    profiles: Mapping[Role, str] = field(default_factory=dict)

    @property
    def num_gpus(self) -> float:
        return sum(self.num_workers.values()) * self.gpus_per_worker

    @property
    def is_split(self) -> bool:
        return self.num_workers.get(Role.PREFILL, 0) > 0

    @property
    def name(self) -> str:
        """As in `3P5D`, `8M` or `2P5D1M`."""
        letters = {Role.PREFILL: "P", Role.DECODE: "D", Role.MIXED: "M"}
        return "".join(f"{self.num_workers[role]}{letter}" for role, letter in letters.items() if self._has(role))

    def _has(self, role: Role) -> bool:
        return self.num_workers.get(role, 0) > 0


@dataclass(frozen=True, slots=True)
class Target:
    """One SLO class: `share` of its requests are to meet both targets."""

    name: str
    ttft_ms: float
    tpot_ms: float
    share: float


@dataclass(frozen=True, slots=True)
class ClassReport:
    """How many of the requests of one SLO class met both of its targets; what failed did not."""

    target: Target
    num_requests: int
    num_good: int

    @property
    def attainment(self) -> float | None:
        return self.num_good / self.num_requests if self.num_requests else None

    @property
    def is_met(self) -> bool:
        return self.attainment is None or self.attainment >= self.target.share


@dataclass(frozen=True, slots=True)
class Phase:
    """Where the time of requests went. `share_of_misses` is of the requests that missed a target: those in which this
    phase is the one that took the most beyond its own median; after the first token, by its time a token."""

    name: str
    mean_ms: float
    p50_ms: float
    p99_ms: float
    share_of_misses: float


@dataclass(frozen=True, slots=True)
class Picture:
    """One set-up at one rate. `ttft_ms` and `tpot_ms` are values at the shares of `QUANTILES`."""

    rate: float
    ttft_ms: tuple[float, ...]
    tpot_ms: tuple[float, ...]
    phases: tuple[Phase, ...]
    busy: Mapping[str, float]
    prompt_tokens_per_s: float
    output_tokens_per_s: float


QUANTILES = (*(step / 100 for step in range(1, 100)), 0.995, 0.999)


def at(values: tuple[float, ...], share: float) -> float:
    """The value at one of `QUANTILES`."""
    return values[QUANTILES.index(share)]


@dataclass(frozen=True, slots=True)
class Cost:
    """At the goodput. Where tokens of both kinds share a GPU its price is shared by the time that each kind took."""

    per_hour: float
    per_million_requests: float
    per_million_input_tokens: float
    per_million_output_tokens: float


@dataclass(frozen=True, slots=True)
class Energy:
    """At the goodput. `idle_is_known` is false where the profile has no idle power and idle time counts nothing."""

    joules_per_request: float
    joules_per_output_token: float
    idle_is_known: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """What one set-up can do. `picture`, `cost` and `energy` are `None` where it cannot hold the targets at any rate or
    the profile does not know. `is_refined` is false where the search saw early that others are better."""

    setup: Setup
    goodput: Goodput
    is_refined: bool
    picture: Picture | None = None
    cost: Cost | None = None
    energy: Energy | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked, in words and figures. `profiles` is each one's name and where its step times are from;
    `are_profiles_told` where set-ups differ in them, in hardware or in nothing else that is shown."""

    num_gpus: float
    targets: tuple[Target, ...]
    workload: str
    model: str
    hardware: str
    profiles: tuple[str, ...]
    seed: int
    precision: float
    are_profiles_told: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """All findings, best first. `verdict` is one sentence, `reasons` are the ones behind it, `warnings` what the user
    must know before believing it. `best_split` and `best_colocated` are indices into `findings`, if any were tried.
    `plateau` are the names of set-ups whose goodput cannot be told from the best one's. `recommended` is the index of
    the one to run, the simpler one where two cannot be told apart; `None` where nothing holds the targets.
    """

    question: Question
    findings: tuple[Finding, ...]
    verdict: str
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    best_split: int | None
    best_colocated: int | None
    plateau: tuple[str, ...]
    num_requests: int
    took_s: float
    recommended: int | None = None
