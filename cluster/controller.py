"""The controller: starts the workers, watches them, and is the only writer of the fleet.

A detached Ray actor with a gRPC server (`pdserve.internal.v1.Controller`). Routers watch the fleet from it and keep the
last known one when it goes away: no request, token or KV byte passes through here.

    worker:  starting --start() returned--> ready --run() ended or the process died--> dead

Replacing dead workers comes with the supervisor; today a dead worker stays listed as dead.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import ray
from ray.exceptions import RayError

from pdserve.cluster.config import ClusterConfig
from pdserve.cluster.controller_metrics import ControllerMetrics
from pdserve.cluster.pair_links import PairLink, pair_links
from pdserve.cluster.placement import WorkerPlan
from pdserve.cluster.registry import Member, MemberState, Registry
from pdserve.cluster.worker_actor import WorkerActor, log_to
from pdserve.cluster.worker_spec import Failure, WorkerSpec
from pdserve.proto import wire
from pdserve.proto import worker_pb2 as pb
from pdserve.proto import worker_pb2_grpc as pb_grpc
from pdserve.proto.channels import CHANNEL_OPTIONS, SERVER_OPTIONS
from pdserve.proto.errors import Unavailable
from pdserve.proto.types import WorkerInfo

logger = logging.getLogger(__name__)
LOAD_TIMEOUT_S = 2.0
STOP_TIMEOUT_S = 5.0


class Controller(pb_grpc.ControllerServicer):
    """Owner of the registry and of the worker actors."""

    def __init__(
        self, config: ClusterConfig, plans: list[WorkerPlan], namespace: str, private_ray: bool, log_folder: Path
    ) -> None:
        self._config = config
        self._plans = plans
        self._namespace = namespace
        self._private_ray = private_ray
        self._log_folder = log_folder
        log_to(log_folder / "controller.log")
        self._registry = Registry()
        self._changed = asyncio.Condition()
        self._actors: dict[str, Any] = {}
        self._watchers: set[asyncio.Task[None]] = set()
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._server: grpc.aio.Server | None = None
        self._address = ""
        self._metrics = ControllerMetrics(self._registry)

    async def serve(self) -> tuple[str, str]:
        """Start the gRPC server and the metrics endpoint; their addresses."""
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        pb_grpc.add_ControllerServicer_to_server(self, self._server)
        host = self._config.kv_transfer.host
        port = self._server.add_insecure_port(f"{host}:0")
        await self._server.start()
        self._address = f"{host}:{port}"
        return self._address, self._metrics.serve(host)

    async def launch(self) -> Failure | None:
        """Start every worker; the first failure, if any. Workers that cannot exchange KV are one."""
        results = await asyncio.gather(*(self._launch_one(plan) for plan in self._plans))
        refused = (link for link in self._pair_links() if not link.kind)
        apart = (Failure("ConfigError", f"{link.source} -> {link.target}: {link.reason}") for link in refused)
        return next((result for result in (*results, *apart) if result is not None), None)

    async def stop(self) -> None:
        """Stop every worker and the server. Idempotent."""
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*(self._stop_one(actor) for actor in self._actors.values()))
        self._actors.clear()
        for channel in self._channels.values():
            await channel.close()
        self._metrics.close()
        if self._server is not None:
            await self._server.stop(0)

    async def _launch_one(self, plan: WorkerPlan) -> Failure | None:
        self._registry.starting(plan.worker_id, plan.role)
        await self._announce()
        actor = self._actors[plan.worker_id] = self._create(plan)
        started = await self._started(actor)
        if isinstance(started, Failure):
            await self._mark_dead(plan.worker_id, started.message)
            return Failure(started.kind, f"{plan.worker_id}: {started.message}")
        self._registry.ready(started)
        await self._announce()
        task = asyncio.create_task(self._watch_worker(plan.worker_id, actor), name=f"watch {plan.worker_id}")
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)
        return None

    def _create(self, plan: WorkerPlan) -> Any:
        """The actor of one worker; Ray places it when it can."""
        spec = WorkerSpec(
            worker_id=plan.worker_id,
            role=plan.role,
            model=self._config.model,
            engine=self._config.engine_for(plan.role),
            kv_transfer=self._config.kv_transfer,
            cores=plan.cores,
            host=self._config.kv_transfer.host,
            log_path=str(self._log_folder / f"{plan.worker_id}.log"),
            controller=self._address,
        )
        actor_class: Any = ray.remote(WorkerActor)
        options = actor_class.options(
            name=f"{self._config.name}-{plan.worker_id}",
            namespace=self._namespace,
            lifetime="detached",
            num_cpus=0 if self._private_ray else len(plan.cores),
            num_gpus=self._config.pool(plan.role).num_gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=16,
        )
        return options.remote(spec)

    async def _started(self, actor: Any) -> WorkerInfo | Failure:
        """What came of starting a worker, within its time."""
        limit_s = self._config.worker_start_timeout_s
        try:
            started: WorkerInfo | Failure = await asyncio.wait_for(actor.start.remote(), limit_s)
            return started
        except RayError as error:
            return Failure("StartupError", f"the process died while starting ({_reason(error)})")
        except TimeoutError:
            free = ray.available_resources()
            resources = f"Ray has {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free"
            return Failure("StartupError", f"not placed and ready after {limit_s:.0f} s; {resources}")

    async def _watch_worker(self, worker_id: str, actor: Any) -> None:
        try:
            detail = await actor.run.remote()
        except RayError as error:
            detail = f"process died ({_reason(error)})"
        await self._mark_dead(worker_id, detail)
        await self._stop_one(actor)  # one whose engine crashed still holds its cores and its memory

    async def _mark_dead(self, worker_id: str, detail: str) -> None:
        logger.error("worker %s is dead: %s", worker_id, detail)
        self._registry.dead(worker_id, detail)
        await self._announce()

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _stop_one(self, actor: Any) -> None:
        try:
            await asyncio.wait_for(actor.stop.remote(), STOP_TIMEOUT_S)
        except (TimeoutError, RayError) as error:
            logger.info("worker did not stop by itself: %s", type(error).__name__)
        finally:
            ray.kill(actor)

    # pdserve.internal.v1.Controller

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.Fleet]:
        """The fleet now, and again after every change."""
        seen = -1
        while True:
            async with self._changed:
                while self._registry.version == seen:
                    await self._changed.wait()
                seen = self._registry.version
            yield pb.Fleet(version=seen, members=[_member_to_wire(member) for member in self._registry.members])

    async def Status(self, request: pb.StatusRequest, context: Any) -> pb.StatusResponse:
        """Every member with its load as of now; a worker that does not answer has none."""
        workers = await asyncio.gather(*(self._worker_status(member) for member in self._registry.members))
        model = self._config.served_model_name or self._config.model
        links = [
            pb.PairLink(source=one.source, target=one.target, kind=one.kind, reason=one.reason)
            for one in self._pair_links()
        ]
        return pb.StatusResponse(name=self._config.name, model=model, workers=workers, links=links)

    def _pair_links(self) -> list[PairLink]:
        ready = [member.info for member in self._registry.members if member.state is MemberState.READY and member.info]
        return pair_links(self._config.kv_transfer.links, ready)

    async def _worker_status(self, member: Member) -> pb.WorkerStatus:
        status = pb.WorkerStatus(member=_member_to_wire(member))
        if member.state is MemberState.READY and member.info is not None:
            try:
                load = await self._stub(member.info.worker.address).Load(pb.LoadRequest(), timeout=LOAD_TIMEOUT_S)
                status.load.CopyFrom(load)
            except grpc.aio.AioRpcError as error:
                status.member.detail = f"{Unavailable.__name__}: load not answered ({error.code().name})"
        return status

    def _stub(self, address: str) -> Any:
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return pb_grpc.WorkerStub(self._channels[address])


def _member_to_wire(member: Member) -> pb.FleetMember:
    if member.info is not None:
        info = wire.info_to_wire(member.info)
    else:
        info = pb.WorkerInfo(worker=pb.WorkerRef(worker_id=member.worker_id), role=member.role)
    return pb.FleetMember(info=info, state=member.state, detail=member.detail)


def _reason(error: RayError) -> str:
    """Ray's many-line message in a few words."""
    text = str(error)
    for mark in ("exit_detail=", "The actor died because", "Worker exit detail:"):
        if mark in text:
            return " ".join(text.split(mark, 1)[1].split())[:160]
    return " ".join(text.split())[:160]
