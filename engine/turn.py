"""One turn of an engine, as others are told of it: the step it took, and what the engine looks like after it. Pure."""

from __future__ import annotations

from typing import NamedTuple

from pdserve.engine.block_pool import BlockPool, PoolCounts
from pdserve.engine.plan import StepResult
from pdserve.engine.scheduler import Scheduler


class Turn(NamedTuple):
    """One turn of the loop: the step it took, if any, and what the engine looks like after it."""

    step: StepResult | None
    pool: PoolCounts
    num_waiting: int
    num_running: int
    queued_tokens: int
    wanted_blocks: int
    num_steps: int
    num_preemptions: int


def turn_of(
    step: StepResult | None, pool: BlockPool, scheduler: Scheduler, num_steps: int, num_preemptions: int
) -> Turn:
    """The turn that has just ended."""
    return Turn(
        step=step,
        pool=pool.counts(),
        num_waiting=scheduler.num_waiting,
        num_running=scheduler.num_running,
        queued_tokens=scheduler.queued_tokens,
        wanted_blocks=scheduler.wanted_blocks,
        num_steps=num_steps,
        num_preemptions=num_preemptions,
    )
