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
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from pdserve.cluster.fleet_watch import watch_peers
from pdserve.cluster.live_requests import LiveRequests
from pdserve.cluster.output_hub import OutputHub, OutputStream
from pdserve.cluster.worker_links import WorkerLinks
from pdserve.cluster.worker_load import worker_load
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
from pdserve.proto.errors import ConfigError, DeadlineExceeded, InternalError, PdserveError, Unavailable, WrongRole
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
INTEGRITY_S = 30.0


class Worker:
    """Owner of the event loop's side: live requests, output streams, roles."""

    def __init__(self, spec: WorkerSpec, engine: Engine, memory: SharedPool) -> None:
        self._spec = spec
        self._engine = engine
        self._memory = memory
        self._blocks = engine.cache.bytes_view()  # uint8 [num_blocks, block_bytes]
        self._metrics = EngineMetrics(spec.worker_id, spec.role, Path(spec.model).name)
        self._hub = OutputHub()
        self._live = LiveRequests()
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
        if spec.engine.device == "cuda":
            raise ConfigError("engine.device: workers keep their KV pool in host memory so far; cuda is not served yet")
        memory: list[SharedPool] = []

        def allocate(num_bytes: int) -> Any:
            memory.append(SharedPool(num_bytes))
            return memory[0].tensor

        config = spec.engine.model_copy(update={"device": "cpu"})
        engine = build_engine(Path(spec.model), config, allocate)
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
        self._live.abort(handoff)
        self._engine_loop.post(lambda engine: engine.abort(handoff))
        if self.prefill_role is not None:
            self.prefill_role.abort(handoff, reason)
        if self.decode_role is not None:
            self.decode_role.abort(handoff, reason)

    def open_stream(self, epoch: int) -> OutputStream:
        """A router's stream; one that comes while another is open means that the router has given that one up."""
        self._abort_epoch(epoch)
        return self._hub.open(epoch, self.load_now())

    def close_stream(self, epoch: int, stream: OutputStream) -> None:
        """A router's stream ended: nobody will read its sequences' tokens, so they end too."""
        if self._hub.close(epoch, stream):
            self._abort_epoch(epoch)

    def _abort_epoch(self, epoch: int) -> None:
        for handoff in self._live.of_epoch(epoch):
            self.abort(handoff, "the router's output stream ended")

    def load_now(self) -> WorkerLoad:
        """The load after the last turn."""
        assert self._turn is not None, "the first turn precedes the server's readiness"
        return worker_load(self.info, self._turn, self._last_step_s)

    # Turns of the engine.

    def _turn_ended(self, turn: Turn) -> None:
        """In the engine's thread."""
        self._call_soon(self._on_turn, turn)

    def _call_soon(self, function: Callable[..., object], *arguments: object) -> None:
        """Run on the event loop, from any thread. A failure that nobody expected ends the worker."""

        def guarded() -> None:
            try:
                function(*arguments)
            except Exception as error:
                self._on_crash(error)

        self._loop.call_soon_threadsafe(guarded)

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
        if step.handed_off:
            assert self.prefill_role is not None
            assert step.token is not None
            self.prefill_role.handed_off(sequence, step.token.token_id)
        if handoff not in self._live:
            return  # it ended while the step ran: nothing is said after the last word
        if step.error is not None:
            self._fail(handoff, step.error)
            return
        assert step.token is not None
        ends = step.finish is not None or step.handed_off
        begins = step.index == (1 if sequence.num_transferred_tokens else 0)  # its first token from this worker
        event = SequenceEvent(
            id=handoff,
            index=step.index,
            tokens=(step.token,),
            finish_reason=step.finish.reason if step.finish else None,
            stop_token_id=step.finish.stop_token_id if step.finish else None,
            phases=self._phases(sequence) if ends or begins else None,
        )
        self._hub.emit(event)
        if step.finish is not None:
            self._end(handoff)

    def _phases(self, sequence: Sequence) -> Phases:
        """Where its time went so far, as far as this worker knows."""
        if self.decode_role is None:
            return sequence.phases
        return sequence.phases + self.decode_role.transfer_phases(sequence.request.id)

    def _engine_crashed(self, error: BaseException) -> None:
        """In the engine's thread."""
        self._call_soon(self._on_crash, error)

    def _on_crash(self, error: BaseException) -> None:
        """A bug in the engine ends the worker: its state can no longer be trusted."""
        opaque = secrets.token_hex(6)
        logger.error("engine crashed (%s)", opaque, exc_info=error)
        for handoff in self._live.all():
            self._fail(handoff, InternalError(f"{self._spec.worker_id}: internal error {opaque}"))
        self._hub.flush(self.load_now())
        if not self._ended.done():
            self._ended.set_result(f"engine crashed: {type(error).__name__} ({opaque})")

    # Requests' ends.

    def _is_new(self, request: WorkerRequest) -> bool:
        """False for a repeated accept.

        Raises:
            StaleReference: nobody would read its tokens, or it was aborted already.
            Unavailable: the worker is ending.
        """
        if self._ended.done():
            raise Unavailable(f"{self._spec.worker_id} is ending")
        self._hub.require(request.id.epoch)
        return self._live.is_new(request.id)

    def _accept(self, request: WorkerRequest) -> None:
        self._live.accept(request.id, time.monotonic() + request.timeout_s + DEADLINE_GRACE_S)

    def _end(self, handoff: HandoffId) -> None:
        """The last word on it is said, or its KV is redeemed."""
        self._live.end(handoff)
        if self.prefill_role is not None:
            self.prefill_role.finished(handoff)
        if self.decode_role is not None:
            self.decode_role.finished(handoff)

    def _fail(self, handoff: HandoffId, error: PdserveError) -> None:
        """End a request here with an error; the router hears of it at once."""
        if not self._live.end(handoff):
            return  # it ended already
        self.abort(handoff, error.message)
        self._hub.emit(SequenceEvent(id=handoff, index=0, error=EventError(type(error).__name__, error.message)))
        if self._turn is not None:
            self._hub.flush(self.load_now())

    def _peer_gone(self, worker_id: str, generation: int) -> None:
        """A peer process died: end what waits for it, and let go of its memory."""
        logger.warning("%s is gone", worker_id)
        self._links.drop_peer(worker_id, generation)
        self._spawn(self._peers.drop(worker_id, generation))
        if self.prefill_role is not None:
            self.prefill_role.peer_gone(worker_id, generation)
        if self.decode_role is not None:
            self.decode_role.peer_gone(worker_id, generation)

    async def _sweep(self) -> None:
        """Deadlines of everything, also while nothing else happens."""
        checked_s = time.monotonic()
        while True:
            await asyncio.sleep(SWEEP_S)
            now_s = time.monotonic()
            if now_s - checked_s >= INTEGRITY_S and not self._live.all():
                self._engine_loop.post(lambda engine: engine.pool.check_integrity())
                checked_s = now_s
            for handoff in self._live.overdue(now_s):
                self._fail(handoff, DeadlineExceeded("the deadline passed"))
            if self.prefill_role is not None:
                self.prefill_role.sweep(now_s)
            if self.decode_role is not None:
                self.decode_role.sweep(now_s)
            self._check_quarantine()

    def _check_quarantine(self) -> None:
        """A wire that never falls idle eats the pool: past the budget the worker gives up, to be replaced."""
        quarantined = self.load_now().quarantined_blocks
        budget = min(self._spec.kv_transfer.quarantine_budget_blocks, self.info.num_blocks // 2)
        if quarantined > budget:
            raise InternalError(f"{quarantined} blocks are in quarantine, {budget} are allowed")

    # Assembly.

    def _describe(self, port: int) -> WorkerInfo:
        spec = self._spec
        address = f"{spec.host}:{port}"
        return WorkerInfo(
            worker=WorkerRef(spec.worker_id, time.time_ns(), address),
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
            done=self._end,
            lease_s=self._spec.kv_transfer.lease_s,
        )

    def _mount_decode(self) -> DecodeRole:
        return DecodeRole(
            info=self.info,
            config=self._spec.kv_transfer,
            loop=self._engine_loop,
            call_soon=self._call_soon,
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
