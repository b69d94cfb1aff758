"""Names for the content of KV blocks: what a full block holds depends on its tokens and on all tokens before them.

    key of block i = blake2b-128(key of block i-1 || token ids of block i)

Equal keys mean equal KV within one engine: nothing but tokens goes in, so a key says nothing across models. Knows
nothing of blocks' ids or of who computed them. Pure.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence

KEY_BYTES = 16


def block_keys(token_ids: Sequence[int], block_size: int, previous: bytes = b"") -> Iterator[bytes]:
    """Keys of the full blocks of `token_ids`, which follow the block of key `previous`. Hashes as it is drawn from."""
    for end in range(block_size, len(token_ids) + 1, block_size):
        tokens = array("q", token_ids[end - block_size : end])
        previous = hashlib.blake2b(previous + tokens.tobytes(), digest_size=KEY_BYTES).digest()
        yield previous


class PrefixKeys:
    """Keys of one sequence's full blocks. Tokens are only ever appended: what was hashed is kept."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._keys: list[bytes] = []

    def of(self, token_ids: Sequence[int], num_blocks: int) -> list[bytes]:
        """Keys of the first `num_blocks` blocks of `token_ids`, which must fill them."""
        num_known, size = len(self._keys), self._block_size
        assert num_blocks * size <= len(token_ids)
        if num_blocks > num_known:
            previous = self._keys[-1] if self._keys else b""
            self._keys += block_keys(token_ids[num_known * size : num_blocks * size], size, previous)
        return self._keys[:num_blocks]
