"""One worker: an engine in its own thread, a gRPC server, and the roles mounted over them.

    load -> serve -> [requests ... turns of the engine ... events] -> ended

Everything here runs on one event loop, except what is posted to the engine's thread. A turn of the engine comes back
as `_on_turn`: its tokens become events, its hand-offs go to the prefill role, its load goes out with the events, all
in one message. Knows nothing of Ray; which requests it gets is the router's decision.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from pdserve.cluster.fleet_watch import watch_peers
from pdserve.cluster.output_hub import OutputHub, OutputStream
from pdserve.cluster.worker_links import WorkerLinks
from pdserve.cluster.worker_server import WorkerServer
from pdserve.cluster.worker_spec import WorkerSpec
from pdserve.decode_worker.role import DecodeRole
from pdserve.engine.engine import Engine, build_engine
from pdserve.engine.loop import EngineLoop, Turn
from pdserve.engine.metrics import EngineMetrics
from pdserve.engine.scheduler import SequenceStep
from pdserve.engine.sequence import Sequence
from pdserve.kv_transfer.metrics import HandoffMetrics
from pdserve.kv_transfer.peers import Peers
from pdserve.kv_transfer.shared_pool import SharedPool, host_id
from pdserve.prefill_worker.role import PrefillRole, SourceIdentity
from pdserve.proto.errors import DeadlineExceeded, InternalError, PdserveError, StaleReference, WrongRole
from pdserve.proto.types import (
    EventError,
    HandoffId,
    Phases,
    Role,
    SequenceEvent,
    WorkerInfo,
    WorkerLoad,
    WorkerRef,
    WorkerRequest,
)

logger = logging.getLogger(__name__)
SWEEP_S = 0.2
DEADLINE_GRACE_S = 1.0
STOP_TIMEOUT_S = 5.0
FIRST_TURN_TIMEOUT_S = 10.0
MAX_REMEMBERED = 8192  # aborted ids: an accept that was overtaken by its abort must not start


class Worker:
    """Owner of the event loop's side: live requests, output streams, roles."""

    def __init__(self, spec: WorkerSpec, engine: Engine, memory: SharedPool) -> None:
        self._spec = spec
        self._engine = engine
        self._memory = memory
        self._blocks = engine.cache.bytes_view()  # uint8 [num_blocks, block_bytes]
        self._metrics = EngineMetrics(spec.worker_id, spec.role, Path(spec.model).name)
        self._hub = OutputHub()
        self._deadlines: dict[HandoffId, float] = {}
        self._aborted: OrderedDict[HandoffId, None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn: Turn | None = None
        self._last_step_s = 0.0
        self._turned = asyncio.Event()

    @classmethod
    def load(cls, spec: WorkerSpec) -> Worker:
        """Load the model into shared memory that peers on this host can read. Blocking.

        Raises:
            ModelError: the model cannot be served.
        """
        memory: list[SharedPool] = []

        def allocate(num_bytes: int) -> Any:
            memory.append(SharedPool(num_bytes))
            return memory[0].tensor

        engine = build_engine(Path(spec.model), spec.engine, allocate)
        return cls(spec, engine, memory[0])

    async def serve(self) -> WorkerInfo:
        """Start the engine's thread, the roles and the server; how to reach them."""
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[str] = self._loop.create_future()
        self._server = WorkerServer(self)
        port = await self._server.start(self._spec.host)
        self.info = self._describe(port)
        self._engine_loop = EngineLoop(self._engine, self._turn_ended, self._engine_crashed)
        self._peers = Peers(self._spec.kv_transfer.control_timeout_s)
        self._links = WorkerLinks(self.info, self._blocks, self._spec.kv_transfer, self._peers)
        self.prefill_role = self._mount_prefill() if self._spec.role in (Role.PREFILL, Role.MIXED) else None
        self.decode_role = self._mount_decode() if self._spec.role in (Role.DECODE, Role.MIXED) else None
        self._engine_loop.start()
        self._engine_loop.post(lambda engine: None)  # a first turn, so that there is a load to tell
        async with asyncio.timeout(FIRST_TURN_TIMEOUT_S):
            await self._turned.wait()
        self._spawn(self._sweep())
        self._spawn(watch_peers(self._spec.controller, self._peer_gone))
        return self.info

    async def ended(self) -> str:
        """Wait until the engine crashed or the worker was stopped; why."""
        return await self._ended

    async def stop(self) -> None:
        """End everything that was started. Idempotent."""
        if not self._ended.done():
            self._ended.set_result("stopped")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.stop()
        await asyncio.to_thread(self._engine_loop.stop, STOP_TIMEOUT_S)
        await self._peers.close()
        self._links.close()
        self._metrics.close()
        self._memory.close()

    # Requests, called by the server.

    async def prefill(self, request: WorkerRequest, hand_off_to: WorkerRef | None) -> None:
        """Accept a prompt. Repeating an accepted request changes nothing."""
        if not self._is_new(request):
            return
        self._engine.scheduler.check(request, hand_off_to is not None)
        if hand_off_to is not None:
            if self.prefill_role is None:
                raise WrongRole(f"{self._spec.worker_id} does not prefill for others; it is a {self._spec.role} worker")
            self._accept(request)
            self.prefill_role.prefill(request, hand_off_to)
        else:
            if self.decode_role is None:
                raise WrongRole(f"{self._spec.worker_id} does not decode; it is a {self._spec.role} worker")
            self._accept(request)
            sequence = Sequence(request, time.monotonic())
            self._engine_loop.post(lambda engine: engine.add(sequence))

    async def expect(self, request: WorkerRequest, source: WorkerRef) -> None:
        """Accept the decode leg of a request whose KV will come from `source`."""
        if self.decode_role is None:
            raise WrongRole(f"{self._spec.worker_id} does not decode; it is a {self._spec.role} worker")
        if not self._is_new(request):
            return
        self._engine.scheduler.check(request)
        self.decode_role.expect(request, source)
        self._accept(request)

    def abort(self, handoff: HandoffId, reason: str) -> None:
        """Stop work on a request and free its blocks, wherever it is. Nothing more is accepted under its id."""
        self._deadlines.pop(handoff, None)
        self._aborted[handoff] = None
        if len(self._aborted) > MAX_REMEMBERED:
            self._aborted.popitem(last=False)
        self._engine_loop.post(lambda engine: engine.abort(handoff))
        if self.prefill_role is not None:
            self.prefill_role.abort(handoff, reason)
        if self.decode_role is not None:
            self.decode_role.abort(handoff, reason)

    def open_stream(self, epoch: int) -> OutputStream:
        return self._hub.open(epoch, self.load_now())

    def close_stream(self, epoch: int, stream: OutputStream) -> None:
        """A router's stream ended: nobody will read its sequences' tokens, so they end too."""
        if self._hub.close(epoch, stream):
            for handoff in [handoff for handoff in self._deadlines if handoff.epoch == epoch]:
                self.abort(handoff, "the router's output stream ended")

    def load_now(self) -> WorkerLoad:
        """The load after the last turn."""
        turn = self._turn
        assert turn is not None, "the first turn precedes the server's readiness"
        pool = turn.pool
        return WorkerLoad(
            worker_id=self._spec.worker_id,
            generation=self.info.worker.generation,
            role=self._spec.role,
            num_waiting=turn.num_waiting,
            num_running=turn.num_running,
            queued_tokens=turn.queued_tokens,
            total_blocks=pool.total,
            free_blocks=pool.free,
            running_blocks=pool.running,
            leased_blocks=pool.leased,
            receiving_blocks=pool.receiving,
            quarantined_blocks=pool.quarantined,
            reserved_blocks=pool.reserved,
            step_s=self._last_step_s,
            draining=False,
            num_steps=turn.num_steps,
            num_preemptions=turn.num_preemptions,
        )

    # Turns of the engine.

    def _turn_ended(self, turn: Turn) -> None:
        """In the engine's thread."""
        self._loop.call_soon_threadsafe(self._on_turn, turn)

    def _on_turn(self, turn: Turn) -> None:
        self._turn = turn
        self._turned.set()
        if turn.step is not None:
            self._last_step_s = turn.step.duration_s
        for step in turn.step.sequences if turn.step is not None else ():
            self._on_sequence(step)
        self._metrics.observe(turn)
        if self.decode_role is not None:
            self.decode_role.turn_ended(turn)
        self._hub.flush(self.load_now())

    def _on_sequence(self, step: SequenceStep) -> None:
        """Tell the router, and the prefill role if the sequence leaves here with a ticket."""
        sequence, handoff = step.sequence, step.sequence.request.id
        if step.error is not None:
            self._fail(handoff, step.error)
            return
        assert step.token is not None
        last = step.finish is not None or step.handed_off
        event = SequenceEvent(
            id=handoff,
            index=step.index,
            tokens=(step.token,),
            finish_reason=step.finish.reason if step.finish else None,
            stop_token_id=step.finish.stop_token_id if step.finish else None,
            phases=self._phases(sequence) if last else None,
        )
        self._hub.emit(event)
        if step.finish is not None:
            self._forget(handoff)
        elif step.handed_off:
            assert self.prefill_role is not None
            self.prefill_role.handed_off(sequence, step.token.token_id)

    def _phases(self, sequence: Sequence) -> Phases:
        """Of a sequence that leaves this worker."""
        if self.decode_role is None:
            return sequence.phases
        return sequence.phases + self.decode_role.finished(sequence.request.id)

    def _engine_crashed(self, error: BaseException) -> None:
        """In the engine's thread."""
        self._loop.call_soon_threadsafe(self._on_crash, error)

    def _on_crash(self, error: BaseException) -> None:
        """A bug in the engine ends the worker: its state can no longer be trusted."""
        opaque = secrets.token_hex(6)
        logger.error("engine crashed (%s)", opaque, exc_info=error)
        for handoff in list(self._deadlines):
            self._fail(handoff, InternalError(f"{self._spec.worker_id}: internal error {opaque}"))
        self._hub.flush(self.load_now())
        if not self._ended.done():
            self._ended.set_result(f"engine crashed: {type(error).__name__} ({opaque})")

    # Requests' ends.

    def _is_new(self, request: WorkerRequest) -> bool:
        """False for a repeated accept.

        Raises:
            StaleReference: nobody would read its tokens, or it was aborted already.
        """
        self._hub.require(request.id.epoch)
        if request.id in self._aborted:
            raise StaleReference(f"{request.id} was aborted")
        return request.id not in self._deadlines

    def _accept(self, request: WorkerRequest) -> None:
        self._deadlines[request.id] = time.monotonic() + request.timeout_s + DEADLINE_GRACE_S

    def _forget(self, handoff: HandoffId) -> None:
        self._deadlines.pop(handoff, None)
        if self.prefill_role is not None:
            self.prefill_role.finished(handoff)

    def _fail(self, handoff: HandoffId, error: PdserveError) -> None:
        """End a request here with an error; the router hears of it at once."""
        if self._deadlines.pop(handoff, None) is None:
            return  # it ended already
        self.abort(handoff, error.message)
        self._hub.emit(SequenceEvent(id=handoff, index=0, error=EventError(type(error).__name__, error.message)))
        if self._turn is not None:
            self._hub.flush(self.load_now())

    def _peer_gone(self, worker_id: str, generation: int) -> None:
        """A peer process died: end what waits for it, and let go of its memory."""
        logger.warning("%s is gone", worker_id)
        self._links.drop_peer(worker_id, generation)
        if self.prefill_role is not None:
            self.prefill_role.peer_gone(worker_id, generation)
        if self.decode_role is not None:
            self.decode_role.peer_gone(worker_id, generation)

    async def _sweep(self) -> None:
        """Deadlines of everything, also while nothing else happens."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now_s = time.monotonic()
            for handoff in [handoff for handoff, deadline_s in self._deadlines.items() if now_s >= deadline_s]:
                self._fail(handoff, DeadlineExceeded("the deadline passed"))
            if self.prefill_role is not None:
                self.prefill_role.sweep(now_s)
            if self.decode_role is not None:
                self.decode_role.sweep(now_s)
            self._check_quarantine()

    def _check_quarantine(self) -> None:
        """A wire that never falls idle eats the pool: past the budget the worker gives up, to be replaced."""
        quarantined, budget = self.load_now().quarantined_blocks, self._spec.kv_transfer.quarantine_budget_blocks
        if quarantined > budget:
            raise InternalError(f"{quarantined} blocks are in quarantine, {budget} are allowed")

    # Assembly.

    def _describe(self, port: int) -> WorkerInfo:
        spec = self._spec
        address = f"{spec.host}:{port}"
        return WorkerInfo(
            worker=WorkerRef(spec.worker_id, secrets.randbits(63) | 1, address),
            role=spec.role,
            layout=self._engine.loaded.layout,
            num_blocks=self._engine.pool.num_blocks,
            max_model_len=self._engine.max_model_len,
            vocab_size=self._engine.loaded.vocab_size,
            host_id=host_id(),
            link_address=WorkerLinks.addresses(spec.kv_transfer, self._memory),
            metrics_address=self._metrics.serve(spec.host),
            cores=tuple(sorted(os.sched_getaffinity(0))),
            pid=os.getpid(),
        )

    def _mount_prefill(self) -> PrefillRole:
        info = self.info
        return PrefillRole(
            identity=SourceIdentity(info.worker, info.layout, info.host_id, info.link_address),
            loop=self._engine_loop,
            blocks=self._blocks,
            sender=self._links,
            peers=self._peers,
            spawn=self._spawn,
            fail=self._fail,
            done=self._forget,
            lease_s=self._spec.kv_transfer.lease_s,
        )

    def _mount_decode(self) -> DecodeRole:
        return DecodeRole(
            info=self.info,
            config=self._spec.kv_transfer,
            loop=self._engine_loop,
            call_soon=self._loop.call_soon_threadsafe,
            blocks=self._blocks,
            receiver=self._links,
            peers=self._peers,
            metrics=HandoffMetrics(self._spec.worker_id, self._metrics.registry),
            spawn=self._spawn,
            fail=self._fail,
        )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run beside everything else; a failure that nobody expected ends the worker, it is not swallowed."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._on_crash(error)
