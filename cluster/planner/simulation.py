"""A cluster's configuration over a workload, on virtual time: every engine step goes through the real scheduler.

    config + profiles + source -> router (admission, policy) -> workers (scheduler, block pool, hand-off) -> records

The same seed gives the same records. Knows nothing of statistics, or of what a good configuration is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pdserve.cluster.config import ClusterConfig
from pdserve.cluster.planner.clock import Clock
from pdserve.cluster.planner.profile import LinkCost, Profile
from pdserve.cluster.planner.source import Source
from pdserve.cluster.planner.standing import StandingScheduler
from pdserve.cluster.planner.step_model import Extrapolation, StepModel
from pdserve.cluster.planner.step_shape import StepShape
from pdserve.cluster.planner.virtual_links import VirtualLinks
from pdserve.cluster.planner.virtual_router import Record, VirtualRouter
from pdserve.cluster.planner.virtual_worker import Surroundings, VirtualWorker
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.scheduler import Scheduler
from pdserve.kv_transfer.lease import LeaseTimes
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import KVLayout, Role, WorkerInfo, WorkerRef
from pdserve.router.admission import Admission
from pdserve.router.policy import POLICIES

SETTLE_S = 60.0
"""How long after the last request what it held may take to come back."""

NO_LINK = LinkCost(latency_s=0.0, bandwidth_bytes_per_s=1e18)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulation saw. `busy_s` is how long each worker's engine computed, `blocks_left` what it still holds."""

    records: tuple[Record, ...]
    end_s: float
    busy_s: Mapping[str, float]
    num_steps: Mapping[str, int]
    num_preemptions: Mapping[str, int]
    blocks_left: Mapping[str, int]
    num_kv_bytes: int
    extrapolation: Extrapolation


def simulate(
    config: ClusterConfig, profiles: Mapping[Role, Profile], source: Source, *, exact: bool = False
) -> Outcome:
    """Serve every request of the source, to its end.

    `exact` takes every token through the production scheduler; without it decodes that only go on are counted
    (`standing`): the same decisions and latencies, several times faster.

    Raises:
        ConfigError: a role without a profile, or without a link in common.
    """
    clock, records = Clock(), list[Record]()

    def ended(record: Record) -> None:
        records.append(record)
        source.ended(record.arrival, clock.now_s)

    router = VirtualRouter(
        clock,
        POLICIES[config.router.policy],
        Admission(config.router.max_inflight_requests, config.router.max_queued_requests),
        config.router.default_timeout_s,
        ended,
    )
    extrapolation = Extrapolation()
    links = VirtualLinks()
    workers = _make_workers(
        config, profiles, clock, links, router, extrapolation, Scheduler if exact else StandingScheduler
    )
    router.connect(list(workers.values()))
    _run(clock, router, source)
    end_s = clock.now_s
    while clock.next_s <= end_s + SETTLE_S:
        clock.advance()
    return Outcome(
        records=tuple(records),
        end_s=end_s,
        busy_s={name: worker.engine.busy_s for name, worker in workers.items()},
        num_steps={name: worker.engine.num_steps for name, worker in workers.items()},
        num_preemptions={name: worker.engine.num_preemptions for name, worker in workers.items()},
        blocks_left={name: _num_held(worker.engine.pool) for name, worker in workers.items()},
        num_kv_bytes=links.num_bytes,
        extrapolation=extrapolation,
    )


def _num_held(pool: BlockPool) -> int:
    return pool.num_blocks - pool.num_free + pool.num_reserved


def _run(clock: Clock, router: VirtualRouter, source: Source) -> None:
    """Until nobody comes any more and everybody who came has ended."""
    while clock.next_s <= 0.0:
        clock.advance()  # the workers' first turns
    while True:
        arrival_s = source.next_arrival_s()
        if arrival_s <= clock.next_s:
            if arrival_s == math.inf:
                return
            clock.skip_to(arrival_s)
            router.arrive(source.pop())
        elif router.num_live or arrival_s < math.inf:
            clock.advance()
        else:
            return


def _make_workers(
    config: ClusterConfig,
    profiles: Mapping[Role, Profile],
    clock: Clock,
    links: VirtualLinks,
    router: VirtualRouter,
    extrapolation: Extrapolation,
    make_scheduler: type[Scheduler],
) -> dict[str, VirtualWorker]:
    transfer = config.kv_transfer
    workers: dict[str, VirtualWorker] = {}
    around = Surroundings(
        clock=clock,
        links=links,
        link=_link(config, profiles),
        workers=workers,
        lease_times=LeaseTimes(transfer.lease_s, transfer.offer_retry_s),
        timeouts=transfer.timeouts,
        listener=router,
    )
    for role in Role:
        for ordinal in range(config.replicas(role)):
            if role not in profiles:
                raise ConfigError(f"profile: there is none for {role} workers")
            name = f"{role}-{ordinal}"
            workers[name] = _make_worker(name, role, config, profiles[role], around, extrapolation, make_scheduler)
    return workers


def _make_worker(
    name: str,
    role: Role,
    config: ClusterConfig,
    profile: Profile,
    around: Surroundings,
    extrapolation: Extrapolation,
    make_scheduler: type[Scheduler],
) -> VirtualWorker:
    engine = config.engine_for(role)
    num_blocks = engine.num_blocks or max(1, profile.kv_capacity_tokens // engine.block_size)
    max_model_len = min(engine.max_model_len or profile.max_model_len, num_blocks * engine.block_size + 1)
    scheduler = make_scheduler(
        BlockPool(num_blocks),
        block_size=engine.block_size,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_model_len=max_model_len,
        prefix_caching=False,
    )
    # Two bytes an element: any number of bytes a token that is a multiple of 4.
    layout = KVLayout(profile.model, "float16", 1, 1, max(1, profile.kv_bytes_per_token // 4), engine.block_size)
    info = WorkerInfo(WorkerRef(name, 1, name), role, layout, num_blocks, max_model_len, 1, "")
    model = StepModel(profile)

    def duration_s(shape: StepShape) -> float:
        extrapolation.see(model, shape)
        return model.duration_s(shape)

    return VirtualWorker(info, scheduler, duration_s, profile.overheads, around)


def _link(config: ClusterConfig, profiles: Mapping[Role, Profile]) -> LinkCost:
    """Of the preferred kind that both sides have; of the slower side."""
    if Role.PREFILL not in profiles or Role.DECODE not in profiles or not config.replicas(Role.PREFILL):
        return NO_LINK
    source, target = profiles[Role.PREFILL].links, profiles[Role.DECODE].links
    kind = next((kind for kind in config.kv_transfer.links if kind in source and kind in target), None)
    if kind is None:
        raise ConfigError(f"kv_transfer.links: none of {config.kv_transfer.links} is in both profiles")
    return LinkCost(
        latency_s=max(source[kind].latency_s, target[kind].latency_s),
        bandwidth_bytes_per_s=min(source[kind].bandwidth_bytes_per_s, target[kind].bandwidth_bytes_per_s),
    )
