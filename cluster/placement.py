"""Which worker gets which CPU cores. Pure.

Oversubscribed torch threads cost more than disaggregation gains (`docs/performance.md`), so each CPU worker is pinned
to its own cores and runs exactly that many threads. With more workers than cores they share, round robin.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.proto.types import Role


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One worker to start."""

    worker_id: str
    role: Role
    cores: tuple[int, ...]


def plan_workers(
    replicas: dict[Role, int], cores_asked: dict[Role, int | None], cores: tuple[int, ...]
) -> list[WorkerPlan]:
    """One plan for each worker, named `role-ordinal`; cores are dealt out in order, wrapping round."""
    wanted = [(role, ordinal) for role in Role for ordinal in range(replicas[role])]
    share = max(1, len(cores) // max(1, len(wanted)))
    plans, next_core = [], 0
    for role, ordinal in wanted:
        count = min(cores_asked[role] or share, len(cores))
        picked = tuple(sorted(cores[(next_core + offset) % len(cores)] for offset in range(count)))
        next_core += count
        plans.append(WorkerPlan(f"{role}-{ordinal}", role, picked))
    return plans
