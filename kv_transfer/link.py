"""What a link is: two small contracts, the header that announces a transfer, and the checks before a byte moves.

A link moves whole blocks from one worker's memory to another's: uint8 `[num_rows, block_bytes]`, contiguous. A hand-off
travels in parts, runs of blocks that are complete at the source while later ones are still computed; one transfer is
one part, and the parts of many hand-offs follow each other over the same open link. Calls block, one at a time per
link; each has a deadline. A link that failed once is not used again: it is closed and rebuilt under a new epoch. Sizes
come from the receiver's own reservation, never from a message.

Knows nothing of leases, of how blocks are verified or who the peers are.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from xxhash import xxh3_64_intdigest

from pdserve.proto.errors import LayoutMismatch, StaleReference, TransferFailed
from pdserve.proto.types import HandoffId

MAGIC = b"PDKVLINK"
VERSION = 2
_HEADER = struct.Struct("<8sIIIQQQQ")  # magic, version, part, num_blocks, block_bytes, layout, link epoch, hand-off
HEADER_BYTES = _HEADER.size

INLINE_BYTES = 1 << 20
"""Copying this much in host memory, or digesting it with XXH3, takes less time than waking a thread and being woken."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Transfer:
    """One part of one hand-off on one link. Both ends build it from what they know and compare.

    `layout_hash` is of the source's layout: what the bytes are.
    """

    id: HandoffId
    part: int
    num_blocks: int
    block_bytes: int
    layout_hash: int
    link_epoch: int

    def header(self) -> bytes:
        handoff = xxh3_64_intdigest(str(self.id).encode())
        sizes = self.part, self.num_blocks, self.block_bytes
        return _HEADER.pack(MAGIC, VERSION, *sizes, self.layout_hash, self.link_epoch, handoff)


@dataclass(frozen=True, slots=True)
class Landing:
    """Where blocks land: these rows of this memory, in order. The memory is the receiver's pool or its staging."""

    pool: torch.Tensor  # uint8 [num_rows, block_bytes], contiguous
    block_ids: tuple[int, ...]


class PartCheck(Protocol):
    """Verifies blocks as they land, while they are in cache."""

    def __call__(self, first: int, pool: torch.Tensor, block_ids: Sequence[int]) -> None:
        """Rows `block_ids` of `pool` hold the transfer's blocks `first`, `first + 1`, ...; raises `CorruptKV`.

        Every block of a transfer is checked exactly once.
        """


class LinkSource(Protocol):
    """The end that holds the blocks. One-sided kinds have none."""

    def send(self, transfer: Transfer, block_ids: Sequence[int], timeout_s: float) -> None:
        """Send these blocks of the pool, in order; returns when their memory is no longer read.

        Raises `TransferFailed`, `LayoutMismatch` or `StaleReference`; their memory is not read any more then, either.
        """

    def close(self) -> None:
        """Let go of everything; harmless when repeated. A call in progress ends at its own deadline at the latest."""


class LinkSink(Protocol):
    """The end that wants the blocks."""

    @property
    def address(self) -> str:
        """Where the source finds this end; "" for kinds that need none."""

    def receive(
        self, transfer: Transfer, source_block_ids: Sequence[int], landing: Landing, check: PartCheck, timeout_s: float
    ) -> None:
        """Fill the landing with the source blocks, in order; returns when all are there and have passed `check`.

        Raises `TransferFailed`, `LayoutMismatch`, `StaleReference` or what `check` raises; nothing is written any more
        then, but the landing may hold part of the bytes. No other row is ever written.
        """

    def close(self) -> None:
        """As for the source."""


@dataclass(frozen=True, slots=True)
class LinkEnd:
    """What either end of a link agrees to carry."""

    layout_hash: int
    link_epoch: int

    def check(self, transfer: Transfer, pool: torch.Tensor, block_ids: Sequence[int]) -> None:
        """Raise unless `transfer` is for this link and these are blocks of `pool`, `[num_rows, block_bytes]`."""
        num_rows, block_bytes = pool.shape
        if transfer.link_epoch != self.link_epoch:
            raise StaleReference(f"{transfer.id}: link epoch is {self.link_epoch}, not {transfer.link_epoch}")
        if (transfer.layout_hash, transfer.block_bytes) != (self.layout_hash, block_bytes):
            raise LayoutMismatch(f"{transfer.id}: the transfer's KV layout is not this link's")
        check_block_ids(transfer, block_ids, num_rows)


def host_rows(pool: torch.Tensor) -> Bytes:
    """`[num_rows, block_bytes]`, the same memory."""
    rows: Bytes = pool.numpy()
    assert rows.dtype == np.uint8
    assert rows.ndim == 2
    assert rows.flags.c_contiguous
    return rows


def check_block_ids(transfer: Transfer, block_ids: Sequence[int], num_rows: int) -> None:
    """Raise `TransferFailed` unless these are `transfer.num_blocks` different rows of a memory of `num_rows`."""
    if len(block_ids) != transfer.num_blocks or len(set(block_ids)) != transfer.num_blocks:
        raise TransferFailed(f"{transfer.id}: {transfer.num_blocks} different blocks announced, {len(block_ids)} named")
    if block_ids and not 0 <= min(block_ids) <= max(block_ids) < num_rows:
        raise TransferFailed(f"{transfer.id}: names a block outside the pool of {num_rows}")


def check_header(received: bytes, expected: Transfer) -> None:
    """Raise unless the peer announces exactly `expected`: `TransferFailed`, `LayoutMismatch` or `StaleReference`."""
    if received == expected.header():
        return
    magic, version, part, num_blocks, block_bytes, layout, link_epoch, handoff = _HEADER.unpack(received)
    if (magic, version) != (MAGIC, VERSION):
        raise TransferFailed(f"{expected.id}: the peer speaks another link protocol ({magic!r} version {version})")
    if (layout, block_bytes) != (expected.layout_hash, expected.block_bytes):
        raise LayoutMismatch(f"{expected.id}: the peer sends blocks of another KV layout ({block_bytes} bytes each)")
    if link_epoch != expected.link_epoch:
        raise StaleReference(f"{expected.id}: the peer sends on link epoch {link_epoch}, not {expected.link_epoch}")
    if handoff != xxh3_64_intdigest(str(expected.id).encode()):
        raise StaleReference(f"{expected.id}: the peer sends another hand-off")
    if part != expected.part:
        raise StaleReference(f"{expected.id}: the peer sends part {part}, not {expected.part}")
    raise TransferFailed(f"{expected.id}: the peer sends {num_blocks} blocks, not {expected.num_blocks}")


class Deadline:
    """A point in time that several waits of one call share."""

    def __init__(self, timeout_s: float) -> None:
        self._at_s = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Seconds left, always positive. Raises `TransferFailed` once there are none."""
        left_s = self._at_s - time.monotonic()
        if left_s <= 0:
            raise TransferFailed("the transfer's deadline passed")
        return left_s
