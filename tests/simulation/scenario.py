"""What a seed stands for: a cluster, its requests, and which kinds of faults are on. Pure, drawn once.

Swarm style: each seed turns on a random subset of the fault kinds, and about one in ten turns on none. Times are true
seconds; faults end at `calm_s`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from simulation.engine import EngineSize
from simulation.model import VOCAB_SIZE
from simulation.network import Weather
from simulation.wires import WireFaults
from simulation.worker import WorkerPlan

from pdserve.kv_transfer.config import KVTransferConfig
from pdserve.proto.types import Role, SamplingParams

# What may go wrong.
FAULTS = (
    "loss",
    "duplication",
    "stragglers",
    "cuts",
    "resets",
    "crashes",
    "freezes",
    "slowness",
    "lazy threads",
    "router crashes",
    "corruption",
    "wire breaks",
    "wire hangs",
    "bad logits",
)
# What no cluster may mind, and what clients bring upon themselves.
STRAINS = ("drift", "short leases", "short deadlines", "cancels", "slow readers", "tight admission", "unlike blocks")
STALL_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class Request:
    """One client's wish. `cancel_after_s`: it goes away then; `read_s`: what it takes to read a message."""

    request_id: str
    router: int
    arrival_s: float
    timeout_s: float
    prompt: tuple[int, ...]
    sampling: SamplingParams
    stop_strings: tuple[str, ...]
    cancel_after_s: float | None
    read_s: float
    num_retries: int


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything that is drawn before the run."""

    seed: int
    kinds: frozenset[str]
    workers: tuple[WorkerPlan, ...]
    num_routers: int
    policy: str
    max_inflight: int
    max_queued: int
    requests: tuple[Request, ...]
    calm_s: float
    weather: Weather
    wire_faults: WireFaults
    bad_logits: float

    @property
    def has_faults(self) -> bool:
        return any(kind in self.kinds for kind in FAULTS)

    def __str__(self) -> str:
        workers = ", ".join(
            f"{one.worker_id} ({one.engine.num_blocks} blocks of {one.engine.block_size} on {one.host_id})"
            for one in self.workers
        )
        kinds = ", ".join(kind for kind in (*FAULTS, *STRAINS) if kind in self.kinds) or "none"
        return (
            f"seed {self.seed}: {workers}; {self.num_routers} routers, {len(self.requests)} requests; "
            f"faults until {self.calm_s:.1f} s: {kinds}"
        )


def draw(seed: int) -> Scenario:
    """The scenario of a seed."""
    random = Random(f"{seed}/scenario")
    kinds = _draw_kinds(random)
    workers = _draw_workers(random, kinds)
    num_routers = 2 if random.random() < 0.25 else 1
    calm_s = random.uniform(6.0, 16.0)
    is_tight = "tight admission" in kinds
    return Scenario(
        seed=seed,
        kinds=kinds,
        workers=workers,
        num_routers=num_routers,
        policy=random.choice(("least_loaded", "round_robin")),
        max_inflight=random.randint(1, 3) if is_tight else 64,
        max_queued=random.randint(0, 3) if is_tight else 64,
        requests=_draw_requests(random, kinds, workers, num_routers, calm_s),
        calm_s=calm_s,
        weather=_draw_weather(random, kinds),
        wire_faults=_draw_wire_faults(random, kinds),
        bad_logits=random.uniform(0.005, 0.02) if "bad logits" in kinds else 0.0,
    )


def _draw_kinds(random: Random) -> frozenset[str]:
    strains = {kind for kind in STRAINS if random.random() < 0.3}
    if random.random() < 0.1:
        return frozenset(strains)
    likelihood = random.choice((0.1, 0.25, 0.5))
    return frozenset(strains | {kind for kind in FAULTS if random.random() < likelihood})


def _draw_workers(random: Random, kinds: frozenset[str]) -> tuple[WorkerPlan, ...]:
    shape = random.random()
    counts: list[tuple[Role, int]] = [(Role.PREFILL, random.randint(1, 3)), (Role.DECODE, random.randint(1, 3))]
    if shape < 0.1:
        counts = [(Role.MIXED, random.randint(1, 2))]
    elif shape < 0.25:
        counts.append((Role.MIXED, 1))
    transfer = _draw_transfer(random, kinds)
    block_size = random.choice((4, 4, 8))
    num_hosts = random.choice((1, 2, 3))
    lag_s = random.choice((0.0002, 0.002, 0.02))
    max_tokens = random.randint(48, 120)
    plans = []
    for role, count in counts:
        for number in range(count):
            size = block_size
            if "unlike blocks" in kinds and role is Role.PREFILL:
                size = 12 - block_size
            engine = EngineSize(
                block_size=size,
                num_blocks=-(-max_tokens // size) + random.randint(0, 8),
                max_num_seqs=random.randint(2, 6),
                max_num_batched_tokens=random.choice((8, 12, 16, 32)),
                max_model_len=max_tokens,
                prefix_caching=random.random() < 0.85,
                step_s=random.uniform(0.005, 0.03),
                token_s=0.0005,
            )
            plans.append(
                WorkerPlan(f"{role[0]}{number}", role, engine, transfer, f"host{random.randrange(num_hosts)}", lag_s)
            )
    return tuple(plans)


def _draw_transfer(random: Random, kinds: frozenset[str]) -> KVTransferConfig:
    lease_s = random.uniform(0.6, 1.5) if "short leases" in kinds else random.uniform(4.0, 8.0)
    hurry = any(kind in kinds for kind in FAULTS)  # else nothing may be given up
    return KVTransferConfig(
        links=["shm", "gloo"] if random.random() < 0.6 else ["gloo"],
        lease_s=lease_s,
        renew_s=lease_s * random.uniform(0.15, 0.33),
        reserve_timeout_s=random.choice((5.0, 600.0)) if hurry else 600.0,
        room_timeout_s=random.choice((4.0, 600.0)) if hurry else 600.0,
        part_timeout_s=random.choice((4.0, 600.0)) if hurry else 600.0,
        transfer_timeout_s=random.uniform(0.5, 3.0) if hurry else 10.0,
        max_pulls=random.randint(1, 4),
        control_timeout_s=random.uniform(0.5, 2.0),
        offer_retry_s=random.uniform(0.1, 0.5),
        digest_key="00112233445566778899aabbccddeeff" if random.random() < 0.4 else "",
        quarantine_budget_blocks=random.choice((4, 1024)),
    )


def _draw_requests(
    random: Random, kinds: frozenset[str], workers: tuple[WorkerPlan, ...], num_routers: int, calm_s: float
) -> tuple[Request, ...]:
    room = min(plan.engine.max_model_len for plan in workers) - 2
    shared = [tuple(random.randrange(VOCAB_SIZE) for _ in range(room)) for _ in range(2)]
    requests = []
    span_s = random.choice((2.0, 4.5, 0.9 * calm_s))
    for number in range(random.randint(5, 20)):
        num_prompt = random.choice((random.randint(1, 12), random.randint(1, room // 2), random.randint(1, room - 8)))
        num_shared = min(num_prompt, random.choice((0, 8, 16, 32)))
        own = (random.randrange(VOCAB_SIZE) for _ in range(num_prompt - num_shared))
        prompt = (*random.choice(shared)[:num_shared], *own)
        sampling = _draw_sampling(random, min(room - num_prompt, 30))
        has_stop = random.random() < 0.15 and sampling.min_tokens == 0
        is_short = "short deadlines" in kinds and random.random() < 0.3
        request = Request(
            request_id=f"r{number}",
            router=random.randrange(num_routers),
            arrival_s=random.uniform(0.5, 0.5 + span_s),
            timeout_s=random.uniform(0.1, 3.0) if is_short else random.uniform(20.0, 30.0),
            prompt=prompt,
            sampling=sampling,
            stop_strings=(_draw_word(random), _draw_word(random)) if has_stop else (),
            cancel_after_s=random.uniform(0.0, 2.0) if "cancels" in kinds and random.random() < 0.4 else None,
            read_s=random.uniform(0.0, 4.5) if "slow readers" in kinds and random.random() < 0.2 else 0.0,
            num_retries=random.choice((0, 0, 2)),
        )
        requests.append(request)
    if not any(kind in kinds for kind in FAULTS):
        # Nothing goes wrong, so nothing may be given up: a crowd still needs its time.
        requests = [replace(one, timeout_s=max(one.timeout_s, 120.0)) for one in requests]
    return tuple(requests)


def _draw_sampling(random: Random, max_tokens: int) -> SamplingParams:
    has_stops = random.random() < 0.3
    return SamplingParams(
        max_tokens=random.randint(1, max(1, max_tokens)),
        temperature=0.0,
        min_tokens=random.choice((0, 0, 2)) if has_stops else 0,
        stop_token_ids=tuple(sorted(random.sample(range(VOCAB_SIZE), 4))) if has_stops else (),
    )


def _draw_word(random: Random) -> str:
    return "".join(random.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(random.randint(1, 2)))


def _draw_weather(random: Random, kinds: frozenset[str]) -> Weather:
    def when(kind: str, low: float, high: float) -> float:
        value = random.uniform(low, high)
        return value if kind in kinds else 0.0

    return Weather(
        latency_s=random.choice((0.0002, 0.001, 0.005)),
        loss=when("loss", 0.005, 0.08),
        duplication=when("duplication", 0.01, 0.2),
        straggling=when("stragglers", 0.01, 0.2),
        straggle_s=random.choice((0.2, 1.0, 4.0)),
        cut_messages_wait=random.random() < 0.5,
    )


def _draw_wire_faults(random: Random, kinds: frozenset[str]) -> WireFaults:
    def when(kind: str, low: float, high: float) -> float:
        value = random.uniform(low, high)
        return value if kind in kinds else 0.0

    return WireFaults(
        block_s=random.choice((0.0002, 0.001, 0.005)),
        flip=when("corruption", 0.005, 0.05),
        swap=when("corruption", 0.0, 0.03),
        forget=when("corruption", 0.0, 0.03),
        breaks=when("wire breaks", 0.005, 0.05),
        hangs=when("wire hangs", 0.005, 0.06),
        hang_s=random.choice((2.0, 6.0)),
    )


Draw = Callable[[int], Scenario]
