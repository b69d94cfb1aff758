"""The fleet as the controller knows it: who is a member and in which state. One writer, many watchers.

Pure bookkeeping with a version that grows on every change; the watchers' waiting is the caller's business.
Knows nothing of Ray, gRPC or loads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from pdserve.proto.types import Role, WorkerInfo


class MemberState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Member:
    """One worker. `info` is known once it is ready; `detail` says why it is dead."""

    worker_id: str
    role: Role
    state: MemberState
    info: WorkerInfo | None = None
    detail: str = ""


class Registry:
    """Owner of the member list."""

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}
        self.version = 0

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(self._members.values())

    def starting(self, worker_id: str, role: Role) -> None:
        self._put(Member(worker_id, role, MemberState.STARTING))

    def ready(self, info: WorkerInfo) -> None:
        self._put(Member(info.worker.worker_id, info.role, MemberState.READY, info))

    def dead(self, worker_id: str, detail: str) -> None:
        self._put(replace(self._members[worker_id], state=MemberState.DEAD, detail=detail))

    def _put(self, member: Member) -> None:
        if self._members.get(member.worker_id) != member:
            self._members[member.worker_id] = member
            self.version += 1
