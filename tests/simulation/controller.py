"""The simulated controller: tells routers and workers which workers there are, sooner or later.

The real registry and the real messages; what it learns of a death, and when, the simulation decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from pdserve.cluster.registry import Member, MemberState, Registry
from pdserve.proto import wire
from pdserve.proto import worker_pb2 as pb
from pdserve.proto.types import Role, WorkerInfo


class SimController:
    """The servicer, and the only writer of the fleet."""

    def __init__(self) -> None:
        self._registry = Registry()
        self._changed = asyncio.Event()

    def starting(self, worker_id: str, role: Role) -> None:
        self._registry.starting(worker_id, role)
        self._announce()

    def ready(self, info: WorkerInfo) -> None:
        self._registry.ready(info)
        self._announce()

    def dead(self, worker_id: str, generation: int) -> None:
        """Unless its successor is known already."""
        member = next((one for one in self._registry.members if one.worker_id == worker_id), None)
        if member is not None and member.info is not None and member.info.worker.generation == generation:
            self._registry.dead(worker_id, "process died")
            self._announce()

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.Fleet]:
        seen = -1
        while True:
            while self._registry.version == seen:
                await self._changed.wait()
            seen = self._registry.version
            yield pb.Fleet(version=seen, members=[_member(member) for member in self._registry.members])

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _member(member: Member) -> pb.FleetMember:
    if member.info is not None:
        return pb.FleetMember(info=wire.info_to_wire(member.info), state=member.state, detail=member.detail)
    info = pb.WorkerInfo(worker=pb.WorkerRef(worker_id=member.worker_id), role=member.role)
    return pb.FleetMember(info=info, state=MemberState.STARTING)
