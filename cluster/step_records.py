"""The last steps of one worker's engine: what each computed, when it began and how long it took. Bounded and cheap.

A profile is fitted to these (`pdserve profile`). Times are of the machine's monotonic clock, so that those of one
machine's processes can be laid side by side. Written in the engine's thread, read in any. Knows nothing of how records
travel, nor of what they are used for.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from dataclasses import dataclass

from pdserve.cluster.planner.step_shape import StepShape, shape_of
from pdserve.engine.plan import StepPlan
from pdserve.engine.scheduler import Scheduler
from pdserve.engine.turn import Turn

MAX_RECORDS = 16_384
"""About a minute of steps of a few milliseconds each; some hundred bytes a step."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step. With `leaves_work` the next one follows at once, so that its period is known and not only its duration.

    `cpu_s` is how long the engine's thread had a core meanwhile. `number` counts the steps of this worker, from 0.
    """

    number: int
    started_s: float
    duration_s: float
    cpu_s: float
    shape: StepShape
    leaves_work: bool

    @property
    def ended_s(self) -> float:
        return self.started_s + self.duration_s


class StepRecorder:
    """Owner of the records of one engine."""

    def __init__(self, max_records: int = MAX_RECORDS) -> None:
        self._records: deque[StepRecord] = deque(maxlen=max_records)
        self._lock = threading.Lock()
        self._num_seen = 0
        self._planned_s = self._planned_cpu_s = 0.0
        self._planned: StepPlan | None = None

    def watch(self, scheduler: Scheduler) -> None:
        """See every plan that it makes from now on: a step's result does not say what its sequences attended to."""
        make_plan = scheduler.schedule

        def schedule(now_s: float) -> StepPlan:
            self._planned_cpu_s = time.thread_time()
            plan = self._planned = make_plan(now_s)
            self._planned_s = now_s
            return plan

        scheduler.schedule = schedule  # type: ignore[method-assign]

    def turn_ended(self, turn: Turn) -> None:
        """In the engine's thread, after each of its turns."""
        plan, self._planned = self._planned, None
        if turn.step is None or plan is None or not plan.scheduled:
            return
        cpu_s = time.thread_time() - self._planned_cpu_s
        leaves_work = turn.num_running + turn.num_waiting > 0
        duration_s, shape = turn.step.duration_s, shape_of(plan)
        with self._lock:
            self._records.append(StepRecord(self._num_seen, self._planned_s, duration_s, cpu_s, shape, leaves_work))
            self._num_seen += 1

    def since(self, number: int) -> tuple[StepRecord, ...]:
        """Those kept that are not older than this one."""
        with self._lock:
            return tuple(record for record in self._records if record.number >= number)


def to_json(records: tuple[StepRecord, ...]) -> bytes:
    """One array for each record."""
    rows = [[one.number, one.started_s, one.duration_s, one.cpu_s, *one.shape, one.leaves_work] for one in records]
    return json.dumps(rows).encode()


def from_json(text: bytes) -> tuple[StepRecord, ...]:
    """What `to_json` wrote.

    Raises:
        ValueError: it did not.
    """
    rows = json.loads(text)
    return tuple(
        StepRecord(int(number), float(started_s), float(duration_s), float(cpu_s), StepShape(*shape), bool(leaves_work))
        for number, started_s, duration_s, cpu_s, *shape, leaves_work in rows
    )
