"""The production scheduler, spared the decodes that only go on: what makes the planner's fast mode fast.

A sequence in steady decode gets one token in every step, and nothing is decided about it until it ends or blocks run
short. From its first token here on it *stands*: a step counts it instead of visiting it.

    running --got a token, goes on--> standing --its last token, aborted, or blocks run short--> running

In each step the standing ones that begin a block get one from the pool, and those that end go back to the production
scheduler for their last token. If the pool has too few blocks all go back: who misses the step or is evicted is decided
there, with everybody's tokens in place. So every step takes the decisions that it would take without standing, at the
same moments, and lasts as long; only which block is whose differs, and tokens are not told one by one.

For tokens without a value: completions end by their length. Written against the rules of `engine.scheduler` as they
are: `tests/planner/test_planner_standing.py` fails when those change and these do not, and `are_rules_known` tells when
somebody replaces one of them at run time.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Items
from operator import attrgetter

from pdserve.cluster.planner.step_shape import StepShape, shape_of
from pdserve.engine import scheduler as rules
from pdserve.engine.block_pool import BlockPool, BlockState
from pdserve.engine.claims import Claims
from pdserve.engine.plan import Committed, StepPlan
from pdserve.engine.scheduler import Draft, Scheduler
from pdserve.engine.sequence import BlockTable, Sequence, finish
from pdserve.proto.errors import PdserveError
from pdserve.proto.types import HandoffId, TokenInfo

WRITTEN_AGAINST = tuple((kind, dict(vars(kind))) for kind in (Scheduler, Claims, BlockPool, Sequence, BlockTable))


def are_rules_known() -> bool:
    """Whether the production code is what it was when it was loaded.

    What stands bypasses it: rules that somebody has put in their place need every token to go through them.
    """
    return vars(rules)["finish"] is finish and all(dict(vars(kind)) == before for kind, before in WRITTEN_AGAINST)


class StandingScheduler(Scheduler):
    """Owner of the standing sequences. They are of one age: every step gives each of them one token."""

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
        super().__init__(
            pool,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            prefix_caching=prefix_caching,
        )
        self._num_steps = 0
        self._committed_s = 0.0
        self._since: dict[Sequence, int] = {}  # the number of steps when its tokens were last brought up to date
        self._ending: dict[int, dict[Sequence, None]] = {}  # by the number of steps before their last one
        # By the number of steps, modulo the block size, before one that begins a block.
        self._growing: list[dict[Sequence, None]] = [{} for _ in range(self.block_size)]
        self._num_known = 0  # tokens of all, each as if it had stood since step 0

    @property
    def num_running(self) -> int:
        return len(self._running) + len(self._since)

    @property
    def queued_tokens(self) -> int:
        return super().queued_tokens + len(self._since)

    def shape_of(self, plan: StepPlan) -> StepShape:
        """Of the step that has just been planned, the standing sequences in it."""
        num_prefill_tokens, pairs, num_decodes, context_tokens = shape_of(plan)
        num_standing = len(self._since)
        context_tokens += self._num_known + num_standing * self._num_steps
        return StepShape(num_prefill_tokens, pairs, num_decodes + num_standing, context_tokens)

    @property
    def only_goes_on(self) -> bool:
        """Whether the next step is the standing sequences' alone, and none of them ends or lacks a block."""
        if self._running or self._redeemed or self._waiting or self._num_steps in self._ending or not self._since:
            return False
        num_growing = len(self._growing[self._num_steps % self.block_size])
        return not num_growing or self.pool.can_take(num_growing)

    def go_on(self) -> StepShape:
        """Plan that step."""
        self._grow_all(self._growing[self._num_steps % self.block_size])
        num_standing = len(self._since)
        return StepShape(0, 0.0, num_standing, self._num_known + num_standing * self._num_steps)

    def went_on(self, now_s: float) -> None:
        """Book it."""
        self._num_steps += 1
        self._committed_s = now_s
        if self.claims.prefix_caching:
            self._label_full_ones()

    def abort(self, handoff_id: HandoffId) -> Sequence | None:
        sequence = self._by_id.get(handoff_id)
        if sequence in self._since:
            self._return(sequence)
        return super().abort(handoff_id)

    def commit(self, plan: StepPlan, sampled: Items[TokenInfo | PdserveError], now_s: float) -> Committed:
        done = super().commit(plan, sampled, now_s)
        self.went_on(now_s)
        for step in done.steps:
            if step.finish is None and not step.handed_off:
                self._stand(step.sequence)
        return done

    def _label_full_ones(self) -> None:
        """Who needs a block in the next step has just filled one."""
        for sequence in self._growing[self._num_steps % self.block_size]:
            self._update(sequence)
            self.claims.label(sequence)

    def _schedule_decodes(self, draft: Draft) -> None:
        growing = self._growing[self._num_steps % self.block_size]
        decodes = (sequence for sequence in self._running if sequence.num_uncomputed == 1)
        num_missing = len(growing) + sum(not sequence.has_room for sequence in decodes)
        if num_missing and not self.pool.can_take(num_missing):
            for sequence in list(self._since):
                self._return(sequence)
        else:
            self._grow_all(growing)
            for sequence in list(self._ending.get(self._num_steps, ())):
                self._return(sequence)
        draft.budget -= len(self._since)
        super()._schedule_decodes(draft)

    def _grow_all(self, growing: Items[Sequence] | dict[Sequence, None]) -> None:
        """A block for each."""
        if growing:
            for sequence, block_id in zip(growing, self.pool.take(len(growing), BlockState.RUNNING), strict=True):
                sequence.block_ids.append(block_id)

    def _stand(self, sequence: Sequence) -> None:
        """It has just got a token. One that ends with the next one need not stand."""
        last_step = self._last_step(sequence)
        if last_step <= self._num_steps:
            return
        self._running.remove(sequence)
        self._since[sequence] = self._num_steps
        self._num_known += sequence.num_tokens - self._num_steps
        self._growing[self._growth_place(sequence)][sequence] = None
        self._ending.setdefault(last_step, {})[sequence] = None

    def _last_step(self, sequence: Sequence) -> int:
        """How many steps there will have been before the one that gives it its last token."""
        num_left = min(
            sequence.request.sampling.max_tokens - sequence.num_output_tokens, self.max_model_len - sequence.num_tokens
        )
        return self._num_steps + num_left - 1

    def _growth_place(self, sequence: Sequence) -> int:
        """Its blocks hold what is computed, all but the newest token: a full last block means that the next step has to
        begin one."""
        return (self._num_steps + 1 - sequence.num_tokens) % self.block_size

    def _return(self, sequence: Sequence) -> None:
        """To the production scheduler, as if it had never stood."""
        self._update(sequence)
        del self._since[sequence]
        self._num_known -= sequence.num_tokens - self._num_steps
        del self._growing[self._growth_place(sequence)][sequence]
        last_step = self._last_step(sequence)
        ending = self._ending[last_step]
        del ending[sequence]
        if not ending:
            del self._ending[last_step]
        insort(self._running, sequence, key=attrgetter("order"))

    def _update(self, sequence: Sequence) -> None:
        """Its tokens, as many as there were steps."""
        num_steps = self._num_steps - self._since[sequence]
        if num_steps:
            self._since[sequence] = self._num_steps
            sequence.token_ids.extend(bytes(num_steps))  # zeros
            sequence.advance(num_steps)
            sequence.last_token_s = self._committed_s
