"""The engine without a model: the real scheduler, sequences and block pool over a small memory of real bytes.

Computing a token reads the KV of the one before it from the memory and writes its own; sampling reads the KV of all of
them. What is read is compared with what it must be: no token may come from KV that is not its own. The loop takes the
turns of the real engine loop, but on the simulation's time instead of in a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from simulation.loop import Process, SimLoop
from simulation.model import KV, NO_KV, SimModel
from simulation.trace import Trace

from pdserve.engine.block_pool import BlockPool, BlockState
from pdserve.engine.engine import Engine
from pdserve.engine.loop import Command, EngineLoop
from pdserve.engine.plan import Committed, ScheduledSequence, StepPlan, StepResult
from pdserve.engine.scheduler import Scheduler
from pdserve.engine.sequence import Sequence
from pdserve.engine.turn import Turn, turn_of
from pdserve.proto.clock import now
from pdserve.proto.errors import InternalError, PdserveError
from pdserve.proto.types import HandoffId, KVLayout, TokenInfo

# A block in quarantine may be shared: it is only its other claim that the wire still reads for.
UNREADABLE = (BlockState.FREE, BlockState.CACHED, BlockState.RECEIVING)
BAD_LOGITS = "the logits are not finite"


@dataclass(frozen=True, slots=True)
class EngineSize:
    """One engine's limits, and how long its steps take."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    prefix_caching: bool
    step_s: float
    token_s: float


def layout_of(block_size: int) -> KVLayout:
    """Two words of 8 bytes for each token."""
    return KVLayout("simulated", "float16", num_layers=1, num_kv_heads=1, head_dim=4, block_size=block_size)


class SimRunner:
    """The memory, and what is computed in it. The blocks are `[num_blocks, 2 (key, value), block_size]` words."""

    def __init__(
        self, model: SimModel, memory: torch.Tensor, pool: BlockPool, size: EngineSize, trace: Trace, place: str
    ) -> None:
        self._model = model
        self._pool = pool
        self._words: npt.NDArray[np.uint64] = memory.numpy().view(np.uint64).reshape(-1, 2, size.block_size)
        self._size = size.block_size
        self._trace = trace
        self._place = place
        self._right: dict[HandoffId, list[KV]] = {}

    def compute(self, item: ScheduledSequence) -> None:
        """KV of the scheduled tokens."""
        sequence, words, size = item.sequence, self._words, self._size
        for block_id in sequence.block_ids:
            if (state := self._pool.state(block_id)) in UNREADABLE:
                self._trace.violate(self._place, f"{sequence.request.id} reads block {block_id}, which is {state}")
        previous = self._read(sequence, item.start - 1) if item.start else NO_KV
        for place in range(item.start, item.end):
            previous = self._model.kv(previous, sequence.token_ids[place])
            words[sequence.block_ids[place // size], :, place % size] = previous

    def sample(self, sequence: Sequence) -> TokenInfo:
        """The next token, wrong if any KV is."""
        index = sequence.num_output_tokens
        token = self._model.token(sequence.request.id.request_id, index, sequence.request.sampling)
        num_tokens = sequence.num_tokens
        blocks = self._words[sequence.block_ids]  # [blocks, 2, block_size]
        found = blocks.transpose(0, 2, 1).reshape(-1, 2)[:num_tokens]
        right = np.array(self._right_kv(sequence), dtype=np.uint64)
        if not np.array_equal(found, right):
            wrong = np.flatnonzero((found != right).any(axis=1)).tolist()
            self._trace.violate(
                self._place, f"{sequence.request.id} token {index} computed from wrong KV at {wrong} of {num_tokens}"
            )
            token ^= 1
        return TokenInfo(token)

    def clear(self, block_ids: list[int]) -> None:
        self._words[block_ids] = 0

    def forget(self, handoff: HandoffId) -> None:
        self._right.pop(handoff, None)

    def _read(self, sequence: Sequence, place: int) -> KV:
        key, value = self._words[sequence.block_ids[place // self._size], :, place % self._size].tolist()
        return key, value

    def _right_kv(self, sequence: Sequence) -> list[KV]:
        right = self._right.setdefault(sequence.request.id, [])
        for token in sequence.token_ids[len(right) :]:
            right.append(self._model.kv(right[-1] if right else NO_KV, token))
        return right


class SimEngine(Engine):
    """Everything of the real one but its model. `last_step_s` is how long the last step takes on the virtual clock."""

    def __init__(
        self,
        size: EngineSize,
        model: SimModel,
        random: Random,
        bad_logits: Callable[[], bool],
        trace: Trace,
        place: str,
    ) -> None:
        self.books = threading.Lock()
        self.layout = layout_of(size.block_size)
        self.memory = torch.zeros((size.num_blocks, self.layout.block_bytes), dtype=torch.uint8)
        self.pool = BlockPool(size.num_blocks)
        self.max_model_len = size.max_model_len
        self.scheduler = Scheduler(
            self.pool,
            block_size=size.block_size,
            max_num_seqs=size.max_num_seqs,
            max_num_batched_tokens=size.max_num_batched_tokens,
            max_model_len=size.max_model_len,
            prefix_caching=size.prefix_caching,
        )
        self.last_step_s = 0.0
        self._runner = SimRunner(model, self.memory, self.pool, size, trace, place)  # type: ignore[assignment]
        self._size = size
        self._random = random
        self._bad_logits = bad_logits
        self._trace = trace
        self._place = place

    def begin(self) -> tuple[StepPlan, tuple[TokenInfo | PdserveError, ...]]:
        """Plan a step and compute it. Others may take blocks before it is booked."""
        plan = self.scheduler.schedule(now())
        self.last_step_s = 0.0
        if not plan.scheduled:
            return plan, ()
        self.last_step_s = self._size.step_s * self._random.uniform(0.8, 1.2) + self._size.token_s * plan.num_tokens
        return plan, self._run(plan)

    def book(self, plan: StepPlan, sampled: tuple[TokenInfo | PdserveError, ...]) -> StepResult:
        self._scrub(plan.sampled, sampled)
        done = self.scheduler.commit(plan, sampled, now()) if plan.scheduled else Committed()
        self._record(plan, done)
        return StepResult.of(plan, done, self.last_step_s)

    def _run(self, plan: StepPlan) -> tuple[TokenInfo | PdserveError, ...]:
        runner: SimRunner = self._runner  # type: ignore[assignment]
        for item in plan.scheduled:
            runner.compute(item)
        return tuple(
            InternalError(BAD_LOGITS) if self._bad_logits() else runner.sample(sequence) for sequence in plan.sampled
        )

    def _record(self, plan: StepPlan, done: Committed) -> None:
        trace = self._trace
        trace.count("engine steps")
        if plan.preempted:
            trace.count("preemptions", len(plan.preempted))
            trace.add(self._place, f"preempts {', '.join(str(one.request.id) for one in plan.preempted)}")
        if plan.num_prefix_hit_tokens:
            trace.count("prefix hits")
        for part in done.parts:
            trace.count("parts computed")
            trace.add(self._place, f"computed {part.sequence.request.id} blocks {list(part.block_ids)}")
        for step in done.steps:
            if step.finish or step.error:
                self._runner.forget(step.sequence.request.id)  # type: ignore[attr-defined]


class SimEngineLoop(EngineLoop):
    """The turns of the real loop on the simulation's time: commands, a plan, the time that it takes, its booking."""

    def __init__(
        self,
        engine: SimEngine,
        on_turn: Callable[[Turn], None],
        on_crash: Callable[[Exception], None],
        loop: SimLoop,
        process: Process,
    ) -> None:
        super().__init__(engine, on_turn, on_crash)
        self._sim_engine = engine
        self._loop = loop
        self._process = process
        self._is_awake = False

    def post(self, command: Command) -> None:
        self._commands.append(command)
        if not self._is_awake:
            self._is_awake = True
            self._loop.call_later(0.0001, self._guarded, self._begin)

    def _guarded(self, act: Callable[..., None], *arguments: Any) -> None:
        try:
            act(*arguments)
        except Exception as error:
            self._on_crash(error)  # and never awake again, as a thread that has ended

    def _begin(self) -> None:
        engine, commanded = self._sim_engine, bool(self._commands)
        while self._commands:
            self._commands.popleft()(engine)
        if not engine.has_work:
            self._end(None, commanded)
            return
        plan, sampled = engine.begin()
        self._loop.call_later(engine.last_step_s * self._process.slowness, self._guarded, self._book, plan, sampled)

    def _book(self, plan: StepPlan, sampled: tuple[TokenInfo | PdserveError, ...]) -> None:
        step = self._sim_engine.book(plan, sampled)
        self._num_steps += 1
        self._num_preemptions += len(step.preempted)
        self._end(step, True)

    def _end(self, step: StepResult | None, is_news: bool) -> None:
        engine = self._sim_engine
        if is_news:
            self._on_turn(turn_of(step, engine.pool, engine.scheduler, self._num_steps, self._num_preemptions))
        goes_on = step is not None and (step.num_tokens > 0 or bool(step.preempted))
        if goes_on or self._commands:
            self._loop.call_later(0.00005, self._guarded, self._begin)
        else:
            self._is_awake = False
