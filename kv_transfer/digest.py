"""Digests of KV blocks: what left the prefill worker is what the decode worker computes from, or it fails.

A block's digest is bound to the hand-off, to the block's position in it, to the layout and to every byte, but not to
where the block lies in either pool. 64 bits each, by one of three algorithms:

    xxh3          XXH3 (github.com/Cyan4973/xxHash), seeded: against accidents (late writes, swapped or reused blocks,
                  bit flips), not against a peer that forges
    blake2b       keyed: nobody without the key can forge either
    multilinear   sums of products that any device computes where the blocks are: only the sums leave it. Against
                  accidents; see `_block_sums`

The same bytes give the same digest wherever they lie. Knows nothing of links.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch
import torch.nn.functional
from xxhash import xxh3_64_intdigest

from pdserve.kv_transfer.link import PartCheck, host_rows
from pdserve.proto.errors import CorruptKV, LayoutMismatch
from pdserve.proto.types import HandoffId

FAST = "xxh3"
"""The one that costs little more than reading the bytes."""

KEYED = "blake2b"
ON_DEVICE = "multilinear"
"""The one that reads blocks in device memory; the others need host memory."""

_MASK = (1 << 64) - 1
_STEP = 0x9E37_79B9_7F4A_7C15  # odd: positions never share a seed
_WORD_BYTES = 4
_GROUP_BYTES = {"cpu": 1 << 19, "cuda": 1 << 26}  # of blocks multiplied at a time; the products take twice as much


class Digester:
    """Digests by one algorithm. `key` is for "blake2b" alone. Raises `LayoutMismatch` for an algorithm unknown here."""

    def __init__(self, algorithm: str, key: bytes = b"") -> None:
        if algorithm not in _DIGESTS:
            raise LayoutMismatch(
                f"block digests are {algorithm!r} there, which is unknown here: run one version on both"
            )
        assert bool(key) == (algorithm == KEYED)
        self.algorithm = algorithm
        self._key = key
        self._digests = _DIGESTS[algorithm]

    def digests(
        self, id: HandoffId, layout_hash: int, first: int, blocks: torch.Tensor, block_ids: Sequence[int]
    ) -> tuple[int, ...]:
        """One unsigned 64-bit digest for each of `block_ids`, of which the i-th is at position `first + i`.

        `blocks` is uint8 `[num_rows, block_bytes]`, contiguous.
        """
        if blocks.device.type != "cpu" and self.algorithm != ON_DEVICE:
            raise LayoutMismatch(f"{id}: {self.algorithm} digests, but the blocks are in {blocks.device.type} memory")
        return tuple(self._digests(self._key, id, layout_hash, first, blocks, block_ids))

    def checker(
        self, id: HandoffId, layout_hash: int, first: int, expected: Sequence[int], num_blocks: int | None = None
    ) -> PartCheck:
        """Verifies a part whose blocks are at positions `first`, `first + 1`, ...; raises `CorruptKV` naming one.

        A missing digest fails the check of its block; where `num_blocks` is known, a missing or surplus one fails here.
        """
        if num_blocks is not None and len(expected) != num_blocks:
            raise CorruptKV(f"{id}: {num_blocks} blocks but {len(expected)} digests")
        start = first

        def check(first: int, pool: torch.Tensor, block_ids: Sequence[int]) -> None:
            last = first + len(block_ids)
            if last > len(expected):
                raise CorruptKV(f"{id}: at least {last} blocks but {len(expected)} digests")
            wanted = tuple(expected[first:last])
            found = self.digests(id, layout_hash, start + first, pool, block_ids)
            if found != wanted:
                wrong = next(i for i, digest in enumerate(found) if digest != wanted[i])
                hint = ", or kv_transfer.digest_key differs" if self.algorithm == KEYED else ""
                raise CorruptKV(f"{id}: the block at position {start + first + wrong} differs from what was sent{hint}")

        return check


Digests = Callable[[bytes, HandoffId, int, int, torch.Tensor, Sequence[int]], Iterator[int] | list[int]]
"""(key, hand-off, layout hash, first position, blocks, block ids) to one digest for each id."""


def _seed(id: HandoffId, layout_hash: int) -> int:
    return int(xxh3_64_intdigest(str(id).encode(), layout_hash))


def _xxh3(
    key: bytes, id: HandoffId, layout_hash: int, first: int, blocks: torch.Tensor, block_ids: Sequence[int]
) -> list[int]:
    rows, seed, digest = host_rows(blocks), _seed(id, layout_hash), xxh3_64_intdigest
    return [digest(rows[block_id], seed + (first + i) * _STEP & _MASK) for i, block_id in enumerate(block_ids)]


def _blake2b(
    key: bytes, id: HandoffId, layout_hash: int, first: int, blocks: torch.Tensor, block_ids: Sequence[int]
) -> Iterator[int]:
    rows = host_rows(blocks)
    name = str(id).encode()
    prefix = blake2b(struct.pack("<IQ", len(name), layout_hash) + name, digest_size=8, key=key, person=b"pdserve-kv")
    for i, block_id in enumerate(block_ids):
        state = prefix.copy()
        state.update(struct.pack("<Q", first + i))
        state.update(rows[block_id])
        yield int.from_bytes(state.digest(), "little")


def _multilinear(
    key: bytes, id: HandoffId, layout_hash: int, first: int, blocks: torch.Tensor, block_ids: Sequence[int]
) -> Iterator[int]:
    seed = _seed(id, layout_hash)
    for i, block_sum in enumerate(_block_sums(blocks, block_ids)):
        yield xxh3_64_intdigest(struct.pack("<q", block_sum), seed + (first + i) * _STEP & _MASK)


_DIGESTS: dict[str, Digests] = {"xxh3": _xxh3, KEYED: _blake2b, ON_DEVICE: _multilinear}


def _block_sums(blocks: torch.Tensor, block_ids: Sequence[int]) -> list[int]:
    """For each block the sum of word * key over its 32-bit words, mod 2^64, signed; computed where the blocks are.

    The keys are odd, pseudo-random and 64 bits wide. So a change within one word never goes unseen, and one of several
    words with a probability of about 2^-63, or 2^-32 if it touches nothing but their top bits. (With 64-bit words two
    flipped top bits would always cancel.)
    """
    block_bytes = blocks.shape[1]
    num_words = -(-block_bytes // _WORD_BYTES)
    keys = _keys(num_words, blocks.device)
    rows = torch.as_tensor(block_ids, device=blocks.device)
    group = max(1, _GROUP_BYTES.get(blocks.device.type, 1 << 19) // block_bytes)
    sums = []
    for first in range(0, len(rows), group):
        words = blocks.index_select(0, rows[first : first + group])  # uint8 [group, block_bytes]
        tail = num_words * _WORD_BYTES - block_bytes
        words = torch.nn.functional.pad(words, (0, tail)) if tail else words
        sums.append((words.view(torch.int32) * keys).sum(dim=1))  # int64 [group, num_words] -> [group]
    return torch.cat(sums).tolist() if sums else []


@lru_cache(maxsize=8)
def _keys(num_words: int, device: torch.device) -> torch.Tensor:
    """int64 `[num_words]`, a function of the index alone: SplitMix64 with the last bit set."""
    z = np.arange(1, num_words + 1, dtype=np.uint64) * np.uint64(_STEP)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    z = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(z.view(np.int64)).to(device)
