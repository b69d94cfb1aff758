"""Which tokens the next step computes. One scheduler, no phases.

Every sequence has tokens known and tokens computed; each step lets the second catch up with the first, under a token
budget and a block budget. Chunked prefill, decode, local prefill and recompute after preemption are all this.

    waiting  --admitted: blocks for all known tokens---->  running  --finished, aborted-->  gone (blocks released)
    redeemed --admitted: already holds its blocks------>      |     --handed off-------->  gone (blocks leased)
    waiting  <--preempted: blocks released, tokens kept-------+

A waiting sequence shares the blocks of its longest prefix that is in the pool and computes from there. One that is to
be handed off gives its blocks away in *parts*, as they become full; the last part comes with its first token.

Order: decodes first, oldest first; then prefills under way; then redeemed; then waiting, first come first served.
A running sequence that needs a block when none is free evicts the youngest sequence that holds blocks, if that is
younger than itself and has handed nothing over; if there is none it keeps what it has and misses the step (blocks held
outside come back: leases, transfers and quarantines are all bounded in time, and who has handed something over has all
its blocks and so ends by itself). So the oldest always moves, and nobody is evicted by a younger one.

Pure: takes the time, returns decisions as data. Knows nothing of tensors, links or who waits for the tokens.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from operator import attrgetter

from pdserve.engine.block_pool import BlockPool
from pdserve.engine.claims import Claims
from pdserve.engine.plan import Committed, ComputedPart, Limit, ScheduledSequence, SequenceStep, StepPlan
from pdserve.engine.sequence import Sequence, finish
from pdserve.proto.errors import DuplicateRequest, InvalidRequest, PdserveError
from pdserve.proto.types import HandoffId, TokenInfo, WorkerRequest


@dataclass(slots=True)
class Draft:
    """A plan in the making. `budget` is the number of tokens that may still be added."""

    budget: int
    has_prefills: bool = False  # one that runs has more than a token to go
    scheduled: list[ScheduledSequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    num_prefix_query_tokens: int = 0
    num_prefix_hit_tokens: int = 0

    def add(self, sequence: Sequence) -> None:
        """As many of its tokens as fit."""
        num_uncomputed = sequence.num_uncomputed
        num_tokens = min(self.budget, num_uncomputed)
        samples = num_tokens == num_uncomputed
        self.scheduled.append(ScheduledSequence(sequence, sequence.num_computed, num_tokens, samples))
        self.budget -= num_tokens

    def add_decode(self, sequence: Sequence) -> None:
        """Its one uncomputed token."""
        self.scheduled.append(ScheduledSequence(sequence, sequence.num_computed, 1, True))
        self.budget -= 1


class Scheduler:
    """Owns the sequences and, through `claims`, the RUNNING blocks."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        prefix_caching: bool = True,
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs, "a step must have room for every decode"
        self.pool = pool
        self.claims = Claims(pool, block_size, prefix_caching)
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
        return sum([sequence.num_uncomputed for sequence in (*self._running, *self._redeemed, *self._waiting)])

    @property
    def wanted_blocks(self) -> int:
        """Blocks that the head of the queue waits for. Who takes blocks for hand-offs must leave these free,
        or a preempted sequence could starve."""
        if not self._waiting:
            return 0
        return self.claims.needed_blocks(self._waiting[0], self.claims.prefix(self._waiting[0]))

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
        self.claims.label(sequence)

    def abort(self, handoff_id: HandoffId) -> Sequence | None:
        """Forget a sequence and release its blocks, but for those handed over. `None` if it is not here (any more)."""
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
        draft = Draft(self.max_num_batched_tokens)
        self._schedule_decodes(draft)
        self._continue_prefills(draft)
        # Who was evicted a moment ago must not take the freed blocks back in the same step.
        limit = Limit.BLOCKS if draft.preempted else self._admit(draft)
        for item in draft.scheduled:
            if item.sequence.first_scheduled_s is None:
                item.sequence.first_scheduled_s = now_s
        return StepPlan(
            scheduled=tuple(draft.scheduled),
            preempted=tuple(draft.preempted),
            limit=limit,
            num_prefix_query_tokens=draft.num_prefix_query_tokens,
            num_prefix_hit_tokens=draft.num_prefix_hit_tokens,
        )

    def commit(self, plan: StepPlan, sampled: Items[TokenInfo | PdserveError], now_s: float) -> Committed:
        """Book an executed plan. `sampled` is one result for each of `plan.sampled`, in that order."""
        results = iter(sampled)
        steps: list[SequenceStep] = []
        parts: list[ComputedPart] = []
        for item in plan.scheduled:
            sequence = item.sequence
            sequence.advance(item.num_tokens)
            if item.samples:
                step = self._commit_token(sequence, next(results), now_s)
                steps.append(step)
                if step.handed_off:
                    parts.append(self._hand_over(sequence, len(sequence.block_ids)))
                continue
            self.claims.label(sequence)
            if sequence.hand_off and sequence.num_full_blocks > sequence.num_handed_blocks:
                parts.append(self._hand_over(sequence, sequence.num_full_blocks))
        assert next(results, None) is None, "more results than sampled sequences"
        return Committed(tuple(steps), tuple(parts))

    def _schedule_decodes(self, draft: Draft) -> None:
        """Sequences with one token to go, evicting younger ones if need be."""
        index = 0
        while index < len(self._running):  # victims are younger, hence further on: the index stays right
            sequence = self._running[index]
            index += 1
            num_uncomputed = sequence.num_uncomputed
            if num_uncomputed > 1:
                draft.has_prefills = True
            elif num_uncomputed == 1 and (sequence.has_room or self._grow(sequence, draft.preempted)):
                draft.add_decode(sequence)

    def _continue_prefills(self, draft: Draft) -> None:
        """Running sequences with more to go. They took all their blocks at admission."""
        if not draft.has_prefills:
            return
        for sequence in self._running:
            if draft.budget > 0 and sequence.num_uncomputed > 1:
                draft.add(sequence)

    def _admit(self, draft: Draft) -> Limit:
        """Let in redeemed, then waiting sequences, in order, until one does not fit. Nobody is evicted for them."""
        while self._redeemed or self._waiting:
            if self.num_running >= self.max_num_seqs:
                return Limit.SEQS
            if draft.budget == 0:
                return Limit.TOKENS
            queue = self._redeemed or self._waiting
            sequence = queue[0]
            prefix = self.claims.prefix(sequence) if queue is self._waiting else []
            has_room = self.pool.can_take(self.claims.needed_blocks(sequence, prefix))
            if not has_room and queue is self._waiting:
                return Limit.BLOCKS
            queue.popleft()
            insort(self._running, sequence, key=attrgetter("order"))
            if queue is self._waiting and sequence.is_new and self.claims.prefix_caching:
                draft.num_prefix_query_tokens += sequence.num_tokens
                draft.num_prefix_hit_tokens += len(prefix) * self.block_size
            # A redeemed one without room for its next token joins all the same: as a runner it may evict, next step.
            if has_room:
                self.claims.grow(sequence, prefix)
                draft.add(sequence)
        return Limit.NONE

    def _grow(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """Blocks for every token that the sequence knows; whether it has them now.

        A victim frees what nobody else claims, which may be nothing: then the next one is tried, while there are any.
        """
        while not self.pool.can_take(self.claims.needed_blocks(sequence)):
            victim = self._youngest_victim(sequence.order)
            if victim is None:
                return False
            self._preempt(victim)
            preempted.append(victim)
        self.claims.grow(sequence)
        return True

    def _youngest_victim(self, order: int) -> Sequence | None:
        """Of those that hold blocks and may lose them: running and redeemed ones younger than `order`.

        None of them has been scheduled yet in this step. What is handed over would not come back with its sequence, and
        the parts that follow must lie behind it.
        """
        candidates = (one for one in (*self._running, *self._redeemed) if one.order > order)
        return max((one for one in candidates if not one.num_handed_blocks), key=attrgetter("order"), default=None)

    def _preempt(self, sequence: Sequence) -> None:
        """Back to its place in the queue, ahead of all younger ones: without blocks, but with its tokens."""
        if sequence in self._redeemed:
            self._redeemed.remove(sequence)
        else:
            self._running.remove(sequence)
        self.claims.forget(sequence)
        insort(self._waiting, sequence, key=attrgetter("order"))

    def _commit_token(self, sequence: Sequence, result: TokenInfo | PdserveError, now_s: float) -> SequenceStep:
        index = sequence.num_output_tokens
        if isinstance(result, PdserveError):
            self._leave(sequence)
            return SequenceStep(sequence, index, None, error=result)
        if self.claims.prefix_caching:
            self.claims.label(sequence)
        end = finish(sequence, index, result.token_id, self.max_model_len)
        sequence.append(result.token_id, now_s)
        handed_off = end is None and sequence.hand_off
        if handed_off:
            self._running.remove(sequence)
            del self._by_id[sequence.request.id]
        elif end is not None:
            self._leave(sequence)
        return SequenceStep(sequence, index, result, end, handed_off)

    def _hand_over(self, sequence: Sequence, end: int) -> ComputedPart:
        """Its blocks from the first one not handed over yet up to place `end`."""
        first_block = sequence.num_handed_blocks
        first_token = sequence.token_ids[-1] if sequence.num_output_tokens else None
        return ComputedPart(sequence, first_block, self.claims.hand_over(sequence, end), first_token)

    def _leave(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        del self._by_id[sequence.request.id]
        self.claims.release(sequence)
