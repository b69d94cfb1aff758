"""One worker: an engine in its own thread, a gRPC server, and the roles mounted over them.

    load -> serve -> [requests ... turns of the engine ... events] -> ended -> stop

Puts the parts together and starts and stops them; what they do for requests is `WorkerRequests`'. Everything here runs
on one event loop, except what is posted to the engine's thread. Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from pdserve.cluster.fleet_watch import watch_peers
from pdserve.cluster.step_records import StepRecorder
from pdserve.cluster.worker_links import WorkerLinks
from pdserve.cluster.worker_memory import DeviceMemory, HostMemory, WorkerMemory
from pdserve.cluster.worker_requests import WorkerRequests
from pdserve.cluster.worker_server import WorkerServer
from pdserve.cluster.worker_spec import WorkerSpec
from pdserve.decode_worker.role import DecodeRole
from pdserve.engine.engine import Engine, build_engine
from pdserve.engine.host_memory import keep_freed_memory
from pdserve.engine.loop import EngineLoop
from pdserve.engine.metrics import EngineMetrics
from pdserve.engine.model import resolve_device
from pdserve.engine.turn import Turn
from pdserve.kv_transfer import nccl_group
from pdserve.kv_transfer.cuda_runtime import cuda_runtime
from pdserve.kv_transfer.export import Export, QuantisedExport, quantised
from pdserve.kv_transfer.landing import Landings
from pdserve.kv_transfer.lease import LeaseTimes
from pdserve.kv_transfer.metrics import HandoffMetrics
from pdserve.kv_transfer.peers import Peers
from pdserve.kv_transfer.shared_pool import host_id
from pdserve.prefill_worker.role import PrefillRole, SourceIdentity
from pdserve.proto.clock import now
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import Role, WorkerInfo, WorkerRef

logger = logging.getLogger(__name__)
SWEEP_S = 0.2
STOP_TIMEOUT_S = 5.0
FIRST_TURN_TIMEOUT_S = 10.0
INTEGRITY_S = 30.0


class Worker:
    """Owner of the parts and of the tasks."""

    requests: WorkerRequests

    def __init__(self, spec: WorkerSpec, engine: Engine, memory: WorkerMemory) -> None:
        self._spec = spec
        self._engine = engine
        self._blocks = engine.cache.bytes_view()  # uint8 [num_blocks, block_bytes]
        self._memory = memory
        self._export = self._make_export()
        self._steps = StepRecorder()
        self._metrics = EngineMetrics(spec.worker_id, spec.role, Path(spec.model).name)
        self._tasks: set[asyncio.Task[None]] = set()
        self._turned = asyncio.Event()

    @classmethod
    def load(cls, spec: WorkerSpec) -> Worker:
        """Load the model, with a KV pool that peers can reach. Blocking.

        Raises:
            ModelError: the model cannot be served.
            StartupError: it cannot be served like this, or not on this machine.
        """
        # A GPU only where it is asked for: serving on one has not been tried yet.
        device_type = "cuda" if spec.engine.device == "cuda" else "cpu"
        config = spec.engine.model_copy(update={"device": device_type})
        device = resolve_device(config)
        keep_freed_memory()
        memory: WorkerMemory = HostMemory(spec.kv_transfer)
        if device.type == "cuda":
            if "nccl" in spec.kv_transfer.links:
                nccl_group.check_torch()
            memory = DeviceMemory(spec.kv_transfer, device, cuda_runtime())
        engine = build_engine(Path(spec.model), config, memory.allocate)
        if not memory.addresses():
            raise ConfigError(f"kv_transfer.links: none of {spec.kv_transfer.links} moves {device.type} memory")
        return cls(spec, engine, memory)

    async def serve(self) -> WorkerInfo:
        """Start the engine's thread, the roles and the server; how to reach them."""
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[str] = self._loop.create_future()
        self._server = WorkerServer()
        info = self._describe(self._server.bind(self._spec.host))
        config = self._spec.kv_transfer
        self._engine_loop = EngineLoop(self._engine, self._turn_ended, self._engine_crashed)
        self._peers = Peers(config.control_timeout_s)
        landings = Landings(self._blocks, self._engine.loaded.layout)
        self._links = WorkerLinks(info, self._memory, self._export, landings, config, self._peers)
        post, check = self._engine_loop.post, self._engine.scheduler.check
        budget, patience_s = config.quarantine_budget_blocks, config.quarantine_patience_s
        self.requests = WorkerRequests(info, check, post, budget, patience_s)
        if self._spec.role in (Role.PREFILL, Role.MIXED):
            self.requests.prefill_role = self._mount_prefill(info)
        if self._spec.role in (Role.DECODE, Role.MIXED):
            self.requests.decode_role = self._mount_decode(info)
        self._steps.watch(self._engine.scheduler)
        self._engine_loop.start()
        post(lambda engine: None)  # a first turn, so that there is a load to tell
        async with asyncio.timeout(FIRST_TURN_TIMEOUT_S):
            await self._turned.wait()
        await self._server.start(self.requests, self._on_crash, self._steps)
        self._spawn(self._sweep())
        self._spawn(watch_peers(self._spec.controller, self.peer_gone))
        return info

    async def ended(self) -> str:
        """Wait until the engine crashed or the worker was stopped; why."""
        return await self._ended

    async def stop(self) -> None:
        """End everything that was started. Idempotent."""
        self.requests.stop()
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

    def peer_gone(self, worker_id: str, generation: int) -> None:
        """A peer process died: end what waits for it, and let go of its memory."""
        logger.warning("%s is gone", worker_id)
        self._links.drop_peer(worker_id, generation)
        self._spawn(self._peers.drop(worker_id, generation))
        self.requests.peer_gone(worker_id, generation)

    # From the engine's thread to the event loop.

    def _turn_ended(self, turn: Turn) -> None:
        """In the engine's thread."""
        self._steps.turn_ended(turn)
        self._call_soon(self._on_turn, turn)

    def _engine_crashed(self, error: BaseException) -> None:
        """In the engine's thread."""
        self._call_soon(self._on_crash, error)

    def _call_soon(self, function: Callable[..., object], *arguments: object) -> None:
        """Run on the event loop, from any thread. A failure that nobody expected ends the worker."""

        def guarded() -> None:
            try:
                function(*arguments)
            except Exception as error:
                self._on_crash(error)

        self._loop.call_soon_threadsafe(guarded)

    def _on_turn(self, turn: Turn) -> None:
        self.requests.turn_ended(turn)  # first: somebody waits for what it says
        self._metrics.observe(turn)
        self._turned.set()

    def _on_crash(self, error: BaseException) -> None:
        opaque = "?"
        try:
            opaque = self.requests.crashed(error)
        finally:  # whatever its broken books do to the last words
            if not self._ended.done():
                self._ended.set_result(f"engine crashed: {type(error).__name__} ({opaque})")

    async def _sweep(self) -> None:
        checked_s = now()
        while True:
            await asyncio.sleep(SWEEP_S)
            self.requests.sweep()
            if now() - checked_s >= INTEGRITY_S and self.requests.is_idle:
                self._engine_loop.post(lambda engine: engine.pool.check_integrity())
                checked_s = now()

    # Assembly.

    def _make_export(self) -> Export:
        """The pool as it is, or an int8 image of it in memory of its own."""
        layout = self._engine.loaded.layout
        narrower = self._spec.kv_transfer.wire_dtype == "int8" and layout.dtype != "int8"
        if not narrower or self._spec.role is not Role.PREFILL:
            return Export(self._blocks, layout, self._memory.settle)
        block_bytes = quantised(layout).block_bytes
        image = self._memory.allocate(len(self._blocks) * block_bytes)
        return QuantisedExport(image.view(-1, block_bytes), self._blocks, layout, self._memory.settle)

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
            link_address=self._memory.addresses(),
            metrics_address=self._metrics.serve(spec.host),
            cores=tuple(sorted(os.sched_getaffinity(0))),
            pid=os.getpid(),
        )

    def _mount_prefill(self, info: WorkerInfo) -> PrefillRole:
        config = self._spec.kv_transfer
        return PrefillRole(
            identity=SourceIdentity(info.worker, info.host_id, info.link_address),
            loop=self._engine_loop,
            export=self._export,
            digester=self._memory.digester(),
            sender=self._links,
            peers=self._peers,
            spawn=self._spawn,
            fail=self.requests.fail,
            done=self.requests.end,
            times=LeaseTimes(config.lease_s, config.offer_retry_s),
        )

    def _mount_decode(self, info: WorkerInfo) -> DecodeRole:
        return DecodeRole(
            layout=info.layout,
            timeouts=self._spec.kv_transfer.timeouts,
            loop=self._engine_loop,
            receiver=self._links,
            peers=self._peers,
            metrics=HandoffMetrics(self._spec.worker_id, self._metrics.registry),
            spawn=self._spawn,
            fail=self.requests.fail,
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
