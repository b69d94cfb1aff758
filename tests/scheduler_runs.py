"""Shared by the scheduler's tests: a small scheduler, sequences for it, and a pretend memory that tells wrong KV."""

from __future__ import annotations

from engine_runs import request

from pdserve.engine.block_pool import BlockPool, BlockState
from pdserve.engine.plan import Committed, StepPlan
from pdserve.engine.scheduler import Scheduler
from pdserve.engine.sequence import Sequence
from pdserve.proto.types import TokenInfo

BLOCK = 4
TOKEN = 9  # what the pretend model always says


def scheduler(
    num_blocks: int = 20, seqs: int = 8, tokens: int = 16, model_len: int = 81, prefix_caching: bool = True
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks),
        block_size=BLOCK,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_model_len=model_len,
        prefix_caching=prefix_caching,
    )


def prompt(num_prompt: int, branch: int = 1000) -> list[int]:
    """Prompts of one `branch` begin alike; those of different ones do so up to the smaller of the two."""
    return [token if token < branch else 1000 + branch for token in range(num_prompt)]


def fresh(num_prompt: int, max_tokens: int = 4, hand_off: bool = False, branch: int = 1000) -> Sequence:
    return Sequence(request(prompt(num_prompt, branch), max_tokens), 0.0, hand_off)


def redeemed(target: Scheduler, num_prompt: int, max_tokens: int = 4, branch: int = 1000) -> Sequence:
    """As a decode worker does it: hold what is known of the prompt, receive the rest."""
    tokens = prompt(num_prompt, branch)
    held = target.claims.hold(tokens)
    received = target.pool.take(-(-num_prompt // BLOCK) - len(held), BlockState.RECEIVING)
    target.pool.move(received, BlockState.RECEIVING, BlockState.RUNNING)
    return Sequence.redeemed(request(tokens, max_tokens), 7, held + received, 0.0)


def execute(target: Scheduler, plan: StepPlan) -> Committed:
    return target.commit(plan, [TokenInfo(TOKEN)] * len(plan.sampled), 1.0)


def step(target: Scheduler) -> Committed:
    return execute(target, target.schedule(0.0))


def drain(target: Scheduler, max_steps: int = 200) -> None:
    for _ in range(max_steps):
        if not target.has_work:
            return
        step(target)
    raise AssertionError("no end in sight")


def spans(plan: StepPlan) -> list[tuple[int, int, bool]]:
    return [(item.start, item.num_tokens, item.samples) for item in plan.scheduled]


class Memory:
    """What each slot holds: the KV of a token depends on it and on all before it, so it is told by those tokens."""

    def __init__(self) -> None:
        self._slots: dict[int, tuple[int, ...]] = {}

    def compute(self, plan: StepPlan) -> None:
        """As the model would: read all that is computed, and write what the plan computes."""
        for item in plan.scheduled:
            sequence = item.sequence
            for position, slot in enumerate(sequence.table.slots(0, item.start)):
                expected = tuple(sequence.token_ids[: position + 1])
                assert self._slots[slot] == expected, f"token {position} would read another's KV"
        for item in plan.scheduled:
            self.write(item.sequence, item.start, item.end)

    def write(self, sequence: Sequence, start: int, end: int) -> None:
        for position in range(start, end):
            slot = sequence.block_ids[position // BLOCK] * BLOCK + position % BLOCK
            self._slots[slot] = tuple(sequence.token_ids[: position + 1])
