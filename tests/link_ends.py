"""Both ends of one link of any kind, with their pools, for tests; and the transfers that go over it.

Knows nothing of any kind: host or device memory, one process or more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pdserve.kv_transfer.digest import Digester
from pdserve.kv_transfer.link import Landing, LinkSink, LinkSource, PartCheck, Transfer
from pdserve.proto.types import HandoffId

BLOCK_BYTES = 65_540  # a multiple of an int8 block's scales, not of 8
NUM_BLOCKS = 24
LAYOUT = 0x1234_5678_9ABC_DEF0
TIMEOUT_S = 20.0

Ids = Sequence[int]


def nothing() -> None:
    """Host memory is visible as soon as it is written."""


@dataclass
class Ends:
    """Both ends of one link, in this process. The pools are uint8 `[NUM_BLOCKS, BLOCK_BYTES]`, of random content."""

    source_pool: torch.Tensor
    target_pool: torch.Tensor
    sink: LinkSink
    source: LinkSource | None  # none for one-sided kinds
    digester: Digester
    release: Callable[[], None] = nothing  # what the pools need beyond the ends
    another_source: Callable[[int, int], LinkSource] | None = None  # (layout hash, link epoch), for the same sink
    source_written: Callable[[], None] = nothing  # make writes to the source pool visible to the sink

    def move(
        self,
        wanted: Transfer,
        source_ids: Ids,
        target_ids: Ids,
        check: PartCheck | None = None,
        sent: Transfer | None = None,
        sent_ids: Ids | None = None,
    ) -> None:
        """One transfer; raises what the sink raises, once the source has ended too.

        `check`: by default the digests of the source's blocks as they are now. `sent`, `sent_ids`: where the source
        has other ideas than the sink.
        """
        landing = Landing(self.target_pool, tuple(target_ids))
        sent_ids = source_ids if sent_ids is None else sent_ids
        check = check or self.vouched(wanted, source_ids)
        if self.source is None:
            self.sink.receive(wanted, sent_ids, landing, check, TIMEOUT_S)
            return
        sender = Sender(self.source, sent or wanted, sent_ids)
        sender.start()
        try:
            self.sink.receive(wanted, source_ids, landing, check, TIMEOUT_S)
        finally:
            sender.join(2 * TIMEOUT_S)
            assert not sender.is_alive()
        if sender.error is not None:
            raise sender.error

    def vouched(self, transfer: Transfer, source_ids: Ids, first: int = 0) -> PartCheck:
        """The check of what the source holds now."""
        digests = self.digester.digests(transfer.id, LAYOUT, first, self.source_pool, source_ids)
        return self.digester.checker(transfer.id, LAYOUT, first, digests, len(source_ids))

    def close(self) -> None:
        self.sink.close()
        if self.source is not None:
            self.source.close()
        self.release()


class Sender(threading.Thread):
    """The source's side of one transfer."""

    def __init__(self, source: LinkSource, transfer: Transfer, block_ids: Ids, timeout_s: float = TIMEOUT_S) -> None:
        super().__init__(daemon=True)
        self._call = source.send, transfer, block_ids, timeout_s
        self.error: Exception | None = None

    def run(self) -> None:
        send, transfer, block_ids, timeout_s = self._call
        try:
            send(transfer, block_ids, timeout_s)
        except Exception as error:
            self.error = error


def transfer(num_blocks: int, link_epoch: int = 1, attempt: int = 0, part: int = 0) -> Transfer:
    return Transfer(HandoffId("request", attempt, 7), part, num_blocks, BLOCK_BYTES, LAYOUT, link_epoch)


def random_bytes(num_bytes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


def random_pool(seed: int) -> torch.Tensor:
    return random_bytes(NUM_BLOCKS * BLOCK_BYTES, seed).view(NUM_BLOCKS, BLOCK_BYTES)


def content(pool: torch.Tensor) -> torch.Tensor:
    """A copy in host memory."""
    return pool.cpu().clone()


def content_after(ends: Ends, source_ids: Ids, target_ids: Ids) -> torch.Tensor:
    after = content(ends.target_pool)
    after[list(target_ids)] = content(ends.source_pool)[list(source_ids)]
    return after


def accept(first: int, pool: torch.Tensor, block_ids: Ids) -> None:
    """A check that everything passes."""
