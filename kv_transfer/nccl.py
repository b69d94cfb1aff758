"""Link between GPUs of any two hosts: a pairwise NCCL group, opened by the first transfer. Not run on a GPU yet.

    source                      sink
    header, limit    ->                      over the connection of the rendezvous, which stays open
                     <-         go, limit    the header is what the sink expects; blocks in a message: the lower limit
    message 0, 1 ... =>                      over NCCL: few large ones
    end              <->        end          both have all; or: gave up, and why

Nothing is posted to NCCL before both ends agree, and each end learns at once when the other fails or dies: NCCL itself
may never say so. Blocks pass through two staging buffers on each end, so that one is packed or unpacked while the other
travels; wire bytes never land in a pool, however late they come, and the buffers are kept until an abort has returned.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from pdserve.kv_transfer.cuda_runtime import Runtime
from pdserve.kv_transfer.device_copy import copy_blocks, slices
from pdserve.kv_transfer.lane import Lane, fence, translated, wait
from pdserve.kv_transfer.link import (
    HEADER_BYTES,
    Deadline,
    Landing,
    LinkEnd,
    PartCheck,
    Transfer,
    check_block_ids,
    check_header,
)
from pdserve.kv_transfer.mailbox import Mailbox, Watch
from pdserve.kv_transfer.nccl_group import Message, NcclPair
from pdserve.kv_transfer.rendezvous import Channel, Listener, connect
from pdserve.proto.errors import PdserveError, TransferFailed

_SINK_RANK, _SOURCE_RANK = 0, 1
_NUM_BUFFERS = 2
_LIMIT = struct.Struct("<I")
_MAX_LIMIT = (1 << 32) - 1


class NcclSource:
    """`address` is the sink's, as `Redeem` carries it."""

    def __init__(
        self,
        address: str,
        pool: torch.Tensor,
        layout_hash: int,
        link_epoch: int,
        max_message_bytes: int,
        runtime: Runtime,
    ) -> None:
        self._pool = pool
        end = LinkEnd(layout_hash, link_epoch)
        self._side = _Side(lambda deadline: connect(address, deadline), _SOURCE_RANK, end, max_message_bytes, runtime)

    def send(self, transfer: Transfer, block_ids: Sequence[int], timeout_s: float) -> None:
        deadline = Deadline(timeout_s)
        with self._side.use(transfer, self._pool, block_ids, deadline) as wire:
            limit = wire.max_blocks(transfer)
            wire.mailbox.put("header", transfer.header() + _LIMIT.pack(limit), deadline)
            agreed = _agreed(wire.mailbox.take("go", deadline), limit, transfer)
            watch = Watch(wire.mailbox, "end", deadline)
            posted: deque[Message] = deque()
            for part, buffer in wire.messages(transfer, agreed):
                if len(posted) == _NUM_BUFFERS:
                    wire.finish(posted.popleft(), watch, deadline)
                copy_blocks(wire.lane, self._pool, block_ids[part], buffer, range(len(buffer)))
                posted.append(wire.pair.send(buffer, wire.lane, deadline))
            for message in posted:
                wire.finish(message, watch, deadline)
            wire.mailbox.put("end", b"", deadline)
            watch.finish()

    def close(self) -> None:
        self._side.close("the source closed the link")


class NcclSink:
    """Listens on `host` from construction on, at `address`, until the source has come."""

    def __init__(self, layout_hash: int, link_epoch: int, host: str, max_message_bytes: int, runtime: Runtime) -> None:
        self._listener = Listener(host)
        end = LinkEnd(layout_hash, link_epoch)
        self._side = _Side(self._accept, _SINK_RANK, end, max_message_bytes, runtime)

    @property
    def address(self) -> str:
        return self._listener.address

    def receive(
        self, transfer: Transfer, source_block_ids: Sequence[int], landing: Landing, check: PartCheck, timeout_s: float
    ) -> None:
        deadline = Deadline(timeout_s)
        with self._side.use(transfer, landing.pool, landing.block_ids, deadline) as wire:
            check_block_ids(transfer, source_block_ids, max(source_block_ids, default=0) + 1)
            limit = _checked_header(wire.mailbox.take("header", deadline), transfer)
            agreed = min(limit, wire.max_blocks(transfer))
            wire.mailbox.put("go", _LIMIT.pack(agreed), deadline)
            watch = Watch(wire.mailbox, "end", deadline)
            posted: deque[tuple[slice, torch.Tensor, Message]] = deque()

            def land() -> None:
                part, buffer, message = posted.popleft()
                wire.finish(message, watch, deadline)
                ids = landing.block_ids[part]
                copy_blocks(wire.lane, buffer, range(len(buffer)), landing.pool, ids)
                wait(wire.lane.mark(), deadline, watch.look)
                check(part.start, landing.pool, ids)

            for part, buffer in wire.messages(transfer, agreed):
                if len(posted) == _NUM_BUFFERS:
                    land()
                posted.append((part, buffer, wire.pair.recv(buffer, wire.lane, deadline)))
            while posted:
                land()
            wire.mailbox.put("end", b"", deadline)
            watch.finish()

    def close(self) -> None:
        self._listener.close()
        self._side.close("the sink closed the link")

    def _accept(self, deadline: Deadline) -> Channel:
        channel = self._listener.accept(deadline)
        self._listener.close()
        return channel


class _Wire:
    """An open link: what one transfer after the other uses."""

    def __init__(self, mailbox: Mailbox, pair: NcclPair, lane: Lane, device: torch.device, max_bytes: int) -> None:
        self.mailbox = mailbox
        self.pair = pair
        self.lane = lane
        self.staging = torch.empty((_NUM_BUFFERS, 0), dtype=torch.uint8, device=device)
        self._max_message_bytes = max_bytes
        self._is_open = True

    def max_blocks(self, transfer: Transfer) -> int:
        """How many of its blocks a message may carry on this side."""
        return max(1, self._max_message_bytes // transfer.block_bytes)

    def messages(self, transfer: Transfer, max_blocks: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Which blocks of the transfer each message carries, and its memory `[blocks of it, block_bytes]`.

        The memory is that of the message before the last, which must be finished and, at the sink, landed.
        """
        num_bytes = min(max_blocks, transfer.num_blocks) * transfer.block_bytes
        if self.staging.shape[1] < num_bytes:
            self.staging = torch.empty((_NUM_BUFFERS, num_bytes), dtype=torch.uint8, device=self.staging.device)
        for number, part in enumerate(slices(transfer.num_blocks, max_blocks)):
            num_blocks = part.stop - part.start
            memory = self.staging[number % _NUM_BUFFERS, : num_blocks * transfer.block_bytes]
            yield part, memory.view(num_blocks, transfer.block_bytes)

    def finish(self, message: Message, watch: Watch, deadline: Deadline) -> None:
        """Return once it is through. Raises `TransferFailed`: it failed, the peer did, or the link was closed."""

        def look() -> None:
            watch.look()
            self._look()

        wait(message, deadline, look)
        message.finish()
        self._look()  # NCCL calls an aborted message complete

    def close(self, reason: str) -> None:
        if self._is_open:
            self._is_open = False  # before the abort: see `finish`
            self.mailbox.close(reason)
            self.pair.close(self.staging)

    def _look(self) -> None:
        if not self._is_open:
            raise TransferFailed("the link is closed")


class _Side:
    """What both ends do alike: open at the first transfer, check, and on any failure close before they say so."""

    def __init__(
        self,
        meet: Callable[[Deadline], Channel],
        rank: int,
        end: LinkEnd,
        max_message_bytes: int,
        runtime: Runtime,
    ) -> None:
        self._meet = meet
        self._rank = rank
        self._end = end
        self._max_message_bytes = max_message_bytes
        self._runtime = runtime
        self._wire: _Wire | None = None
        self._is_open = True

    @contextmanager
    def use(
        self, transfer: Transfer, pool: torch.Tensor, block_ids: Sequence[int], deadline: Deadline
    ) -> Iterator[_Wire]:
        """The wire, its lane current; nothing given to the lane is still under way when the block has ended."""
        wire: _Wire | None = None
        try:
            self._end.check(transfer, pool, block_ids)
            wire = self._joined(transfer, pool.device, deadline)
            with translated(f"{transfer.id}: the transfer failed"), wire.lane.current():
                wire.lane.follow()
                yield wire
        except BaseException as error:
            self.close(error.message if isinstance(error, PdserveError) else type(error).__name__)
            raise
        finally:
            if wire is not None:
                fence(wire.lane)

    def close(self, reason: str) -> None:
        self._is_open = False
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close(reason)

    def _joined(self, transfer: Transfer, device: torch.device, deadline: Deadline) -> _Wire:
        if not self._is_open:
            raise TransferFailed(f"{transfer.id}: the link is closed")
        if self._wire is None:
            mailbox = Mailbox(self._meet(deadline))
            try:
                pair = NcclPair(mailbox, self._rank, device, self._runtime.uuid(device), deadline)
            except BaseException as error:
                mailbox.close(error.message if isinstance(error, PdserveError) else type(error).__name__)
                raise
            self._wire = _Wire(mailbox, pair, self._runtime.lane(device), device, self._max_message_bytes)
        return self._wire


def _checked_header(received: bytes, expected: Transfer) -> int:
    """How many blocks the source can put into a message. Raises unless it announces exactly `expected`."""
    if len(received) != HEADER_BYTES + _LIMIT.size:
        raise TransferFailed(f"{expected.id}: the peer announces itself with {len(received)} bytes")
    check_header(received[:HEADER_BYTES], expected)
    return _agreed(received[HEADER_BYTES:], _MAX_LIMIT, expected)


def _agreed(received: bytes, limit: int, transfer: Transfer) -> int:
    blocks = int(_LIMIT.unpack(received)[0]) if len(received) == _LIMIT.size else 0
    if not 1 <= blocks <= limit:
        raise TransferFailed(f"{transfer.id}: the peer wants {blocks} blocks in a message, {limit} at most can be")
    return blocks
