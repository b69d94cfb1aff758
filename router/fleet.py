"""The workers there are: the controller's word, kept when the controller goes away, and one connection to each.

    watch the controller -> for each ready (worker, generation, address) one `WorkerConnection` running
    gone, dead or another generation -> its connection is cancelled, its requests are told, a new one may start

Knows nothing of requests. When the controller's stream breaks the last known fleet stays: workers are
judged by their own streams then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence

import grpc
import grpc.aio

from pdserve.proto import wire
from pdserve.proto import worker_pb2 as pb
from pdserve.proto import worker_pb2_grpc as rpc
from pdserve.proto.types import WorkerInfo
from pdserve.router.candidates import Candidates
from pdserve.router.connection import Settings, WorkerConnection
from pdserve.router.policy import can_serve
from pdserve.router.view import WorkerView

LOG = logging.getLogger("pdserve.router")


class Changes:
    """Wakes everyone who waits for the fleet to change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    def next(self) -> asyncio.Event:
        """Take this before looking, then wait for it: no change is missed in between."""
        return self._event


class Fleet:
    """Owner of the connections. `run` must be running for anything to happen."""

    def __init__(self, controller_address: str, settings: Settings, changes: Changes) -> None:
        self.changes = changes
        self._controller_address = controller_address
        self._settings = settings
        self._connections: dict[str, WorkerConnection] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._others: tuple[tuple[str, str], ...] = ()
        self._candidates = Candidates()
        self._stale: set[str] = set()  # workers whose view has changed since it was put among the candidates

    @property
    def connections(self) -> Sequence[WorkerConnection]:
        return list(self._connections.values())

    def connection(self, worker_id: str) -> WorkerConnection:
        """Of a worker that `views` has just named."""
        return self._connections[worker_id]

    @property
    def candidates(self) -> Candidates:
        """The workers that can be talked to, as they are now."""
        for worker_id in sorted(self._stale):
            connection = self._connections.get(worker_id)
            view = None if connection is None else connection.view()
            if view is None:
                self._candidates.remove(worker_id)
            else:
                self._candidates.put(view)
        self._stale.clear()
        return self._candidates

    def views(self) -> list[WorkerView]:
        """The workers that can be talked to, in order of their ids."""
        return self.candidates.views

    def infos(self) -> list[WorkerInfo]:
        """Of every worker that can be talked to."""
        return [connection.info for connection in self.connections if connection.connected]

    def can_serve(self) -> bool:
        return can_serve(self.candidates)

    def num_workers(self, role: str, state: str) -> int:
        """Also called from the metrics thread: reads copies only."""
        live = [(connection.role, connection.state) for connection in self.connections]
        return [*live, *self._others].count((role, state))

    async def run(self) -> None:
        """Watch the controller for ever; on cancellation close every connection."""
        async with asyncio.TaskGroup() as group:
            delay_s = self._settings.reconnect_s
            while True:
                try:
                    async for fleet in self._watch():
                        self._apply(fleet, group)
                        delay_s = self._settings.reconnect_s
                except grpc.aio.AioRpcError as error:
                    LOG.warning("controller: %s; keeping the last known fleet", error.code().name)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, self._settings.max_reconnect_s)

    async def _watch(self) -> AsyncIterator[pb.Fleet]:
        async with self._settings.open_channel(self._controller_address) as channel:
            stub = rpc.ControllerStub(channel)
            async for fleet in stub.Watch(pb.WatchRequest()):
                yield fleet

    def _apply(self, fleet: pb.Fleet, group: asyncio.TaskGroup) -> None:
        ready: dict[str, WorkerInfo] = {}
        for member in fleet.members:
            if member.state == "ready":
                try:
                    info = wire.info_from_wire(member.info)
                except ValueError:
                    LOG.exception("controller: a member that makes no sense; left out")
                    continue
                ready[info.worker.worker_id] = info
        for worker_id in list(self._connections):
            current = ready.get(worker_id)
            if current is None or current.worker != self._connections[worker_id].info.worker:
                self._stale.add(worker_id)
                group.create_task(self._connections.pop(worker_id).close())
                self._tasks.pop(worker_id).cancel()
        for worker_id, info in ready.items():
            if worker_id in self._connections:
                self._connections[worker_id].info = info
                self._stale.add(worker_id)
                continue
            connection = WorkerConnection(info, self._settings, self._stale.add)
            self._connections[worker_id] = connection
            self._tasks[worker_id] = group.create_task(connection.run(), name=f"worker {worker_id}")
        self._others = tuple((member.info.role, member.state) for member in fleet.members if member.state != "ready")
        self.changes.notify()
