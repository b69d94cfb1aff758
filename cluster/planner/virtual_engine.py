"""An engine that computes nothing: the real scheduler over the real block pool, with steps that only take their time.

Takes the turns of the real engine's loop: commands first, then a step, then the word to whoever listens. Tokens have no
value, so a completion ends by its length. Knows nothing of roles, of links or of where requests come from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from pdserve.cluster.planner.clock import Clock
from pdserve.cluster.planner.counting_pool import CountingPool
from pdserve.cluster.planner.counting_sequence import CountingSequence
from pdserve.cluster.planner.standing import StandingScheduler
from pdserve.cluster.planner.step_shape import StepShape, shape_of
from pdserve.engine.plan import Committed, Limit, StepPlan, StepResult
from pdserve.engine.scheduler import Scheduler
from pdserve.engine.sequence import Sequence
from pdserve.engine.turn import Turn, turn_of
from pdserve.proto.types import TokenInfo

Command = Callable[[Scheduler], object]
Duration = Callable[[StepShape], float]
TOKEN = TokenInfo(0)


class VirtualEngine:
    """Owner of a scheduler's turns. `duration_s` is what a step takes on the hardware that is simulated."""

    def __init__(
        self, clock: Clock, scheduler: Scheduler, duration_s: Duration, on_turn: Callable[[Turn], None]
    ) -> None:
        self.scheduler = scheduler
        self._standing = scheduler if isinstance(scheduler, StandingScheduler) else None
        self._shape_of = shape_of if self._standing is None else self._standing.shape_of
        self.pool = scheduler.pool
        self.sequence_type = CountingSequence if isinstance(self.pool, CountingPool) else Sequence
        self._busy_s = 0.0  # in steps that have ended
        self._since_s: float | None = None  # when the step under way began
        self._clock = clock
        self._duration_s = duration_s
        self._on_turn = on_turn
        self._commands: deque[Command] = deque()
        self._is_awake = False
        self.num_steps = 0
        self.num_preemptions = 0
        self.num_prefix_query_tokens = 0
        self.num_prefix_hit_tokens = 0
        self._is_dead = False

    @property
    def busy_s(self) -> float:
        """How long it has computed until now, of the step under way, too."""
        return self._busy_s if self._since_s is None else self._busy_s + (self._clock.now_s - self._since_s)

    def die(self) -> None:
        """Nothing happens any more, and nobody hears of the step under way."""
        self._busy_s, self._since_s = self.busy_s, None
        self._is_dead = True

    def post(self, command: Command) -> None:
        """Run `command` before the next step, in order of posting."""
        self._commands.append(command)
        if not self._is_awake:
            self._is_awake = True
            self._clock.after(0.0, self._turn)

    def _turn(self) -> None:
        """Commands, then a step if there is one to take; asleep when another turn would achieve nothing."""
        while not self._is_dead:
            scheduler, commands = self.scheduler, self._commands
            commanded = bool(commands)
            while commands:
                commands.popleft()(scheduler)
            if not scheduler.has_work:
                if commanded:
                    self._publish(None)
                if not commands:
                    self._is_awake = False
                    return
                continue
            if self._standing is not None and self._standing.only_goes_on:
                duration_s = self._duration_s(self._standing.go_on())
                self._since_s = self._clock.now_s
                self._clock.after(duration_s, self._went_on, self._standing, duration_s)
                return
            plan = scheduler.schedule(self._clock.now_s)
            shape = self._shape_of(plan)
            if shape.num_decodes or shape.num_prefill_tokens:
                duration_s = self._duration_s(shape)
                self._since_s = self._clock.now_s
                self._clock.after(duration_s, self._computed, plan, duration_s)
                return
            self._publish(StepResult.of(plan, Committed(), 0.0))
            if not plan.preempted and not commands:
                self._is_awake = False
                return

    def _computed(self, plan: StepPlan, duration_s: float) -> None:
        if self._is_dead:
            return
        self._busy_s += duration_s
        self._since_s = None
        done = self.scheduler.commit(plan, (TOKEN,) * len(plan.sampled), self._clock.now_s)
        self._publish(StepResult.of(plan, done, duration_s))
        self._turn()

    def _went_on(self, standing: StandingScheduler, duration_s: float) -> None:
        """What `_computed` would come to for a step in which nothing was decided."""
        if self._is_dead:
            return
        self._busy_s += duration_s
        self._since_s = None
        standing.went_on(self._clock.now_s)
        num_tokens = standing.num_running
        self._publish(StepResult((), (), (), num_tokens, 0, num_tokens, 0, 0, duration_s, Limit.NONE))
        self._turn()

    def _publish(self, step: StepResult | None) -> None:
        if step is not None:
            self.num_steps += 1
            self.num_preemptions += len(step.preempted)
            self.num_prefix_query_tokens += step.num_prefix_query_tokens
            self.num_prefix_hit_tokens += step.num_prefix_hit_tokens
        self._on_turn(turn_of(step, self.pool, self.scheduler, self.num_steps, self.num_preemptions))
