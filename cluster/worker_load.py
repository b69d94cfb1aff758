"""A worker's load as the world sees it, from a turn of its engine. Pure."""

from __future__ import annotations

from pdserve.engine.turn import Turn
from pdserve.proto.types import WorkerInfo, WorkerLoad


def worker_load(info: WorkerInfo, turn: Turn, step_s: float, draining: bool = False) -> WorkerLoad:
    """`step_s` is the duration of the last step that was taken, in this turn or before."""
    pool = turn.pool
    return WorkerLoad(
        worker_id=info.worker.worker_id,
        generation=info.worker.generation,
        role=info.role,
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
        step_s=step_s,
        draining=draining,
        num_steps=turn.num_steps,
        num_preemptions=turn.num_preemptions,
    )
