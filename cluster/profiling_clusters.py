"""The clusters that a profile is measured on: made from the user's configuration, started, measured, taken down.

As many mixed workers as the configuration has workers, with its cores for each, take every kind of step; then one
prefill and one decode worker for each kind of link hand over, and over the first kind take their own kinds of step
beside each other. So workers share their machine as they will in earnest.
Knows nothing of what a profile is made of.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pdserve.cluster import launch, state
from pdserve.cluster.config import ClusterConfig
from pdserve.cluster.placement import plan_workers
from pdserve.cluster.profiling_links import Handoff
from pdserve.cluster.profiling_plan import WorkerLimits, plan_bursts
from pdserve.cluster.profiling_run import BurstLog, LoneCost, session
from pdserve.cluster.state import ClusterState
from pdserve.engine.config import EngineConfig
from pdserve.proto.errors import StartupError, Unavailable
from pdserve.proto.types import KVLayout, Role

LONE_SHARE, MIXED_SHARE, SPLIT_SHARE = 0.06, 0.5, 0.3
"""Of the budget: lone requests, and steps of both kinds of set-up; the rest is for hand-offs."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class MeasuredSteps:
    """One cluster of mixed workers."""

    log: BurstLog
    lone: LoneCost
    tokenize_s_per_token: float
    startup_s: float
    layout: KVLayout
    limits: WorkerLimits


@dataclass(frozen=True, slots=True)
class PairBudgets:
    """Seconds to measure one pair for."""

    handoffs_s: float
    steps_s: float


def pair_budgets(budget_s: float, num_kinds: int, is_first: bool) -> PairBudgets:
    """Of one pair; the first also takes steps."""
    handoffs_s = (1.0 - LONE_SHARE - MIXED_SHARE - SPLIT_SHARE) * budget_s / num_kinds
    return PairBudgets(handoffs_s, SPLIT_SHARE * budget_s if is_first else 0.0)


@dataclass(frozen=True, slots=True)
class MeasuredPair:
    """A prefill and a decode worker over one kind of link; without time for them no steps."""

    log: BurstLog
    handoffs: tuple[Handoff, ...]
    lone: LoneCost


def mixed_config(config: ClusterConfig) -> ClusterConfig:
    """As many mixed workers as there are workers, each like the largest of them."""
    used = [role for role in Role if config.replicas(role)]
    total = sum(config.replicas(role) for role in used)
    return _with_pools(config, "steps", {Role.MIXED: total})


def pair_config(config: ClusterConfig, kind: str) -> ClusterConfig:
    """One worker for each side, over this kind of link alone."""
    pair = _with_pools(config, kind.replace("_", "-"), {Role.PREFILL: 1, Role.DECODE: 1})
    return pair.model_copy(update={"kv_transfer": config.kv_transfer.model_copy(update={"links": [kind]})})


def _with_pools(config: ClusterConfig, what: str, replicas: Mapping[Role, int]) -> ClusterConfig:
    used = [role for role in Role if config.replicas(role)]
    pools = [config.pool(role) for role in used]
    cores = max((pool.cores or 0 for pool in pools), default=0) or None
    num_gpus = max((pool.num_gpus for pool in pools), default=0.0)
    changes: dict[str, Any] = {
        str(role): config.pool(role).model_copy(
            update={"replicas": replicas.get(role, 0), "cores": cores, "num_gpus": num_gpus, "engine": {}}
        )
        for role in Role
    }
    changes["engine"] = _largest_engine(config, used)
    return config.model_copy(update={**changes, "name": f"{config.name[:20]}-{what}-{os.getpid()}"})


def _largest_engine(config: ClusterConfig, used: Sequence[Role]) -> EngineConfig:
    """Steps of every size that any role is configured to take, by one kind of worker."""
    engines = [config.engine_for(role) for role in used] or [config.engine]
    sizes = ("max_num_seqs", "max_num_batched_tokens")
    return engines[0].model_copy(update={size: max(getattr(engine, size) for engine in engines) for size in sizes})


def cores_per_worker(config: ClusterConfig) -> int:
    """As many as a mixed worker is pinned to while it is measured."""
    mixed = mixed_config(config)
    replicas, asked = {Role.MIXED: mixed.mixed.replicas or 1}, {Role.MIXED: mixed.mixed.cores}
    plans = plan_workers({**dict.fromkeys(Role, 0), **replicas}, {**dict.fromkeys(Role), **asked}, _own_cores())
    return len(plans[0].cores)


def _own_cores() -> tuple[int, ...]:
    return tuple(sorted(os.sched_getaffinity(0)))


def measure_steps(config: ClusterConfig, budget_s: float, seed: int, say: Say) -> MeasuredSteps:
    """
    Raises:
        StartupError: the cluster does not start.
        Unavailable: it does not answer.
    """
    stamps: dict[str, float] = {}

    def progress(what: str) -> None:
        stamps[what] = time.monotonic()
        say(what)

    mixed = mixed_config(config)
    with running(mixed, progress) as cluster:
        startup_s = stamps.get("starting router", 0.0) - stamps.get("starting workers", 0.0)
        return asyncio.run(_measure_steps(cluster, mixed, budget_s, seed, max(0.0, startup_s), say))


async def _measure_steps(
    cluster: ClusterState, config: ClusterConfig, budget_s: float, seed: int, startup_s: float, say: Say
) -> MeasuredSteps:
    async with session(cluster, seed) as measured:
        info, engine = measured.infos[0], config.engine
        capacity_tokens = info.num_blocks * info.layout.block_size
        limits = WorkerLimits(engine.max_num_seqs, engine.max_num_batched_tokens, info.max_model_len, capacity_tokens)
        lone = await measured.lone_requests(LONE_SHARE * budget_s)
        tokenize_s = await measured.tokenize_s_per_token()
        steps = await measured.step_timings(
            plan_bursts(limits), MIXED_SHARE * budget_s, lambda share: say(f"measuring steps, {min(share, 1.0):.0%}")
        )
        return MeasuredSteps(steps, lone, tokenize_s, startup_s, info.layout, limits)


def measure_pair(
    config: ClusterConfig, kind: str, limits: WorkerLimits, budgets: PairBudgets, seed: int, say: Say
) -> MeasuredPair:
    """
    Raises:
        StartupError: no two workers of this machine can use such links.
        Unavailable: the cluster does not answer, or hands nothing over.
    """
    with running(pair_config(config, kind), say) as cluster:
        say(f"measuring {kind} links")
        return asyncio.run(_measure_pair(cluster, kind, limits, budgets, seed))


async def _measure_pair(
    cluster: ClusterState, kind: str, limits: WorkerLimits, budgets: PairBudgets, seed: int
) -> MeasuredPair:
    async with session(cluster, seed) as measured:
        lone = await measured.lone_requests(0.3 * budgets.handoffs_s)
        sizes = handoff_sizes(limits, measured.infos[0].layout.block_size)
        handoffs = await measured.handoffs(sizes, 0.7 * budgets.handoffs_s)
        if not handoffs:
            raise Unavailable(f"no hand-off over {kind} was seen in the workers' records")
        steps = BurstLog((), 0, ())
        if budgets.steps_s > 0:
            steps = await measured.step_timings(plan_bursts(limits), budgets.steps_s)
        return MeasuredPair(steps, tuple(handoffs), lone)


def handoff_sizes(limits: WorkerLimits, block_size: int) -> tuple[int, ...]:
    """Prompts of a block up to a whole chunk; each is computed in one step."""
    longest = min(limits.chunk_tokens, limits.max_model_len - 4, limits.kv_capacity_tokens // 2)
    sizes = {min(block_size, longest), longest // 4, longest // 2, longest}
    return tuple(sorted(size for size in sizes if size > 0))


@contextmanager
def running(config: ClusterConfig, progress: Say) -> Iterator[ClusterState]:
    """Whatever happens, it is down afterwards, and its folder gone, for nobody asks for it again.

    The folder stays where the head did not end, and where the cluster did not start: there the log says why.
    """
    head_pid: int | None = None
    try:
        with launch.launched(config, progress) as (cluster, head):
            head_pid = head.pid
            yield cluster
            if not launch.stop_process(head.pid, cluster.stop_timeout_s):
                raise StartupError(f"head process {head.pid} does not end")
    finally:
        if head_pid is not None and state.process_started(head_pid) is None:
            state.remove(config.name)
