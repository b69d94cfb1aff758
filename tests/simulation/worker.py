"""One simulated worker process: the real roles and requests over a simulated engine, network and wires.

Puts them together as `cluster.worker` does, and ends as it does: a failure that nobody expected ends the process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from random import Random
from typing import Any

from prometheus_client import CollectorRegistry
from simulation.engine import EngineSize, SimEngine, SimEngineLoop
from simulation.links import SimLinks
from simulation.loop import Process, SimLoop
from simulation.model import VOCAB_SIZE, SimModel
from simulation.network import Network
from simulation.rpc import Rpc
from simulation.tables import WatchedLeases, WatchedReservations
from simulation.trace import Trace
from simulation.wires import Wires

from pdserve.cluster.fleet_watch import watch_peers
from pdserve.cluster.worker_requests import WorkerRequests
from pdserve.cluster.worker_server import WorkerServices
from pdserve.decode_worker.role import DecodeRole
from pdserve.engine.turn import Turn
from pdserve.kv_transfer.config import KVTransferConfig
from pdserve.kv_transfer.digest import KEYED, Digester
from pdserve.kv_transfer.export import Export
from pdserve.kv_transfer.landing import Landings
from pdserve.kv_transfer.lease import LeaseTimes
from pdserve.kv_transfer.metrics import HandoffMetrics
from pdserve.kv_transfer.peers import Peers
from pdserve.prefill_worker.role import PrefillRole, SourceIdentity
from pdserve.proto import wire
from pdserve.proto import worker_pb2 as pb
from pdserve.proto.clock import now
from pdserve.proto.errors import InternalError
from pdserve.proto.types import HandoffId, Role, WorkerInfo, WorkerRef

CONTROLLER = "controller:1"
SWEEP_S = 0.2
# Numbers for people: they decide nothing, and are dear to set up.
_METRICS = HandoffMetrics("simulated", CollectorRegistry())


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """What a worker is, in all its lives. `lag_s`: how far its event loop may be behind its engine."""

    worker_id: str
    role: Role
    engine: EngineSize
    transfer: KVTransferConfig
    host_id: str
    lag_s: float


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every simulated process shares."""

    loop: SimLoop
    random: Random
    network: Network
    rpc: Rpc
    wires: Wires
    model: SimModel
    bad_logits: Callable[[], bool]


class WatchedServices(WorkerServices):
    """The real ones; nothing may be accepted after its abort, or a second time after its end."""

    def __init__(self, requests: WorkerRequests, on_bug: Callable[[Exception], None], trace: Trace) -> None:
        super().__init__(requests, on_bug)
        self._place = requests.worker_id
        self._trace = trace
        self._aborted: set[HandoffId] = set()
        self._accepted: set[HandoffId] = set()

    async def Prefill(self, request: pb.PrefillRequest, context: Any) -> pb.Ack:
        is_over = self._is_over(request.request.id)
        ack = await super().Prefill(request, context)
        self._accept(request.request.id, is_over)
        return ack

    async def Expect(self, request: pb.ExpectRequest, context: Any) -> pb.Ack:
        is_over = self._is_over(request.request.id)
        ack = await super().Expect(request, context)
        self._accept(request.request.id, is_over)
        return ack

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.Ack:
        self._aborted.add(wire.handoff_from_wire(request.id))
        return await super().Abort(request, context)

    def _is_over(self, message: pb.HandoffId) -> str:
        """Why it must not be accepted, or ""."""
        id = wire.handoff_from_wire(message)
        if id in self._aborted:
            return "after its abort"
        return "again after its end" if id in self._accepted and id not in self._requests._live else ""

    def _accept(self, message: pb.HandoffId, is_over: str) -> None:
        """It was, or this would not be called."""
        self._accepted.add(wire.handoff_from_wire(message))
        if is_over:
            self._trace.violate(self._place, f"accepted {message.request_id}#{message.attempt} {is_over}")


class SimWorker:
    """One life. `on_end(why)` is called when the process gives up."""

    def __init__(
        self,
        plan: WorkerPlan,
        generation: int,
        address: str,
        process: Process,
        around: Surroundings,
        on_end: Callable[[SimWorker, str], None],
    ) -> None:
        self.plan = plan
        self.process = process
        self._around = around
        self._on_end = on_end
        self._trace = around.network.trace
        self._lag_until_s = 0.0
        self.engine = SimEngine(
            plan.engine, around.model, around.random, around.bad_logits, self._trace, plan.worker_id
        )
        self.info = self._describe(WorkerRef(plan.worker_id, generation, address))
        self._engine_loop = SimEngineLoop(self.engine, self._turn_ended, self._crashed, around.loop, process)
        config = plan.transfer
        self._export = Export(self.engine.memory, self.engine.layout, lambda: None)
        self._peers = Peers(config.control_timeout_s, around.rpc.open_channel)
        landings = Landings(self.engine.memory, self.engine.layout)
        self._links = SimLinks(
            around.wires, process, self.info, self._export, landings, config, self._peers, self.engine.pool
        )
        check, post = self.engine.scheduler.check, self._engine_loop.post
        budget, patience_s = config.quarantine_budget_blocks, config.quarantine_patience_s
        self.requests = WorkerRequests(self.info, check, post, budget, patience_s)
        if plan.role in (Role.PREFILL, Role.MIXED):
            self.requests.prefill_role = self._mount_prefill()
        if plan.role in (Role.DECODE, Role.MIXED):
            self.requests.decode_role = self._mount_decode()
        self._turned = asyncio.Event()
        self._is_ending = False

    async def serve(self, on_ready: Callable[[SimWorker], None]) -> None:
        """In the worker's process."""
        self._engine_loop.post(lambda engine: None)
        await self._turned.wait()
        address = self.info.worker.address
        self._around.rpc.listen(address, self.process, (WatchedServices(self.requests, self._crashed, self._trace),))
        if "shm" in self.info.link_address:
            self._around.wires.share(self.info.link_address["shm"], self.engine.memory.numpy())
        self._spawn(self._sweep())
        self._spawn(watch_peers(CONTROLLER, self.peer_gone, self._around.rpc.open_channel))
        on_ready(self)

    def peer_gone(self, worker_id: str, generation: int) -> None:
        self._trace.add(self.plan.worker_id, f"is told that {worker_id} generation {generation} is gone")
        self._links.drop_peer(worker_id, generation)
        self._spawn(self._peers.drop(worker_id, generation))
        self.requests.peer_gone(worker_id, generation)

    def problems(self) -> list[str]:
        """What is left over once nothing should be."""
        pool, requests = self.engine.pool, self.requests
        found = [] if self._turned.is_set() else ["is still starting"]
        try:
            pool.check_integrity()
        except AssertionError as error:
            found.append(str(error))
        if pool.num_free != pool.num_blocks:
            states = {str(pool.state(block)) for block in range(pool.num_blocks)}
            found.append(f"{pool.num_blocks - pool.num_free} blocks are not free: {sorted(states)}")
        if pool.num_reserved:
            found.append(f"{pool.num_reserved} blocks are reserved")
        if self.engine.has_work:
            found.append("the engine has sequences")
        if not requests.is_idle:
            found.append("requests are live")
        if requests.prefill_role is not None and requests.prefill_role._leases.leases:
            found.append("leases are left")
        role = requests.decode_role
        if role is not None:
            for name, left in (
                ("reservations", role._table.reservations),
                ("requests of reservations", role._requests),
                ("timelines", role._timelines),
            ):
                if left:
                    found.append(f"{name} are left: {sorted(map(str, left))}")
        return [f"{self.plan.worker_id}: {problem}" for problem in found]

    def works_on(self, id: HandoffId) -> bool:
        """Whether something will come of it here by itself."""
        prefill, decode = self.requests.prefill_role, self.requests.decode_role
        return (
            id in self.engine.scheduler._by_id
            or (prefill is not None and id in prefill._leases.leases)
            or (decode is not None and id in decode._table.reservations)
        )

    # As in cluster.worker.

    def _turn_ended(self, turn: Turn) -> None:
        self._call_soon(self._on_turn, turn)

    def _on_turn(self, turn: Turn) -> None:
        self.requests.turn_ended(turn)
        self._turned.set()

    def _crashed(self, error: BaseException) -> None:
        self._call_soon(self._on_crash, error)

    def _call_soon(self, function: Callable[..., object], *arguments: object) -> None:
        """Later by the lag of the event loop, in order."""

        def guarded() -> None:
            try:
                function(*arguments)
            except Exception as error:
                self._on_crash(error)

        loop = self._around.loop
        lag_s = self._around.random.uniform(0.0, self.plan.lag_s) * self.process.slowness
        self._lag_until_s = max(self._lag_until_s, loop.now_s + lag_s)
        loop.at(self._lag_until_s, self.process, guarded)

    def _on_crash(self, error: BaseException) -> None:
        self.requests.crashed(error)
        if not self._is_ending:
            self._is_ending = True
            is_quarantine = isinstance(error, InternalError) and "quarantine" in error.message
            if is_quarantine:
                self._trace.count("workers that failed closed")
            else:
                self._trace.violate(self.plan.worker_id, f"crashed: {error!r}")
            self._on_end(self, error.message if isinstance(error, InternalError) else repr(error))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.requests.sweep()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._around.loop.create_task(work, name=getattr(work, "__qualname__", ""))
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._on_crash(error)

    def _describe(self, worker: WorkerRef) -> WorkerInfo:
        plan = self.plan
        kinds = {"shm": f"shm:{worker.address}:{worker.generation}", "gloo": plan.worker_id}
        return WorkerInfo(
            worker=worker,
            role=plan.role,
            layout=self.engine.layout,
            num_blocks=plan.engine.num_blocks,
            max_model_len=plan.engine.max_model_len,
            vocab_size=VOCAB_SIZE,
            host_id=plan.host_id,
            link_address={kind: kinds[kind] for kind in plan.transfer.links},
        )

    def _mount_prefill(self) -> PrefillRole:
        config = self.plan.transfer
        key = config.digest_key_bytes
        role = PrefillRole(
            identity=SourceIdentity(self.info.worker, self.info.host_id, self.info.link_address),
            loop=self._engine_loop,
            export=self._export,
            digester=Digester(KEYED if key else "xxh3", key),
            sender=self._links,
            peers=self._peers,
            spawn=self._spawn,
            fail=self.requests.fail,
            done=self.requests.end,
            times=LeaseTimes(config.lease_s, config.offer_retry_s),
        )
        role._leases = WatchedLeases(role._times, self._trace, self.plan.worker_id)
        return role

    def _mount_decode(self) -> DecodeRole:
        role = DecodeRole(
            layout=self.info.layout,
            timeouts=self.plan.transfer.timeouts,
            loop=self._engine_loop,
            receiver=self._links,
            peers=self._peers,
            metrics=_METRICS,
            spawn=self._spawn,
            fail=self.requests.fail,
        )
        table = WatchedReservations(self.info.layout, self.plan.transfer.timeouts, self._trace, self.plan.worker_id)
        role._table = table
        self._links.on_verified = table.verified
        return role


def clock_of(process: Process) -> float:
    """Its time, from outside."""
    return process.context.run(now)
