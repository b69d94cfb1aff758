"""From a plan to tensors: everything about one step that is the same for all layers, made once.

The tokens of all sequences lie behind each other in one row: first those of sequences that compute one token (a
*group* has similar context lengths and is attended to in one call), then the chunks. Masks are additive.
Knows nothing of models, of sampling or of what the pool's indices mean.

No sequence ever reads memory that is not its own: tables are padded with the sequence's own first block, and
a block that is only partly filled was zeroed when it was begun, because a masked NaN is still a NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from pdserve.engine.kv_cache import KVCache, ReadIndex, WriteIndex
from pdserve.engine.plan import ScheduledSequence, StepPlan

# Rows of one group may be padded to at most this multiple of their own number of blocks.
MAX_PADDING = 2


@dataclass(frozen=True, slots=True)
class Group:
    """Rows `start..start+size-1` of the batch: one new token each, over tables padded to one length.

    `read_index` names the blocks `[size, max_blocks]`. `masks` maps a sliding window (or `None`) to
    `[size, 1, 1, max_context]`, or to `None` if there is nothing to mask; it fills as layers ask.
    """

    start: int
    contexts: tuple[int, ...]
    read_index: ReadIndex
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.contexts)

    @property
    def max_context(self) -> int:
        return max(self.contexts)

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        if window not in self.masks:
            self.masks[window] = self._make_mask(window, dtype)
        return self.masks[window]

    def _make_mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        if min(self.contexts) == self.max_context and (window is None or self.max_context <= window):
            return None
        device = self.read_index.device
        contexts = torch.tensor(self.contexts, device=device)[:, None]  # [size, 1]
        positions = torch.arange(self.max_context, device=device)  # [max_context]
        visible = positions < contexts
        if window is not None:
            visible &= positions >= contexts - window
        return _additive(visible, dtype)[:, None, None, :]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows `start..start+size-1` of the batch: tokens `context-size..context-1` of one sequence.

    `read_index` names its blocks. `masks` maps a window to `[size, context]`, or to `None` for plain causal.
    """

    start: int
    size: int
    context: int
    read_index: ReadIndex
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """The chunk is all there is: an exact pool's keys and values need not be read back."""
        return self.size == self.context

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        if window not in self.masks:
            self.masks[window] = self._make_mask(window, dtype)
        return self.masks[window]

    def _make_mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        if self.is_whole and (window is None or self.size <= window):
            return None
        device = self.read_index.device
        queries = torch.arange(self.context - self.size, self.context, device=device)[:, None]  # [size, 1]
        keys = torch.arange(self.context, device=device)  # [context]
        visible = keys <= queries
        if window is not None:
            visible &= keys > queries - window
        return _additive(visible, dtype)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's inputs. `sample_rows[i]` is the row whose logits the plan's `i`-th sampling sequence wants."""

    token_ids: torch.Tensor  # [1, num_tokens]
    positions: torch.Tensor  # [1, num_tokens]
    write_index: WriteIndex
    sample_rows: torch.Tensor  # [num_sampled]
    fresh_blocks: torch.Tensor | None  # begun and not filled by this step
    groups: tuple[Group, ...]
    chunks: tuple[Chunk, ...]


def build_batch(plan: StepPlan, cache: KVCache) -> Batch:
    """The tensors of a plan with at least one token, on the cache's device."""
    size = cache.layout.block_size
    singles = sorted((item for item in plan.scheduled if item.num_tokens == 1), key=_num_blocks)
    multis = [item for item in plan.scheduled if item.num_tokens > 1]
    ordered = singles + multis
    tokens = [token for item in ordered for token in item.sequence.token_ids[item.start : item.end]]
    positions = [position for item in ordered for position in range(item.start, item.end)]
    slots = [slot for item in ordered for slot in item.sequence.table.slots(item.start, item.end)]
    fresh = [block for item in ordered for block in _fresh_block(item, size)]
    starts = _starts(ordered)
    samples = [starts[id(item)] + item.num_tokens - 1 for item in plan.scheduled if item.samples]
    # One transfer for all integers of the step.
    integers = torch.tensor(tokens + positions + slots + samples + fresh, device=cache.device)
    parts = torch.split(integers, [len(tokens), len(tokens), len(tokens), len(samples), len(fresh)])
    return Batch(
        token_ids=parts[0][None],
        positions=parts[1][None],
        write_index=cache.write_index(parts[2]),
        sample_rows=parts[3],
        fresh_blocks=parts[4] if fresh else None,
        groups=tuple(_group(items, starts[id(items[0])], cache) for items in _similar(singles)),
        chunks=tuple(_chunk(item, starts[id(item)], cache) for item in multis),
    )


def _num_blocks(item: ScheduledSequence) -> int:
    return len(item.sequence.block_ids)


def _fresh_block(item: ScheduledSequence, block_size: int) -> tuple[int, ...]:
    """The last block that the item writes to, if the item begins it and does not fill it."""
    last = (item.end - 1) // block_size
    begins = last * block_size >= item.start
    return (item.sequence.block_ids[last],) if begins and item.end % block_size else ()


def _starts(items: Iterable[ScheduledSequence]) -> dict[int, int]:
    """First row of each item, by the item's identity."""
    starts, row = {}, 0
    for item in items:
        starts[id(item)] = row
        row += item.num_tokens
    return starts


def _similar(singles: Sequence[ScheduledSequence]) -> list[list[ScheduledSequence]]:
    """Split items, sorted by number of blocks, so that none is padded to more than `MAX_PADDING` times its own."""
    groups: list[list[ScheduledSequence]] = []
    for item in singles:
        if groups and _num_blocks(item) <= MAX_PADDING * _num_blocks(groups[-1][0]):
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _group(items: Sequence[ScheduledSequence], start: int, cache: KVCache) -> Group:
    max_blocks = max(map(_num_blocks, items))
    tables = [item.sequence.block_ids for item in items]
    padded = [table + table[:1] * (max_blocks - len(table)) for table in tables]
    read_index = cache.read_index(torch.tensor(padded, device=cache.device))
    return Group(start, tuple(item.end for item in items), read_index)


def _chunk(item: ScheduledSequence, start: int, cache: KVCache) -> Chunk:
    used = item.sequence.block_ids[: cache.layout.num_blocks(item.end)]
    read_index = cache.read_index(torch.tensor(used, device=cache.device))
    return Chunk(start, item.num_tokens, item.end, read_index)


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
