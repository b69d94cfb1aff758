"""Link over TCP, between any two hosts: a pairwise Gloo group, opened by the first transfer.

A transfer is one small message with the header, then few large ones with the blocks. Both ends derive the sizes from
the transfer that they agreed on; the sink posts no receive for blocks before the header has been checked. Blocks pass
through staging memory on both ends: wire bytes never land in a pool, however late they come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pdserve.kv_transfer.link import HEADER_BYTES, Bytes, Deadline, LinkEnd, Transfer, check_block_ids, check_header
from pdserve.kv_transfer.plan import copy_runs
from pdserve.kv_transfer.process_group import PairGroup
from pdserve.kv_transfer.rendezvous import Listener, connect
from pdserve.proto.errors import TransferFailed

_SINK_RANK, _SOURCE_RANK = 0, 1


class GlooSource:
    """`address` is the sink's, as `Redeem` carries it. `host` is the interface to send from."""

    def __init__(
        self, address: str, pool: torch.Tensor, layout_hash: int, link_epoch: int, host: str, max_message_bytes: int
    ) -> None:
        self._address = address
        self._host = host
        self._end = LinkEnd(pool, layout_hash, link_epoch)
        self._staging = _Staging(max_message_bytes)
        self._group: PairGroup | None = None
        self._is_open = True

    def send(self, transfer: Transfer, block_ids: Sequence[int], timeout_s: float) -> None:
        deadline = Deadline(timeout_s)
        try:
            self._end.check(transfer, block_ids)
            group = self._joined(transfer, deadline)
            group.send(torch.frombuffer(bytearray(transfer.header()), dtype=torch.uint8), deadline)
            rows = self._end.rows
            for part, message in self._staging.messages(transfer):
                for run in copy_runs(zip(block_ids[part], range(transfer.num_blocks), strict=False)):
                    message[run.target : run.target + run.num_blocks] = rows[run.source : run.source + run.num_blocks]
                group.send(torch.from_numpy(message), deadline)
        except BaseException:
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

    def __init__(
        self, pool: torch.Tensor, layout_hash: int, link_epoch: int, host: str, max_message_bytes: int
    ) -> None:
        self._host = host
        self._end = LinkEnd(pool, layout_hash, link_epoch)
        self._staging = _Staging(max_message_bytes)
        self._listener = Listener(host)
        self._group: PairGroup | None = None
        self._is_open = True

    @property
    def address(self) -> str:
        return self._listener.address

    def receive(
        self, transfer: Transfer, source_block_ids: Sequence[int], target_block_ids: Sequence[int], timeout_s: float
    ) -> None:
        deadline = Deadline(timeout_s)
        try:
            self._end.check(transfer, target_block_ids)
            check_block_ids(transfer, source_block_ids, max(source_block_ids, default=0) + 1)
            group = self._joined(transfer, deadline)
            header = torch.empty(HEADER_BYTES, dtype=torch.uint8)
            group.recv(header, deadline)
            check_header(header.numpy().tobytes(), transfer)
            rows = self._end.rows
            for part, message in self._staging.messages(transfer):
                group.recv(torch.from_numpy(message), deadline)
                for run in copy_runs(zip(range(transfer.num_blocks), target_block_ids[part], strict=False)):
                    rows[run.target : run.target + run.num_blocks] = message[run.source : run.source + run.num_blocks]
        except BaseException:
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


class _Staging:
    """One buffer, reused, at most `max_message_bytes` large (but always room for one block)."""

    def __init__(self, max_message_bytes: int) -> None:
        self._max_message_bytes = max_message_bytes
        self._buffer: Bytes = np.empty(0, np.uint8)

    def messages(self, transfer: Transfer) -> Iterator[tuple[slice, Bytes]]:
        """Which blocks of the transfer each message carries, and its memory `[blocks of it, block_bytes]`."""
        max_blocks = max(1, self._max_message_bytes // transfer.block_bytes)
        num_bytes = min(max_blocks, transfer.num_blocks) * transfer.block_bytes
        if self._buffer.size < num_bytes:
            self._buffer = np.empty(num_bytes, np.uint8)
        for first in range(0, transfer.num_blocks, max_blocks):
            last = min(first + max_blocks, transfer.num_blocks)
            message = self._buffer[: (last - first) * transfer.block_bytes]
            yield slice(first, last), message.reshape(last - first, transfer.block_bytes)
