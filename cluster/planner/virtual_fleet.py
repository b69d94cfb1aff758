"""The workers of a simulation: made from a configuration and profiles, lost, replaced, turned, started and stopped.

What each of them runs on is `virtual_machines`'. Of orders to one worker the last one counts; what of them was not
carried out is kept, with the reason. Knows nothing of requests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

from pdserve.cluster.config import ClusterConfig
from pdserve.cluster.planner.clock import Clock
from pdserve.cluster.planner.counting_pool import CountingPool
from pdserve.cluster.planner.profile import Profile
from pdserve.cluster.planner.standing import StandingScheduler, are_rules_known
from pdserve.cluster.planner.steering import Action, Fail, Flip, Start, Steering, Stop, Undone
from pdserve.cluster.planner.step_model import Extrapolation, StepModel
from pdserve.cluster.planner.step_shape import Company, StepShape
from pdserve.cluster.planner.virtual_links import VirtualLinks
from pdserve.cluster.planner.virtual_machines import Post, Profiles, VirtualMachines
from pdserve.cluster.planner.virtual_worker import SWEEP_S, Listener, Surroundings, VirtualWorker
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.config import EngineConfig
from pdserve.engine.scheduler import Scheduler
from pdserve.kv_transfer.lease import LeaseTimes
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import KVLayout, Role, WorkerInfo, WorkerRef


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
        self._machines = VirtualMachines(profiles, config.kv_transfer.links, choice.workers_per_host)
        self._clock = clock
        self._listener = listener
        self._choice = choice
        self._is_over = False
        self._undone: list[Undone] = []
        self._wishes: dict[str, tuple[float, Flip | Stop]] = {}  # what drains are for, by worker, with their moments
        self._models: dict[int, StepModel] = {}  # by the identity of the profile: two may have one name
        self._is_exact = choice.is_exact or not are_rules_known()
        self._under_way: dict[int, dict[str, _Step]] = defaultdict(dict)  # by host, of workers that disturb others
        self._layouts: dict[KVLayout, KVLayout] = {}  # one object for all that are equal: quickly seen to be
        transfer = config.kv_transfer
        self._around = Surroundings(
            clock=clock,
            links=self.links,
            link_of=self._machines.link,
            workers=self.workers,
            lease_times=LeaseTimes(transfer.lease_s, transfer.offer_retry_s),
            timeouts=transfer.timeouts,
            listener=listener,
        )
        for name, role in self._names():
            self._machines.place(name, role)
            self._join(name, role, 1)

    def check(self, actions: Iterable[Action]) -> None:
        """That the workers can do their work, now and in the roles that these actions, in order of time, give them.

        Raises:
            ConfigError: one has no profile, no pool or no link.
        """
        now = [Post(self._machines[name], worker.info.role) for name, worker in self.workers.items()]
        to_come = list(self._machines.foreseen(actions))
        for post in to_come:
            try:
                _num_blocks(self._config.engine_for(post.role), post.machine.profile)
            except ConfigError as error:
                raise ConfigError(f"{post.why}{error.message}") from error
        self._machines.check_links([*now, *to_come])

    def steer(self, steering: Steering) -> None:
        """Ask now and at its next moment."""
        if self._is_over:
            return
        now_s = self._clock.now_s
        loads = [worker.load for worker in self.workers.values() if worker.has_load]
        for action in steering.act(now_s, loads, self._listener.num_queued):
            self._carry_out(action)
        next_s = steering.next_s()
        if next_s < float("inf"):
            self._clock.at(max(now_s, next_s), self.steer, steering)

    def end(self) -> tuple[Undone, ...]:
        """Steered no more, for the last request has ended: what did not happen until now."""
        self._is_over = True
        for name in list(self._wishes):
            self._withdraw(name, "it still had requests, or was on its way, when the last request of all had ended")
        return tuple(self._undone)

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, Start):
            name = self._machines.place_another(action.role)
            self._clock.after(self._machines[name].profile.startup_s, self._join, name, action.role, 1)
            return
        worker = self.workers.get(action.worker_id)
        if worker is None:
            is_known = action.worker_id in self._machines
            self._leave_undone(action, "it was not alive then" if is_known else "there is no such worker")
        elif isinstance(action, Fail):
            self._lose(worker, action.back_after_s)
        else:
            self._send_away(worker, action)

    def _send_away(self, worker: VirtualWorker, wish: Flip | Stop) -> None:
        """From its role; or back to it, if it was to leave it."""
        name, has_role = worker.worker_id, isinstance(wish, Flip) and wish.role is worker.info.role
        before = self._wishes.get(name)
        if before is None and has_role:
            self._leave_undone(wish, f"it was a {worker.info.role} worker already")
            return
        if before is not None and before[1] == wish:
            self._leave_undone(wish, "it was on its way already")
            return
        self._withdraw(name, "a later order took its place")
        if has_role and not worker.is_emptied:
            worker.stay()
            return
        self._wishes[name] = self._clock.now_s, wish
        if isinstance(wish, Flip):
            worker.drain(self._machines[name].profile.flip_s, partial(self._turned, role=wish.role))
        else:
            worker.drain(0.0, self._leave)

    def _withdraw(self, name: str, why: str) -> None:
        wish = self._wishes.pop(name, None)
        if wish is not None:
            self._undone.append(Undone(*wish, why))

    def _leave_undone(self, action: Action, why: str) -> None:
        self._undone.append(Undone(self._clock.now_s, action, why))

    def _leave(self, worker: VirtualWorker) -> None:
        """It is empty; but a request may be on its way to it still."""
        if self._listener.needs(worker):
            worker.drain(SWEEP_S, self._leave)
            return
        self._wishes.pop(worker.worker_id, None)
        self._listener.left(worker)
        self._bury(worker)

    def _turned(self, worker: VirtualWorker, role: Role) -> None:
        """It is empty and has the other role from now on."""
        engine, scheduler = self._config.engine_for(role), worker.engine.scheduler
        scheduler.max_num_seqs, scheduler.max_num_batched_tokens = engine.max_num_seqs, engine.max_num_batched_tokens
        worker.info = replace(worker.info, role=role)
        self._wishes.pop(worker.worker_id, None)

    def _lose(self, worker: VirtualWorker, back_after_s: float) -> None:
        self._withdraw(worker.worker_id, "it died before")
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
        self._under_way[self._machines[name].host].pop(name, None)

    def _names(self) -> Iterator[tuple[str, Role]]:
        for role in Role:
            for ordinal in range(self._config.replicas(role)):
                yield f"{role}-{ordinal}", role

    def _join(self, name: str, role: Role, generation: int) -> None:
        profile, engine = self._machines[name].profile, self._config.engine_for(role)
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
        under_way = self._under_way[self._machines[name].host]

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
