"""What a step is going to do, and what became of it: the values between the scheduler and who runs its plans.

Named tuples where there is one for each token or step: they are made at a third of a frozen dataclass's cost. Knows
nothing of how a plan is made or computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Self

from pdserve.engine.sequence import Finish, Sequence
from pdserve.proto.errors import PdserveError
from pdserve.proto.types import TokenInfo


class Limit(StrEnum):
    """What kept sequences waiting in a step."""

    NONE = "none"
    TOKENS = "max_num_batched_tokens"
    SEQS = "max_num_seqs"
    BLOCKS = "num_blocks"


class ScheduledSequence(NamedTuple):
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


class StepPlan(NamedTuple):
    """One step. `limit` says what kept the first sequence that did not get in.

    Of the `num_prefix_query_tokens` tokens of sequences that start, `num_prefix_hit_tokens` were found in the pool. The
    return of a preempted sequence, which mostly finds its own, does not count.
    """

    scheduled: tuple[ScheduledSequence, ...]
    preempted: tuple[Sequence, ...] = ()
    limit: Limit = Limit.NONE
    num_prefix_query_tokens: int = 0
    num_prefix_hit_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return sum([item.num_tokens for item in self.scheduled])

    @property
    def num_decode_tokens(self) -> int:
        return len([item for item in self.scheduled if item.is_decode])

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """Sequences that sample a token in this step, in plan order."""
        return tuple([item.sequence for item in self.scheduled if item.samples])


class SequenceStep(NamedTuple):
    """What one step did for one sequence: a token at this position of the completion, or the error that ended it.

    With `finish` or `error` the sequence is gone, and so are its claims on blocks that were not handed over; with
    `handed_off` it is gone and all its blocks are leased.
    """

    sequence: Sequence
    position: int
    token: TokenInfo | None
    finish: Finish | None = None
    handed_off: bool = False
    error: PdserveError | None = None


@dataclass(frozen=True, slots=True)
class ComputedPart:
    """The next blocks of a sequence that is to be handed off are final. They are leased: the reader's to release.

    `first_block` is the place of the first one in the sequence. The last part brings the first token, and the last
    block of it may be partly filled.
    """

    sequence: Sequence
    first_block: int
    block_ids: tuple[int, ...]
    first_token: int | None


class Committed(NamedTuple):
    """What became of a plan, both in its order."""

    steps: tuple[SequenceStep, ...] = ()
    parts: tuple[ComputedPart, ...] = ()


class StepResult(NamedTuple):
    """What one step did. `sequences` has an entry for each sequence that got a token or an error.

    `parts` are the blocks of hand-offs that became final: they are leased, and the reader's to release.
    `num_prefix_hit_tokens` of the `num_prefix_query_tokens` tokens of sequences that started were in the pool already.

    `num_tokens == 0` means that nothing could run: every sequence waits for blocks that are held outside the engine.
    """

    sequences: tuple[SequenceStep, ...]
    parts: tuple[ComputedPart, ...]
    preempted: tuple[Sequence, ...]
    num_tokens: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int
    duration_s: float
    limit: Limit

    @classmethod
    def of(cls, plan: StepPlan, done: Committed, duration_s: float) -> Self:
        """What became of this plan."""
        num_tokens, num_decode_tokens = plan.num_tokens, plan.num_decode_tokens
        return cls(
            sequences=done.steps,
            parts=done.parts,
            preempted=plan.preempted,
            num_tokens=num_tokens,
            num_prefill_tokens=num_tokens - num_decode_tokens,
            num_decode_tokens=num_decode_tokens,
            num_prefix_query_tokens=plan.num_prefix_query_tokens,
            num_prefix_hit_tokens=plan.num_prefix_hit_tokens,
            duration_s=duration_s,
            limit=plan.limit,
        )
