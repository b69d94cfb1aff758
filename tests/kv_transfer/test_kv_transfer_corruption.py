"""Ten thousand things that go wrong with KV on its way: none passes; twenty thousand clean hand-offs: none is refused.

Over the real links, with the real digests, as a decode worker calls them. A fault is planted between the moment when
the source vouches for its blocks and the moment when they are read: in a byte, in a whole block, in the order of
blocks, in the hand-off or the link's epoch, in the layout.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch

from pdserve.kv_transfer.digest import KEYED, Digester
from pdserve.kv_transfer.gloo import GlooSink, GlooSource
from pdserve.kv_transfer.link import Landing, LinkSink, LinkSource, Transfer
from pdserve.kv_transfer.shared_pool import SharedPool
from pdserve.kv_transfer.shm import ShmSink
from pdserve.proto.errors import CorruptKV, LayoutMismatch, StaleReference, TransferFailed
from pdserve.proto.types import HandoffId, KVLayout

LAYOUT = KVLayout("model", "float32", num_layers=2, num_kv_heads=1, head_dim=8, block_size=4)
NUM_BLOCKS = 64
MAX_BLOCKS = 8  # of one part
MESSAGE_BYTES = 3 * LAYOUT.block_bytes
TIMEOUT_S = 20.0
DETECTED = (CorruptKV, LayoutMismatch, StaleReference, TransferFailed)
DIGESTERS = (Digester("xxh3"), Digester(KEYED, bytes(range(32))), Digester("multilinear"))


@dataclass
class Wire:
    """One kind of link between two pools, rebuilt under a new epoch after every failure, as a worker's links are."""

    kind: str
    source_pool: torch.Tensor
    target_pool: torch.Tensor
    address: str = ""
    link_epoch: int = 0
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    sink: LinkSink | None = None
    source: LinkSource | None = None

    def open(self) -> LinkSink:
        if self.sink is None:
            self.link_epoch += 1
            if self.kind == "shm":
                self.sink = ShmSink(self.address, LAYOUT.hash64(), self.link_epoch)
            else:
                self.sink = GlooSink(LAYOUT.hash64(), self.link_epoch, "127.0.0.1", MESSAGE_BYTES)
                where = self.sink.address
                self.source = GlooSource(
                    where, self.source_pool, LAYOUT.hash64(), self.link_epoch, "127.0.0.1", MESSAGE_BYTES
                )
        return self.sink

    def close(self) -> None:
        for end in (self.sink, self.source):
            if end is not None:
                end.close()
        self.sink = self.source = None

    def move(self, attempt: Attempt) -> None:
        """Raises what the receiving end raises."""
        sink, sent = self.open(), None
        if self.source is not None:
            sent = self.threads.submit(self.source.send, attempt.sent, attempt.sent_ids, TIMEOUT_S)
        check = attempt.digester.checker(attempt.id, attempt.layout_hash, attempt.first, attempt.digests)
        landing = Landing(self.target_pool, attempt.target_ids)
        try:
            sink.receive(attempt.wanted, attempt.sent_ids, landing, check, TIMEOUT_S)
        except DETECTED:
            sink.close()
            settle(sent)
            self.close()
            raise
        settle(sent)


def settle(sent: Future[None] | None) -> None:
    """Wait for the sending thread; what it says of a link that the receiver gave up does not matter."""
    if sent is not None:
        sent.exception(TIMEOUT_S)


@dataclass(frozen=True)
class Attempt:
    """One part of one hand-off: what the source vouched for, what it sends, what the receiver expects."""

    id: HandoffId
    layout_hash: int
    first: int
    wanted: Transfer
    sent: Transfer
    source_ids: tuple[int, ...]
    sent_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    digests: tuple[int, ...]
    digester: Digester


def attempt_at(rng: random.Random, number: int, wire: Wire) -> Attempt:
    wire.open()
    num_blocks = rng.randint(1, MAX_BLOCKS)
    id = HandoffId(f"request-{number}", rng.randrange(3), rng.randrange(1 << 40))
    source_ids = tuple(rng.sample(range(NUM_BLOCKS), num_blocks))
    target_ids = tuple(rng.sample(range(NUM_BLOCKS), num_blocks))
    first, digester = rng.randrange(200), rng.choice(DIGESTERS)
    digests = digester.digests(id, LAYOUT.hash64(), first, wire.source_pool, source_ids)
    transfer = Transfer(id, rng.randrange(5), num_blocks, LAYOUT.block_bytes, LAYOUT.hash64(), wire.link_epoch)
    return Attempt(
        id, LAYOUT.hash64(), first, transfer, transfer, source_ids, source_ids, target_ids, digests, digester
    )


# Faults. Each spoils the source's memory or the attempt, after the digests were taken.

Fault = Callable[[random.Random, Wire, Attempt], Attempt]


def flipped_bit(rng: random.Random, wire: Wire, attempt: Attempt) -> Attempt:
    row, column = rng.choice(attempt.source_ids), rng.randrange(LAYOUT.block_bytes)
    wire.source_pool[row, column] ^= 1 << rng.randrange(8)
    return attempt


def torn_block(rng: random.Random, wire: Wire, attempt: Attempt) -> Attempt:
    """Half of it is from the past: a read that overtook a write."""
    row = rng.choice(attempt.source_ids)
    wire.source_pool[row, LAYOUT.block_bytes // 2 :] = 0
    return attempt


def reused_block(rng: random.Random, wire: Wire, attempt: Attempt) -> Attempt:
    """Freed too early: another request's KV is in it."""
    row = rng.choice(attempt.source_ids)
    other = rng.choice([block_id for block_id in range(NUM_BLOCKS) if block_id != row])
    wire.source_pool[row] = wire.source_pool[other].clone()
    return attempt


def zeroed_block(rng: random.Random, wire: Wire, attempt: Attempt) -> Attempt:
    wire.source_pool[rng.choice(attempt.source_ids)] = 0
    return attempt


def swapped_blocks(rng: random.Random, wire: Wire, attempt: Attempt) -> Attempt:
    if len(attempt.source_ids) == 1:
        return reused_block(rng, wire, attempt)
    i, j = rng.sample(range(len(attempt.source_ids)), 2)
    ids = list(attempt.source_ids)
    ids[i], ids[j] = ids[j], ids[i]
    return replace(attempt, sent_ids=tuple(ids))


def rotated_part(rng: random.Random, wire: Wire, attempt: Attempt) -> Attempt:
    """The right blocks at the wrong place of the prompt."""
    return replace(attempt, first=attempt.first + rng.choice((-1, 1, 7)))


def other_attempt(rng: random.Random, wire: Wire, attempt: Attempt) -> Attempt:
    """The bytes of an earlier attempt at the same request."""
    id = attempt.id._replace(attempt=attempt.id.attempt + 1)
    return replace(attempt, id=id, wanted=replace(attempt.wanted, id=id), sent=replace(attempt.sent, id=id))


def other_epoch(rng: random.Random, wire: Wire, attempt: Attempt) -> Attempt:
    """A router that was restarted: same request, same attempt, another run."""
    id = attempt.id._replace(epoch=attempt.id.epoch + 1)
    return replace(attempt, id=id, wanted=replace(attempt.wanted, id=id), sent=replace(attempt.sent, id=id))


def dead_link_epoch(rng: random.Random, wire: Wire, attempt: Attempt) -> Attempt:
    return replace(attempt, wanted=replace(attempt.wanted, link_epoch=attempt.wanted.link_epoch + 1))


def other_part(rng: random.Random, wire: Wire, attempt: Attempt) -> Attempt:
    """The sender is at another part of the hand-off. Without a sender: the part before, by its place."""
    if wire.kind == "shm":
        return replace(attempt, first=attempt.first + len(attempt.source_ids))
    return replace(attempt, sent=replace(attempt.sent, part=attempt.sent.part + 1))


def other_layout(rng: random.Random, wire: Wire, attempt: Attempt) -> Attempt:
    """Bytes of another shape, vouched for as such."""
    field_name = rng.choice(("num_layers", "head_dim", "num_kv_heads", "block_size"))
    other = replace(LAYOUT, **{field_name: getattr(LAYOUT, field_name) * 2}).hash64()
    if rng.random() < 0.5:
        return replace(attempt, layout_hash=other)
    return replace(attempt, wanted=replace(attempt.wanted, layout_hash=other))


def missing_digest(rng: random.Random, wire: Wire, attempt: Attempt) -> Attempt:
    return replace(attempt, digests=attempt.digests[:-1])


FAULTS: Sequence[Fault] = (
    flipped_bit,
    torn_block,
    reused_block,
    zeroed_block,
    swapped_blocks,
    rotated_part,
    other_attempt,
    other_epoch,
    dead_link_epoch,
    other_part,
    other_layout,
    missing_digest,
)


@contextmanager
def opened(kind: str) -> Iterator[Wire]:
    generator = torch.Generator().manual_seed(5)
    content = torch.randint(0, 256, (NUM_BLOCKS, LAYOUT.block_bytes), dtype=torch.uint8, generator=generator)
    memory = SharedPool(content.numel())
    pool = memory.tensor.view(NUM_BLOCKS, -1)
    pool.copy_(content)
    wire = Wire(kind, pool, torch.zeros_like(content), memory.address)
    try:
        yield wire
    finally:
        wire.close()
        wire.threads.shutdown()
        memory.close()


@pytest.mark.parametrize(("kind", "count"), [("shm", 9_700), ("gloo", 300)])
def test_every_planted_fault_is_detected(kind: str, count: int) -> None:
    """On gloo each detection costs a link, and each link a rendezvous: fewer there."""
    rng = random.Random(11)
    detected: Counter[str] = Counter()
    with opened(kind) as wire:
        clean = wire.source_pool.clone()
        for number in range(count):
            fault = FAULTS[number % len(FAULTS)]
            spoiled = fault(rng, wire, attempt_at(rng, number, wire))
            with pytest.raises(DETECTED):
                wire.move(spoiled)
            detected[fault.__name__] += 1
            wire.source_pool.copy_(clean)
    assert len(detected) == len(FAULTS)
    assert detected.total() == count


@pytest.mark.parametrize(("kind", "count"), [("shm", 18_500), ("gloo", 1_500)])
def test_no_clean_hand_off_is_refused(kind: str, count: int) -> None:
    rng = random.Random(12)
    with opened(kind) as wire:
        for number in range(count):
            attempt = attempt_at(rng, number, wire)
            wire.move(attempt)
            assert torch.equal(wire.target_pool[list(attempt.target_ids)], wire.source_pool[list(attempt.source_ids)])
        assert wire.link_epoch == 1, "a link had to be rebuilt"
