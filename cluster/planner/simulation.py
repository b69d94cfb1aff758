"""A cluster's configuration over a workload, on virtual time: every engine step goes through the real scheduler.

    config + profiles + source -> router (admission, policy) -> workers (scheduler, block pool, hand-off) -> records

The same seed gives the same records. Knows nothing of statistics, or of what a good configuration is.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from pdserve.cluster.config import ClusterConfig
from pdserve.cluster.planner.clock import Clock
from pdserve.cluster.planner.course import run
from pdserve.cluster.planner.prompts import Prompts
from pdserve.cluster.planner.source import Source
from pdserve.cluster.planner.steering import Script, Steering, Undone
from pdserve.cluster.planner.step_model import Extrapolation
from pdserve.cluster.planner.timelapse import Timelapse
from pdserve.cluster.planner.virtual_fleet import EngineChoice, VirtualFleet
from pdserve.cluster.planner.virtual_machines import Profiles
from pdserve.cluster.planner.virtual_router import Record, VirtualRouter
from pdserve.engine.block_pool import BlockPool
from pdserve.router.admission import Admission
from pdserve.router.policy import POLICIES

SETTLE_S = 60.0
"""How long after the last request what it held may take to come back."""

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulation saw until `end_s`, when its last request ended.

    `busy_s` is how long each worker's engine computed. What each live worker holds `SETTLE_S` later, when nobody needs
    it any more: `blocks_left`, and `handoffs_left` are leases and reservations. `undone` is what steering asked for in
    vain; what it would have asked for later is not in it.
    """

    records: tuple[Record, ...]
    end_s: float
    busy_s: Mapping[str, float]
    num_steps: Mapping[str, int]
    num_preemptions: Mapping[str, int]
    blocks_left: Mapping[str, int]
    handoffs_left: Mapping[str, int]
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int
    num_kv_bytes: int
    extrapolation: Extrapolation
    undone: tuple[Undone, ...]

    @property
    def busy(self) -> dict[str, float]:
        """The share of the time in which each worker's engine computed."""
        return {name: busy_s / max(self.end_s, 1e-9) for name, busy_s in self.busy_s.items()}


def simulate(
    config: ClusterConfig,
    profiles: Profiles,
    source: Source,
    *,
    exact: bool = False,
    are_prompts_shared: bool = False,
    workers_per_host: int | None = None,
    steering: Steering | None = None,
    lapse: Timelapse | None = None,
    on_record: Callable[[Record], object] | None = None,
) -> Outcome:
    """Serve every request of the source, to its end.

    `exact` takes every token through the production scheduler and every block through the pool. Without it decodes that
    only go on are counted (`standing`), and so are blocks (`counting_pool`): the same decisions and latencies, faster.
    `are_prompts_shared` gives prompts the tokens that their prefix ids and conversations say, and simulates prefix
    caches where the configuration has them; it costs a hash for each block. `workers_per_host`: all on one host by
    default. `lapse` records what queues and pools look like. With `on_record` each record is handed out when its
    request ends and none is kept: memory does not grow with the source.

    Raises:
        ConfigError: a role without a profile, or workers without a link in common, now or when a script has turned
            and started some.
    """
    clock, records = Clock(), list[Record]()

    def ended(record: Record) -> None:
        (on_record or records.append)(record)
        source.ended(record.arrival, clock.now_s)

    router = VirtualRouter(
        clock,
        POLICIES[config.router.policy],
        Admission(config.router.max_inflight_requests, config.router.max_queued_requests),
        config.router.default_timeout_s,
        Prompts(are_prompts_shared),
        ended,
    )
    choice = EngineChoice(exact, are_prompts_shared, workers_per_host)
    fleet = VirtualFleet(config, profiles, clock, router, choice)
    fleet.check([action for _, action in steering.left] if isinstance(steering, Script) else ())
    if steering is not None and steering.next_s() < math.inf:
        clock.at(steering.next_s(), fleet.steer, steering)
    with _no_collections():
        run(clock, router, source, lapse)
        seen = _outcome(fleet, tuple(records), clock.now_s)
        while clock.next_s <= seen.end_s + SETTLE_S:
            clock.advance()
    blocks_left = {name: _num_held(worker.engine.pool) for name, worker in fleet.workers.items()}
    handoffs_left = {name: worker.num_handoffs for name, worker in fleet.workers.items()}
    return replace(seen, blocks_left=blocks_left, handoffs_left=handoffs_left)


def _outcome(fleet: VirtualFleet, records: tuple[Record, ...], end_s: float) -> Outcome:
    """Of now. No engine computes for longer than there was time, whatever the sum of its steps is rounded to."""
    everybody = [*fleet.gone, *fleet.workers.values()]
    busy_s = _sums((worker.worker_id, worker.engine.busy_s) for worker in everybody)
    return Outcome(
        records=records,
        end_s=end_s,
        busy_s={name: min(value, end_s) for name, value in busy_s.items()},
        num_steps=_sums((worker.worker_id, worker.engine.num_steps) for worker in everybody),
        num_preemptions=_sums((worker.worker_id, worker.engine.num_preemptions) for worker in everybody),
        blocks_left={},
        handoffs_left={},
        num_prefix_query_tokens=sum(worker.engine.num_prefix_query_tokens for worker in everybody),
        num_prefix_hit_tokens=sum(worker.engine.num_prefix_hit_tokens for worker in everybody),
        num_kv_bytes=fleet.links.num_bytes,
        extrapolation=fleet.extrapolation,
        undone=fleet.end(),
    )


@contextmanager
def _no_collections() -> Iterator[None]:
    """Nothing here makes reference cycles, and looking for them takes a seventh of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _sums(values: Iterable[tuple[str, Number]]) -> dict[str, Number]:
    """By name: a worker that died and its successor have one."""
    found: dict[str, Number] = {}
    for name, value in values:
        found[name] = found[name] + value if name in found else value
    return found


def _num_held(pool: BlockPool) -> int:
    return pool.num_blocks - pool.num_free + pool.num_reserved
