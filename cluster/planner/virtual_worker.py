"""One simulated worker: an engine whose steps only take time, under the roles that it would have.

What `cluster.worker_requests` does for requests, without I/O. One that drains takes nothing new, and who asked for it
hears when it is empty. One that dies is never heard of again; what others ask of it comes to nothing. Knows
nothing of how requests are placed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from pdserve.cluster.planner.clock import Clock
from pdserve.cluster.planner.profile import LinkCost, Overheads
from pdserve.cluster.planner.virtual_decode import VirtualDecode
from pdserve.cluster.planner.virtual_engine import Duration, VirtualEngine
from pdserve.cluster.planner.virtual_links import VirtualLinks
from pdserve.cluster.planner.virtual_prefill import VirtualPrefill
from pdserve.cluster.worker_load import worker_load
from pdserve.engine.plan import SequenceStep
from pdserve.engine.scheduler import Scheduler
from pdserve.engine.turn import Turn
from pdserve.kv_transfer.lease import LeaseTimes
from pdserve.kv_transfer.reservation import Timeouts
from pdserve.proto.types import HandoffId, KVPart, KVTicket, WorkerInfo, WorkerLoad, WorkerRef, WorkerRequest

SWEEP_S = 1.0

Emptied = Callable[["VirtualWorker"], None]


@dataclass(slots=True, eq=False)
class _Drain:
    after_s: float
    emptied: Emptied
    is_under_way: bool = False  # the worker was empty, and what comes of it is on its way


class Listener(Protocol):
    """Who hears of a worker: the router."""

    def token(self, worker: VirtualWorker, step: SequenceStep) -> None: ...

    def load_arrived(self, worker: VirtualWorker) -> None: ...

    def failed(self, handoff: HandoffId, message: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the workers of a simulation share. `link_of` is what KV costs from one to another, by their ids."""

    clock: Clock
    links: VirtualLinks
    link_of: Callable[[str, str], LinkCost]
    workers: Mapping[str, VirtualWorker]
    lease_times: LeaseTimes
    timeouts: Timeouts
    listener: Listener


class VirtualWorker:
    """Owner of one engine and of its roles. A mixed worker hands nothing off: its tables stay empty."""

    def __init__(
        self, info: WorkerInfo, scheduler: Scheduler, duration_s: Duration, overheads: Overheads, around: Surroundings
    ) -> None:
        self.info = info
        self.worker_id = info.worker.worker_id
        self.overheads = overheads
        self.engine = VirtualEngine(around.clock, scheduler, duration_s, self._turn_ended)
        self._around = around
        self._clock = around.clock
        self._listener = around.listener
        handoff_s, fail = overheads.handoff_s, around.listener.failed
        self._prefill = VirtualPrefill(
            info, around.clock, self.engine, around.lease_times, handoff_s, self._offer_to, fail
        )
        self._decode = VirtualDecode(
            info.layout, around.clock, self.engine, around.timeouts, self._arrival_s, self._release_at, fail
        )
        self._turn: Turn | None = None
        self._load: WorkerLoad | None = None
        self._step_s = 0.0
        self._is_dead = False
        self._draining: _Drain | None = None
        self._started_s = self._clock.now_s
        self._is_sweeping = False
        self.engine.post(_nothing)

    @property
    def has_load(self) -> bool:
        """Not before its first turn."""
        return self._turn is not None

    @property
    def load(self) -> WorkerLoad:
        """After the last turn."""
        if self._load is None:
            assert self._turn is not None, "the first turn comes before the first request"
            self._load = worker_load(self.info, self._turn, self._step_s, draining=self._draining is not None)
        return self._load

    @property
    def is_emptied(self) -> bool:
        """Whether it has drained, and waits for what is to come of it."""
        return self._draining is not None and self._draining.is_under_way

    @property
    def num_handoffs(self) -> int:
        """Leases and reservations."""
        return self._prefill.num_leases + self._decode.num_reservations

    def drain(self, after_s: float, emptied: Emptied) -> None:
        """Take nothing new; `emptied(self)`, so long after the last request here has ended. One under way is given up
        for it."""
        self._draining = _Drain(after_s, emptied)
        self._keep_sweeping()
        self.engine.post(_nothing)

    def stay(self) -> None:
        """Drain no more."""
        self._draining = None
        self.engine.post(_nothing)

    def die(self) -> None:
        """Now, whatever it holds."""
        self._is_dead = True
        self.engine.die()

    def peer_gone(self, peer: WorkerRef) -> None:
        """Another worker's process has died."""
        self._prefill.peer_gone(peer)
        self._decode.peer_gone(peer)

    def prefill(self, request: WorkerRequest, hand_off_to: WorkerRef | None) -> None:
        """What the engine's scheduler could finish, as its `check` says."""
        if hand_off_to is not None:
            self._keep_sweeping()
            self._prefill.prefill(request, hand_off_to)
            return
        sequence = self.engine.sequence_type(request, self._clock.now_s)
        self.engine.post(lambda scheduler: scheduler.add(sequence))

    def expect(self, request: WorkerRequest, source: WorkerRef) -> None:
        """Like `prefill`."""
        self._keep_sweeping()
        self._decode.expect(request, source)

    def abort(self, handoff: HandoffId, reason: str) -> None:
        self.engine.post(lambda scheduler: scheduler.abort(handoff))
        self._prefill.abort(handoff, reason)
        self._decode.abort(handoff, reason)

    def offer(self, ticket: KVTicket, part: KVPart) -> None:
        """Another worker has a part for this one. Raises StaleReference or LayoutMismatch."""
        self._decode.offer(ticket, part)

    def release(self, handoff: HandoffId, outcome: str) -> None:
        """Another worker is done with what this one leases."""
        self._prefill.release(handoff, outcome)

    def _peer(self, ref: WorkerRef) -> VirtualWorker | None:
        """That very process, if it lives."""
        worker = self._around.workers.get(ref.worker_id)
        return worker if worker is not None and worker.info.worker == ref else None

    def _offer_to(self, target: WorkerRef, ticket: KVTicket, part: KVPart) -> None:
        worker = self._peer(target)
        if worker is not None and not self._is_dead:
            worker.offer(ticket, part)

    def _release_at(self, source: WorkerRef, handoff: HandoffId, outcome: str) -> None:
        worker = self._peer(source)
        if worker is not None and not self._is_dead:
            worker.release(handoff, outcome)

    def _arrival_s(self, source: WorkerRef, num_bytes: int) -> float:
        cost = self._around.link_of(source.worker_id, self.worker_id)
        return self._around.links.send(source.worker_id, self.worker_id, cost, num_bytes, self._clock.now_s)

    def _turn_ended(self, turn: Turn) -> None:
        self._turn, self._load = turn, None
        step = turn.step
        if step is not None:
            self._step_s = step.duration_s
            for part in step.parts:
                self._prefill.part_computed(part)
            for one in step.sequences:
                if one.position < 2 or one.finish is not None:
                    self._listener.token(self, one)
                if one.finish is not None:  # if with its first token, then there is nothing to hand off
                    self._prefill.finished(one.sequence.request.id)
        self._decode.turn_ended(turn)
        self._listener.load_arrived(self)
        if self._draining is not None:
            self._look_if_empty(self._draining)

    def _look_if_empty(self, drain: _Drain) -> None:
        is_idle = self._prefill.is_idle and self._decode.is_idle
        if is_idle and not self.engine.scheduler.has_work and not drain.is_under_way:
            drain.is_under_way = True
            self._clock.after(drain.after_s, self._emptied, drain)

    def _emptied(self, drain: _Drain) -> None:
        if not self._is_dead and self._draining is drain:
            self._draining = None
            drain.emptied(self)
            self.engine.post(_nothing)

    def _keep_sweeping(self) -> None:
        """At the moments at which a worker that never rests sweeps; one with nothing to look after rests."""
        if not self._is_sweeping:
            self._is_sweeping = True
            num_past = math.floor((self._clock.now_s - self._started_s) / SWEEP_S)
            next_s = self._started_s + (num_past + 1) * SWEEP_S
            self._clock.at(next_s if next_s > self._clock.now_s else next_s + SWEEP_S, self._sweep)  # by rounding

    def _sweep(self) -> None:
        self._is_sweeping = False
        if self._is_dead:
            return
        self._prefill.sweep()
        for source, handoffs in self._decode.sweep().items():
            peer = self._peer(source)
            for lost in handoffs if peer is None else peer._prefill.renew(handoffs):
                self._decode.lost(lost)
        if self._draining is not None and not self._draining.is_under_way:
            self.engine.post(_nothing)  # looks whether it is empty
        if self._draining is not None or not (self._prefill.is_idle and self._decode.is_idle):
            self._keep_sweeping()


def _nothing(scheduler: Scheduler) -> None:
    """Makes an engine take a turn, so that there is a load to tell."""
