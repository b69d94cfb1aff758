"""One request inside the engine: its tokens, how far they are computed, and the blocks that hold their KV.

Three things are stored (tokens known, tokens computed, blocks), and how far the blocks are labelled and handed over;
the rest is derived. Mutable, owned by the scheduler of one engine. Knows nothing of tensors, of other sequences or of
where its blocks' states are kept.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, MutableSequence
from collections.abc import Sequence as Items
from typing import NamedTuple, Self

from pdserve.engine.prefix import PrefixKeys
from pdserve.proto.types import FinishReason, Phases, WorkerRequest


class Finish(NamedTuple):
    """Why a completion ended, and the stop token that ended it if one did."""

    reason: FinishReason
    stop_token_id: int | None


class BlockTable:
    """The blocks of one sequence: token `i` lives in slot `i % block_size` of block `i // block_size`."""

    def __init__(self, block_size: int, block_ids: Iterable[int] = ()) -> None:
        assert block_size > 0
        self.block_size = block_size
        self.block_ids = list(block_ids)

    @property
    def capacity_tokens(self) -> int:
        return len(self.block_ids) * self.block_size

    def missing_blocks(self, num_tokens: int) -> int:
        """Blocks to add before `num_tokens` tokens fit."""
        return max(0, -(-num_tokens // self.block_size) - len(self.block_ids))

    def extend(self, block_ids: Iterable[int]) -> None:
        self.block_ids.extend(block_ids)

    def clear(self) -> list[int]:
        """Empty the table and return what it held."""
        block_ids, self.block_ids = self.block_ids, []
        return block_ids

    def slots(self, start: int, end: int) -> list[int]:
        """Flat slots (`block id * block_size + offset`) of tokens `start..end-1`."""
        assert 0 <= start <= end <= self.capacity_tokens
        size, block_ids = self.block_size, self.block_ids
        return [block_ids[token // size] * size + token % size for token in range(start, end)]


class TokenCounts:
    """The distinct tokens of one sequence, in order of appearance, and how often each is in its output.

    Grows with the output and is never rebuilt: a step that asks costs its new tokens, not the whole text.
    """

    def __init__(self, prompt_token_ids: Iterable[int]) -> None:
        self.num_counted = 0  # output tokens
        self.token_ids = array("q", dict.fromkeys(prompt_token_ids))
        self.num_in_output = array("q", bytes(8 * len(self.token_ids)))
        self._places = {token_id: place for place, token_id in enumerate(self.token_ids)}

    def count(self, output_token_ids: Iterable[int]) -> None:
        """These follow what is counted already."""
        for token_id in output_token_ids:
            place = self._places.setdefault(token_id, len(self.token_ids))
            if place == len(self.token_ids):
                self.token_ids.append(token_id)
                self.num_in_output.append(0)
            self.num_in_output[place] += 1
            self.num_counted += 1


class Sequence:
    """Tokens known (`token_ids`: prompt, then output) and how many of them are computed, i.e. have KV in the blocks.

    With `hand_off` its blocks are handed over as they become full, the last ones with its first token: then it leaves
    the scheduler. It goes on reading them, but who got them releases them. `num_cached_tokens` were not computed here
    because the first admission found them in the pool; `num_recomputed_tokens` were computed more than once. Moments
    are seconds of the engine's clock. The scheduler that takes it in sets `order` (smaller is older) and the block
    size, which the sequence does not know before.
    """

    def __init__(self, request: WorkerRequest, arrival_s: float, hand_off: bool = False) -> None:
        assert request.prompt_token_ids
        self.request = request
        self.arrival_s = arrival_s
        self.hand_off = hand_off
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.token_ids = self._first_tokens()
        self.num_computed = 0
        self.table = BlockTable(1)
        self.order = -1
        self.num_labelled_blocks = 0
        self.num_handed_blocks = 0
        self.num_cached_tokens = 0
        self.num_recomputed_tokens = 0
        self.num_transferred_tokens = 0
        self.first_scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self._num_once_computed = 0  # the most that has been computed of it, here or elsewhere
        self._keys: PrefixKeys | None = None  # of the tokens in blocks of the scheduler's size
        self._counts: TokenCounts | None = None

    @classmethod
    def redeemed(cls, request: WorkerRequest, first_token: int, block_ids: Iterable[int], arrival_s: float) -> Self:
        """A sequence whose prompt was computed elsewhere: it owns the blocks that hold the prompt's KV already."""
        sequence = cls(request, arrival_s)
        sequence.token_ids.append(first_token)
        sequence.num_computed = sequence.num_transferred_tokens = sequence.num_prompt_tokens
        sequence._num_once_computed = sequence.num_computed
        sequence.table.extend(block_ids)
        return sequence

    def adopt(self, order: int, block_size: int) -> None:
        """Enter a scheduler: its place in the order of age, and the size of the blocks that it holds or will hold."""
        self.order = order
        self.table.block_size = block_size
        self._keys = None
        assert self.table.capacity_tokens >= self.num_computed, "too few blocks for the tokens computed"

    def _first_tokens(self) -> MutableSequence[int]:
        """The prompt, to be appended to."""
        return list(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Tokens known and not computed. One in steady decode, never zero: the newest token has no KV yet."""
        return len(self.token_ids) - self.num_computed

    @property
    def has_room(self) -> bool:
        """Its blocks hold every token that it knows."""
        return len(self.token_ids) <= len(self.table.block_ids) * self.table.block_size

    @property
    def block_ids(self) -> list[int]:
        return self.table.block_ids

    @property
    def num_full_blocks(self) -> int:
        """Blocks in which every token is computed: nobody writes to them any more."""
        return self.num_computed // self.table.block_size

    @property
    def is_new(self) -> bool:
        """Nothing of it has been computed yet, here or elsewhere."""
        return self._num_once_computed == 0

    def keys(self, num_blocks: int) -> list[bytes]:
        """Prefix keys of its first blocks, which its tokens must fill."""
        if self._keys is None:
            self._keys = PrefixKeys(self.table.block_size)
        return self._keys.of(self.token_ids, num_blocks)

    def inherit(self, block_ids: Items[int]) -> None:
        """Begin with full blocks that others computed and labelled. Only for a sequence without blocks."""
        assert not self.block_ids
        self.table.extend(block_ids)
        self.num_labelled_blocks = len(block_ids)
        self.num_computed = self.table.capacity_tokens
        assert self.num_computed < self.num_tokens, "a token must be left to compute"
        if self.is_new:
            self.num_cached_tokens = self.num_computed
        self._num_once_computed = max(self._num_once_computed, self.num_computed)

    def advance(self, num_tokens: int) -> None:
        """`num_tokens` more tokens have KV in the blocks."""
        before = self.num_computed
        after = self.num_computed = before + num_tokens
        if before < self._num_once_computed:
            self.num_recomputed_tokens += min(after, self._num_once_computed) - before
        if after > self._num_once_computed:
            self._num_once_computed = after
        assert after <= len(self.token_ids), "more computed than known"
        table = self.table
        assert after <= len(table.block_ids) * table.block_size, "more computed than there is room for"

    def append(self, token_id: int, now_s: float) -> None:
        """A new token was sampled. All others must be computed: it was sampled from the last one."""
        assert self.num_computed == len(self.token_ids)
        self.token_ids.append(token_id)
        self.last_token_s = now_s
        if self.first_token_s is None:
            self.first_token_s = now_s

    def count_tokens(self) -> TokenCounts:
        """Counts of all tokens known; kept from the first call on, since few requests ask for penalties."""
        if self._counts is None:
            self._counts = TokenCounts(self.request.prompt_token_ids)
        self._counts.count(self.token_ids[self.num_prompt_tokens + self._counts.num_counted :])
        return self._counts

    def forget(self) -> list[int]:
        """Give up all KV, to be computed again later as far as it is not found; the tokens stay. Returns the blocks."""
        assert not self.num_handed_blocks, "others read what it would compute again"
        self.num_computed = 0
        self.num_labelled_blocks = 0
        return self.table.clear()

    @property
    def phases(self) -> Phases:
        """What this engine knows about where the time went, up to the last token sampled here."""
        scheduled_s, first_s, last_s = self.first_scheduled_s, self.first_token_s, self.last_token_s
        redeemed = self.num_transferred_tokens > 0
        queue_s = 0.0 if scheduled_s is None else scheduled_s - self.arrival_s
        compute_s = 0.0 if scheduled_s is None or first_s is None else first_s - scheduled_s
        later_s = 0.0 if first_s is None or last_s is None else last_s - first_s
        return Phases(
            prefill_queue_s=0.0 if redeemed else queue_s,
            prefill_s=0.0 if redeemed else compute_s,
            decode_queue_s=queue_s if redeemed else 0.0,
            decode_s=later_s + (compute_s if redeemed else 0.0),
            recomputed_tokens=self.num_recomputed_tokens,
            transferred_tokens=self.num_transferred_tokens,
        )


def finish(sequence: Sequence, index: int, token_id: int, max_model_len: int) -> Finish | None:
    """Whether `token_id`, sampled at place `index` of the output and not yet appended, ends the completion.

    A stop token counts once `min_tokens` tokens precede it (until then sampling bans it), and wins over length.
    """
    sampling = sequence.request.sampling
    if token_id in sampling.stop_token_ids and index >= sampling.min_tokens:
        return Finish(FinishReason.STOP, token_id)
    if index + 1 >= sampling.max_tokens or len(sequence.token_ids) + 1 >= max_model_len:
        return Finish(FinishReason.LENGTH, None)
    return None
