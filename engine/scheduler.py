"""Which tokens the next step computes. One scheduler, no phases.

Every sequence has tokens known and tokens computed; each step lets the second catch up with the first, under a token
budget and a block budget. Chunked prefill, decode, local prefill and recompute after preemption are all this.

    waiting  --admitted: blocks for all known tokens taken-->  running  --finished, aborted-->  gone (blocks released)
    redeemed --admitted: already holds its blocks---------->      |     --handed off-------->  gone (blocks leased)
    waiting  <--preempted: blocks released, tokens kept-----------+

Order: decodes first, oldest first; then prefills under way; then redeemed; then waiting, first come first served.
A running sequence that needs a block when none is free evicts the youngest sequence that holds blocks, if that is
younger than itself; if there is none it keeps what it has and misses the step (blocks held outside come back: leases,
transfers and quarantines are all bounded in time). So the oldest always moves, and nobody is evicted by a younger one.

Pure: takes the time, returns decisions as data. Knows nothing of tensors, links or who waits for the tokens.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter

from pdserve.engine.block_pool import BlockPool, BlockState
from pdserve.engine.sequence import Finish, Sequence, finish
from pdserve.proto.errors import DuplicateRequest, InvalidRequest, PdserveError
from pdserve.proto.types import HandoffId, TokenInfo, WorkerRequest


class Limit(StrEnum):
    """What kept sequences waiting in a step."""

    NONE = "none"
    TOKENS = "max_num_batched_tokens"
    SEQS = "max_num_seqs"
    BLOCKS = "num_blocks"


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Compute tokens `start..start+num_tokens-1`; `samples` if the last of them is the last one known."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_decode(self) -> bool:
        return self.num_tokens == 1 and self.start >= self.sequence.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. `limit` says what kept the first sequence that did not get in."""

    scheduled: tuple[ScheduledSequence, ...]
    preempted: tuple[Sequence, ...] = ()
    limit: Limit = Limit.NONE

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.scheduled)

    @property
    def num_decode_tokens(self) -> int:
        return sum(item.is_decode for item in self.scheduled)

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """Sequences that sample a token in this step, in plan order."""
        return tuple(item.sequence for item in self.scheduled if item.samples)


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """What one step did for one sequence: a token at completion position `index`, or the error that ended it.

    With `finish` or `error` the sequence is gone and its blocks are free; with `handed_off` it is gone and
    its blocks are leased.
    """

    sequence: Sequence
    index: int
    token: TokenInfo | None
    finish: Finish | None = None
    handed_off: bool = False
    error: PdserveError | None = None


class Scheduler:
    """Owns the sequences and, through the pool, the RUNNING blocks."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs, "a step must have room for every decode"
        self.pool = pool
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self._running: list[Sequence] = []  # oldest first
        self._redeemed: deque[Sequence] = deque()  # hold blocks already
        self._waiting: deque[Sequence] = deque()  # hold none; oldest first
        self._by_id: dict[HandoffId, Sequence] = {}
        self._next_order = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._redeemed) + len(self._waiting)

    @property
    def queued_tokens(self) -> int:
        """Tokens known and not computed, of all sequences."""
        return sum(sequence.num_uncomputed for sequence in self._by_id.values())

    @property
    def wanted_blocks(self) -> int:
        """Blocks that the head of the queue waits for. Who takes blocks for hand-offs must leave these free,
        or a preempted sequence could starve."""
        return self._waiting[0].table.missing_blocks(self._waiting[0].num_tokens) if self._waiting else 0

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    def check(self, request: WorkerRequest, hand_off: bool = False) -> None:
        """Raise InvalidRequest if this engine could never finish the request, however empty it is."""
        num_prompt = len(request.prompt_token_ids)
        if num_prompt == 0:
            raise InvalidRequest("prompt", "is empty")
        if num_prompt >= self.max_model_len:
            raise InvalidRequest(
                "prompt", f"{num_prompt} tokens leave no room for a completion in a context of {self.max_model_len}"
            )
        # The last token of a completion is never computed; a handed-off sequence computes its prompt only.
        last = num_prompt + request.sampling.max_tokens - 1
        needed_tokens = num_prompt if hand_off else min(last, self.max_model_len - 1)
        capacity_tokens = self.pool.num_blocks * self.block_size
        if needed_tokens > capacity_tokens:
            raise InvalidRequest(
                "prompt", f"{needed_tokens} tokens of KV can never fit this worker's {capacity_tokens} tokens"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises InvalidRequest or DuplicateRequest; then a redeemed one still owns its blocks."""
        request = sequence.request
        self.check(request, sequence.hand_off)
        if request.id in self._by_id:
            raise DuplicateRequest(f"{request.id} is in the engine already")
        sequence.adopt(self._next_order, self.block_size)
        self._next_order += 1
        self._by_id[request.id] = sequence
        (self._redeemed if sequence.block_ids else self._waiting).append(sequence)

    def abort(self, handoff_id: HandoffId) -> Sequence | None:
        """Forget a sequence and release its blocks. `None` if it is not here (any more)."""
        sequence = self._by_id.get(handoff_id)
        if sequence is None:
            return None
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._redeemed:
            self._redeemed.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._drop(sequence)
        return sequence

    def schedule(self, now_s: float) -> StepPlan:
        """Decide the next step, take the blocks that it needs, and mark the moment for those that start."""
        scheduled: list[ScheduledSequence] = []
        preempted: list[Sequence] = []
        budget = self._schedule_decodes(scheduled, preempted)
        budget = self._continue_prefills(scheduled, budget)
        # Who was evicted a moment ago must not take the freed blocks back in the same step.
        limit = Limit.BLOCKS if preempted else self._admit(scheduled, budget)
        for item in scheduled:
            if item.sequence.first_scheduled_s is None:
                item.sequence.first_scheduled_s = now_s
        return StepPlan(tuple(scheduled), tuple(preempted), limit)

    def commit(
        self, plan: StepPlan, sampled: Items[TokenInfo | PdserveError], now_s: float
    ) -> tuple[SequenceStep, ...]:
        """Book an executed plan. `sampled` is one result for each of `plan.sampled`, in that order."""
        results = iter(sampled)
        steps = []
        for item in plan.scheduled:
            item.sequence.advance(item.num_tokens)
            if item.samples:
                steps.append(self._commit_token(item.sequence, next(results), now_s))
        assert next(results, None) is None, "more results than sampled sequences"
        return tuple(steps)

    def _schedule_decodes(self, scheduled: list[ScheduledSequence], preempted: list[Sequence]) -> int:
        """Sequences with one token to go, evicting younger ones if need be. Returns the tokens left."""
        budget = self.max_num_batched_tokens
        index = 0
        while index < len(self._running):  # victims are younger, hence further on: the index stays right
            sequence = self._running[index]
            index += 1
            if sequence.num_uncomputed == 1 and self._grow(sequence, preempted):
                scheduled.append(_scheduled(sequence, 1))
                budget -= 1
        return budget

    def _continue_prefills(self, scheduled: list[ScheduledSequence], budget: int) -> int:
        """Running sequences with more to go. They took all their blocks at admission."""
        for sequence in self._running:
            if budget > 0 and sequence.num_uncomputed > 1:
                scheduled.append(_scheduled(sequence, min(budget, sequence.num_uncomputed)))
                budget -= scheduled[-1].num_tokens
        return budget

    def _admit(self, scheduled: list[ScheduledSequence], budget: int) -> Limit:
        """Let in redeemed, then waiting sequences, in order, until one does not fit. Nobody is evicted for them."""
        while self._redeemed or self._waiting:
            if len(self._running) >= self.max_num_seqs:
                return Limit.SEQS
            if budget == 0:
                return Limit.TOKENS
            queue = self._redeemed or self._waiting
            sequence = queue[0]
            missing = sequence.table.missing_blocks(sequence.num_tokens)
            has_room = self.pool.can_take(missing)
            if not has_room and queue is self._waiting:
                return Limit.BLOCKS
            queue.popleft()
            insort(self._running, sequence, key=attrgetter("order"))
            # A redeemed one without room for its next token joins all the same: as a runner it may evict, next step.
            if has_room:
                sequence.table.extend(self.pool.take(missing, BlockState.RUNNING))
                scheduled.append(_scheduled(sequence, min(budget, sequence.num_uncomputed)))
                budget -= scheduled[-1].num_tokens
        return Limit.NONE

    def _grow(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """Blocks for every token that the sequence knows; whether it has them now."""
        missing = sequence.table.missing_blocks(sequence.num_tokens)
        while not self.pool.can_take(missing):
            victim = self._youngest_holder()
            if victim.order <= sequence.order:
                return False
            self._preempt(victim)
            preempted.append(victim)
        sequence.table.extend(self.pool.take(missing, BlockState.RUNNING))
        return True

    def _youngest_holder(self) -> Sequence:
        """Of those that hold blocks and have not been scheduled yet: all running and all redeemed ones."""
        candidates = [self._running[-1], *self._redeemed]
        return max(candidates, key=attrgetter("order"))

    def _preempt(self, sequence: Sequence) -> None:
        """Back to its place in the queue, ahead of all younger ones: without blocks, but with its tokens."""
        if sequence in self._redeemed:
            self._redeemed.remove(sequence)
        else:
            self._running.remove(sequence)
        self.pool.release(sequence.forget(), BlockState.RUNNING)
        insort(self._waiting, sequence, key=attrgetter("order"))

    def _commit_token(self, sequence: Sequence, result: TokenInfo | PdserveError, now_s: float) -> SequenceStep:
        index = sequence.num_output_tokens
        if isinstance(result, PdserveError):
            self._leave(sequence)
            return SequenceStep(sequence, index, None, error=result)
        end = finish(sequence, result.token_id, self.max_model_len)
        sequence.append(result.token_id, now_s)
        handed_off = end is None and sequence.hand_off
        if handed_off:
            self._running.remove(sequence)
            del self._by_id[sequence.request.id]
            self.pool.move(sequence.block_ids, BlockState.RUNNING, BlockState.LEASED)
        elif end is not None:
            self._leave(sequence)
        return SequenceStep(sequence, index, result, end, handed_off)

    def _leave(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        del self._by_id[sequence.request.id]
        self.pool.release(sequence.table.clear(), BlockState.RUNNING)


def _scheduled(sequence: Sequence, num_tokens: int) -> ScheduledSequence:
    return ScheduledSequence(sequence, sequence.num_computed, num_tokens, num_tokens == sequence.num_uncomputed)
