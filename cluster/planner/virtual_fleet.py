"""The workers of a simulation: made from a configuration and profiles, lost, replaced, turned, started and stopped.

Which profile a worker has is by its name, else by its role: `{"decode-1": slow, "decode": fast, ...}`. Two workers use
the first kind of link that the configuration prefers and both profiles have; `HOST_LINKS` only within one host. Knows
nothing of requests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

from pdserve.cluster.config import ClusterConfig
from pdserve.cluster.planner.clock import Clock
from pdserve.cluster.planner.counting_pool import CountingPool
from pdserve.cluster.planner.profile import LinkCost, Profile
from pdserve.cluster.planner.standing import StandingScheduler, are_rules_known
from pdserve.cluster.planner.steering import Action, Fail, Flip, Start, Steering
from pdserve.cluster.planner.step_model import Extrapolation, StepModel
from pdserve.cluster.planner.step_shape import Company, StepShape
from pdserve.cluster.planner.virtual_links import VirtualLinks
from pdserve.cluster.planner.virtual_worker import SWEEP_S, Listener, Surroundings, VirtualWorker
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.config import EngineConfig
from pdserve.engine.scheduler import Scheduler
from pdserve.kv_transfer.lease import LeaseTimes
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import KVLayout, Role, WorkerInfo, WorkerRef

HOST_LINKS = frozenset({"loopback", "shm", "cuda_ipc"})

Profiles = Mapping[str, Profile] | Mapping[Role, Profile]


class FleetListener(Listener, Protocol):
    """Who hears of the workers, and of their coming and going."""

    def joined(self, worker: VirtualWorker) -> None: ...

    def lost(self, worker: VirtualWorker) -> None: ...

    def left(self, worker: VirtualWorker) -> None: ...

    def needs(self, worker: VirtualWorker) -> bool: ...

    @property
    def num_queued(self) -> int: ...


class _Step(NamedTuple):
    """What a worker computes, as those beside it feel it."""

    until_s: float
    is_prefill: bool


NO_STEP = _Step(0.0, False)


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """How engines are simulated: token by token, and whether prompts that begin alike find each other's KV."""

    is_exact: bool
    are_prompts_shared: bool
    workers_per_host: int | None


class VirtualFleet:
    """Owner of the workers, of those that are gone for good too: what they did counts."""

    def __init__(
        self,
        config: ClusterConfig,
        profiles: Profiles,
        clock: Clock,
        listener: FleetListener,
        choice: EngineChoice,
    ) -> None:
        self.extrapolation = Extrapolation()
        self.links = VirtualLinks()
        self.workers: dict[str, VirtualWorker] = {}
        self.gone: list[VirtualWorker] = []
        self._config = config
        self._profiles = {str(name): profile for name, profile in profiles.items()}
        self._clock = clock
        self._listener = listener
        self._choice = choice
        self._costs: dict[tuple[str, str], LinkCost] = {}
        self._hosts: dict[str, int] = {}
        self._models: dict[int, StepModel] = {}  # by the identity of the profile: two may have one name
        self._is_exact = choice.is_exact or not are_rules_known()
        self._under_way: dict[int, dict[str, _Step]] = defaultdict(dict)  # by host, of workers that disturb others
        self._layouts: dict[KVLayout, KVLayout] = {}  # one object for all that are equal: quickly seen to be
        transfer = config.kv_transfer
        self._around = Surroundings(
            clock=clock,
            links=self.links,
            link_of=self._link,
            workers=self.workers,
            lease_times=LeaseTimes(transfer.lease_s, transfer.offer_retry_s),
            timeouts=transfer.timeouts,
            listener=listener,
        )
        for name, role in self._names():
            self._place_on_host(name)
            self._join(name, role, 1)
        self._check_links()

    def steer(self, steering: Steering) -> None:
        """Ask now and at its next moment."""
        now_s = self._clock.now_s
        loads = [worker.load for worker in self.workers.values() if worker.has_load]
        for action in steering.act(now_s, loads, self._listener.num_queued):
            self._carry_out(action)
        next_s = steering.next_s()
        if next_s < float("inf"):
            self._clock.at(max(now_s, next_s), self.steer, steering)

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, Start):
            self._start(action.role)
            return
        worker = self.workers.get(action.worker_id)
        if worker is None:
            return
        if isinstance(action, Fail):
            self._lose(worker, action.back_after_s)
        elif not isinstance(action, Flip):
            worker.drain(0.0, self._leave)
        elif action.role is not worker.info.role:
            flip_s = self._profile(action.worker_id, worker.info.role).flip_s
            worker.drain(flip_s, partial(self._turned, role=action.role))

    def _start(self, role: Role) -> None:
        """One more, under the first name that nobody ever had."""
        ordinal = 0
        while (name := f"{role}-{ordinal}") in self._hosts:
            ordinal += 1
        self._place_on_host(name)
        self._clock.after(self._profile(name, role).startup_s, self._join, name, role, 1)

    def _leave(self, worker: VirtualWorker) -> None:
        """It is empty; but a request may be on its way to it still."""
        if self._listener.needs(worker):
            worker.drain(SWEEP_S, self._leave)
            return
        self._listener.left(worker)
        self._bury(worker)

    def _turned(self, worker: VirtualWorker, role: Role) -> None:
        """It is empty and has the other role from now on."""
        engine, scheduler = self._config.engine_for(role), worker.engine.scheduler
        scheduler.max_num_seqs, scheduler.max_num_batched_tokens = engine.max_num_seqs, engine.max_num_batched_tokens
        worker.info = replace(worker.info, role=role)

    def _lose(self, worker: VirtualWorker, back_after_s: float) -> None:
        self._bury(worker)
        self._listener.lost(worker)
        for other in self.workers.values():
            other.peer_gone(worker.info.worker)
        if back_after_s < float("inf"):
            ref = worker.info.worker
            self._clock.after(back_after_s, self._join, ref.worker_id, worker.info.role, ref.generation + 1)

    def _bury(self, worker: VirtualWorker) -> None:
        name = worker.worker_id
        del self.workers[name]
        self.gone.append(worker)
        worker.die()
        self._under_way[self._hosts[name]].pop(name, None)

    def _place_on_host(self, name: str) -> None:
        num_placed = len(self._hosts)
        self._hosts[name] = num_placed // (self._choice.workers_per_host or num_placed + 1)

    def _names(self) -> Iterator[tuple[str, Role]]:
        for role in Role:
            for ordinal in range(self._config.replicas(role)):
                yield f"{role}-{ordinal}", role

    def _profile(self, name: str, role: Role) -> Profile:
        profile = self._profiles.get(name) or self._profiles.get(str(role))
        if profile is None:
            raise ConfigError(f"profile: there is none for {role} workers")
        return profile

    def _join(self, name: str, role: Role, generation: int) -> None:
        profile, engine = self._profile(name, role), self._config.engine_for(role)
        num_blocks = _num_blocks(engine, profile)
        max_model_len = min(engine.max_model_len or profile.max_model_len, num_blocks * engine.block_size + 1)
        prefix_caching = engine.prefix_caching and self._choice.are_prompts_shared
        make_scheduler = Scheduler if self._is_exact else StandingScheduler
        make_pool = BlockPool if self._is_exact or prefix_caching else CountingPool
        scheduler = make_scheduler(
            make_pool(num_blocks),
            block_size=engine.block_size,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_model_len=max_model_len,
            prefix_caching=prefix_caching,
        )
        # Two bytes an element: any number of bytes a token that is a multiple of 4.
        layout = KVLayout(profile.model, "float16", 1, 1, max(1, profile.kv_bytes_per_token // 4), engine.block_size)
        layout = self._layouts.setdefault(layout, layout)
        info = WorkerInfo(WorkerRef(name, generation, name), role, layout, num_blocks, max_model_len, 1, "")
        worker = VirtualWorker(info, scheduler, self._durations(name, profile), profile.overheads, self._around)
        self.workers[name] = worker
        self._listener.joined(worker)

    def _durations(self, name: str, profile: Profile) -> Callable[[StepShape], float]:
        model = self._models.get(id(profile))
        if model is None:
            model = self._models[id(profile)] = StepModel(profile)
        see, clock = self.extrapolation.see, self._clock
        under_way = self._under_way[self._hosts[name]]

        def duration_s(shape: StepShape) -> float:
            see(model, shape)
            return model.duration_s(shape)

        def beside_others_s(shape: StepShape) -> float:
            """Who computes when a step begins counts for all of it."""
            see(model, shape)
            now_s = clock.now_s
            under_way[name] = NO_STEP
            kinds = [step.is_prefill for step in under_way.values() if step.until_s > now_s]
            num_others, num_prefills = max(1, len(under_way) - 1), sum(kinds)
            company = Company(num_prefills / num_others, (len(kinds) - num_prefills) / num_others)
            seconds = model.contended_s(shape, company)
            under_way[name] = _Step(now_s + seconds, shape.num_prefill_tokens > 0)
            return seconds

        if profile.contention is None:
            return duration_s
        under_way[name] = NO_STEP
        return beside_others_s

    def _link(self, source_id: str, target_id: str) -> LinkCost:
        """Of the slower side."""
        cost = self._costs.get((source_id, target_id))
        if cost is not None:
            return cost
        ways = [self._profile(name, self.workers[name].info.role).links for name in (source_id, target_id)]
        is_near = self._hosts[source_id] == self._hosts[target_id]
        kinds = (kind for kind in self._config.kv_transfer.links if is_near or kind not in HOST_LINKS)
        kind = next((kind for kind in kinds if all(kind in way for way in ways)), None)
        if kind is None:
            where = "both profiles" if is_near else "both profiles for workers on different hosts"
            raise ConfigError(f"kv_transfer.links: none of {self._config.kv_transfer.links} is in {where}")
        cost = LinkCost(
            latency_s=max(way[kind].latency_s for way in ways),
            bandwidth_bytes_per_s=min(way[kind].bandwidth_bytes_per_s for way in ways),
        )
        self._costs[source_id, target_id] = cost
        return cost

    def _check_links(self) -> None:
        """Of one pair of each two hosts and profiles: what cannot work is said before anything runs."""
        sides: dict[Role, dict[tuple[int, int], str]] = {role: {} for role in Role}
        for name, worker in self.workers.items():
            role = worker.info.role
            sides[role].setdefault((self._hosts[name], id(self._profile(name, role))), name)
        for source_id in sides[Role.PREFILL].values():
            for target_id in sides[Role.DECODE].values():
                self._link(source_id, target_id)


def _num_blocks(engine: EngineConfig, profile: Profile) -> int:
    """As `engine.engine` sizes its pool; what a GPU's memory leaves is what the profile found."""
    if engine.num_blocks is not None:
        return engine.num_blocks
    if profile.num_gpus:
        return max(1, profile.kv_capacity_tokens // engine.block_size)
    block_bytes = profile.kv_bytes_per_token * engine.block_size
    if engine.kv_cache_memory_bytes < block_bytes:
        raise ConfigError(
            f"engine.kv_cache_memory_bytes: {engine.kv_cache_memory_bytes} bytes hold no KV block; "
            f"one of {profile.name} takes {block_bytes}"
        )
    return engine.kv_cache_memory_bytes // block_bytes
