"""Link over TCP, between any two hosts: a pairwise Gloo group, opened by the first transfer.

A transfer is one small message that announces it, then messages with the blocks, several of them on their way at any
time: while one is on the wire, the sink checks the last and the source prepares the next. Both ends derive the sizes
from the transfer that they agreed on; the sink posts no receive for blocks before the announcement has been checked.

Blocks that are adjacent are sent from where they are and received where they belong; others, unless they are large
enough to travel alone, pass through staging memory. Bytes of the wire may so land in the pool, but never late: when
`receive` ends, each of its messages was received or given up, and Gloo writes no message that was given up
(`Pending.cancel`).
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from xxhash import xxh3_64_intdigest

from pdserve.kv_transfer.link import (
    HEADER_BYTES,
    Deadline,
    Landing,
    LinkEnd,
    PartCheck,
    Transfer,
    check_block_ids,
    check_header,
    host_rows,
)
from pdserve.kv_transfer.plan import Message, copy_runs, plan_messages
from pdserve.kv_transfer.process_group import PairGroup, Pending
from pdserve.kv_transfer.rendezvous import Listener, connect
from pdserve.proto.errors import TransferFailed

MESSAGE_BYTES = 4 << 20
"""Of a message with blocks, if `max_message_bytes` allows and one block is not larger: see bench/transfer.py."""
NUM_PENDING = 4
"""Messages on their way at a time."""
MIN_PIECE_BYTES = 256 << 10
"""What is smaller costs more by itself than a copy to staging memory."""

_SINK_RANK, _SOURCE_RANK = 0, 1
_PLAN = struct.Struct("<Q")  # follows the header: a hash of the sizes of all that will come


class GlooSource:
    """`address` is the sink's, as `Redeem` carries it. `host` is the interface to send from."""

    def __init__(
        self, address: str, pool: torch.Tensor, layout_hash: int, link_epoch: int, host: str, max_message_bytes: int
    ) -> None:
        self._address = address
        self._host = host
        self._pool = pool
        self._end = LinkEnd(layout_hash, link_epoch)
        self._splitter = _Splitter(max_message_bytes)
        self._group: PairGroup | None = None
        self._is_open = True

    def send(self, transfer: Transfer, block_ids: Sequence[int], timeout_s: float) -> None:
        deadline = Deadline(timeout_s)
        pending: deque[Pending] = deque()
        try:
            self._end.check(transfer, self._pool, block_ids)
            group = self._joined(transfer, deadline)
            messages = self._splitter.messages(transfer, block_ids)
            pending.append(group.send(torch.frombuffer(_announcement(transfer, messages), dtype=torch.uint8)))
            for i, message in enumerate(messages):
                if len(pending) == NUM_PENDING:
                    _finish_first(pending, deadline)
                pieces = self._splitter.pieces(i, message, self._pool, block_ids)
                for piece in pieces:
                    if piece.is_staged:
                        _copy(self._pool, piece.block_ids, piece.memory, range(len(piece.block_ids)))
                pending.append(group.send(*(piece.memory for piece in pieces)))
            while pending:
                _finish_first(pending, deadline)
        except BaseException:
            _give_up(pending)
            self.close()
            raise

    def close(self) -> None:
        self._is_open = False
        group, self._group = self._group, None
        if group is not None:
            group.close()

    def _joined(self, transfer: Transfer, deadline: Deadline) -> PairGroup:
        if not self._is_open:
            raise TransferFailed(f"{transfer.id}: the link is closed")
        if self._group is None:
            self._group = PairGroup(connect(self._address, deadline), _SOURCE_RANK, self._host, deadline)
        return self._group


class GlooSink:
    """Listens on `host` from construction on, at `address`, until the source has come."""

    def __init__(self, layout_hash: int, link_epoch: int, host: str, max_message_bytes: int) -> None:
        self._host = host
        self._end = LinkEnd(layout_hash, link_epoch)
        self._splitter = _Splitter(max_message_bytes)
        self._listener = Listener(host)
        self._group: PairGroup | None = None
        self._is_open = True

    @property
    def address(self) -> str:
        return self._listener.address

    def receive(
        self, transfer: Transfer, source_block_ids: Sequence[int], landing: Landing, check: PartCheck, timeout_s: float
    ) -> None:
        deadline = Deadline(timeout_s)
        pending: deque[Pending] = deque()
        try:
            self._end.check(transfer, landing.pool, landing.block_ids)
            check_block_ids(transfer, source_block_ids, max(source_block_ids, default=0) + 1)
            group = self._joined(transfer, deadline)
            messages = self._splitter.messages(transfer, source_block_ids)
            self._agree(group, transfer, messages, deadline, pending)
            posted: deque[list[_Piece]] = deque()
            for i, message in enumerate(messages):
                for j in range(i + len(posted), min(i + NUM_PENDING, len(messages))):
                    posted.append(self._splitter.pieces(j, messages[j], landing.pool, landing.block_ids))
                    pending.append(group.recv(*(piece.memory for piece in posted[-1])))
                _finish_first(pending, deadline)
                for piece in posted.popleft():
                    if piece.is_staged:
                        _copy(piece.memory, range(len(piece.block_ids)), landing.pool, piece.block_ids)
                check(message.first, landing.pool, landing.block_ids[message.blocks])
        except BaseException:
            _give_up(pending)
            self.close()
            raise

    def close(self) -> None:
        self._is_open = False
        self._listener.close()
        group, self._group = self._group, None
        if group is not None:
            group.close()

    def _joined(self, transfer: Transfer, deadline: Deadline) -> PairGroup:
        if not self._is_open:
            raise TransferFailed(f"{transfer.id}: the link is closed")
        if self._group is None:
            self._group = PairGroup(self._listener.accept(deadline), _SINK_RANK, self._host, deadline)
            self._listener.close()
        return self._group

    def _agree(
        self,
        group: PairGroup,
        transfer: Transfer,
        messages: Sequence[Message],
        deadline: Deadline,
        pending: deque[Pending],
    ) -> None:
        """Raise unless the source announces this transfer, in the same messages."""
        expected = _announcement(transfer, messages)
        received = torch.empty(len(expected), dtype=torch.uint8)
        pending.append(group.recv(received))
        _finish_first(pending, deadline)
        announcement = received.numpy().tobytes()
        check_header(announcement[:HEADER_BYTES], transfer)
        if announcement != expected:
            raise TransferFailed(f"{transfer.id}: the peer splits it otherwise: other block ids or max_message_bytes")


def _announcement(transfer: Transfer, messages: Sequence[Message]) -> bytearray:
    sizes = repr([message.pieces for message in messages])
    return bytearray(transfer.header() + _PLAN.pack(xxh3_64_intdigest(sizes.encode())))


def _finish_first(pending: deque[Pending], deadline: Deadline) -> None:
    pending[0].wait(deadline)
    pending.popleft()  # only now: one that did not end is still to be given up


def _give_up(pending: deque[Pending]) -> None:
    for message in pending:
        message.cancel()


def _copy(source: torch.Tensor, source_rows: Sequence[int], target: torch.Tensor, target_rows: Sequence[int]) -> None:
    from_rows, to_rows = host_rows(source), host_rows(target)
    for run in copy_runs(zip(source_rows, target_rows, strict=True)):
        to_rows[run.target : run.target + run.num_blocks] = from_rows[run.source : run.source + run.num_blocks]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Blocks of this end's pool that travel together; `memory` is these rows themselves, or staging for them."""

    block_ids: Sequence[int]
    memory: torch.Tensor  # uint8 [len(block_ids), block_bytes], contiguous
    is_staged: bool


class _Splitter:
    """Cuts transfers into messages, and gives each its memory. Staging is made when it is first needed, and reused."""

    def __init__(self, max_message_bytes: int) -> None:
        self._message_bytes = min(MESSAGE_BYTES, max_message_bytes)
        self._staging = torch.empty(0, dtype=torch.uint8)

    def messages(self, transfer: Transfer, source_block_ids: Sequence[int]) -> list[Message]:
        return plan_messages(source_block_ids, transfer.block_bytes, self._message_bytes, MIN_PIECE_BYTES)

    def pieces(self, index: int, message: Message, pool: torch.Tensor, block_ids: Sequence[int]) -> list[_Piece]:
        """Those of message `index` of a transfer of `block_ids`, in the staging of message `index - NUM_PENDING`."""
        pieces, first = [], message.first
        for num_blocks in message.pieces:
            rows = block_ids[first : first + num_blocks]
            if len(copy_runs(zip(rows, range(num_blocks), strict=True))) == 1:
                pieces.append(_Piece(rows, pool[rows[0] : rows[0] + num_blocks], False))
            else:
                pieces.append(_Piece(rows, self._slot(index, first - message.first, num_blocks, pool.shape[1]), True))
            first += num_blocks
        return pieces

    def _slot(self, index: int, first: int, num_blocks: int, block_bytes: int) -> torch.Tensor:
        """`[num_blocks, block_bytes]` of message `index`, from its block `first` on."""
        slot_bytes = max(self._message_bytes, block_bytes)
        if self._staging.numel() < NUM_PENDING * slot_bytes:
            self._staging = torch.empty(NUM_PENDING * slot_bytes, dtype=torch.uint8)
        start = index % NUM_PENDING * slot_bytes + first * block_bytes
        return self._staging[start : start + num_blocks * block_bytes].view(num_blocks, block_bytes)
