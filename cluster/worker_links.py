"""The async face of a worker's links: pick the kind for each pair, run the blocking part in a thread, time it out.

A transfer has its link to itself from before `Redeem` until the last byte, so both ends see the same order. One that
fails takes its link with it; the next opens a new one under a new epoch. Knows nothing of leases or reservations: it is
told what to move, and when it returns or raises the wire is idle.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from pdserve.kv_transfer.config import KVTransferConfig
from pdserve.kv_transfer.gloo import GlooSink, GlooSource
from pdserve.kv_transfer.link import Deadline, LinkSink, LinkSource, Transfer
from pdserve.kv_transfer.links import LinkKey, LinkTable
from pdserve.kv_transfer.peers import Peers
from pdserve.kv_transfer.plan import ONE_SIDED, Reach, choose_link
from pdserve.kv_transfer.shared_pool import SharedPool
from pdserve.kv_transfer.shm import ShmSink
from pdserve.proto.errors import StaleReference, TransferFailed
from pdserve.proto.types import HandoffId, KVTicket, WorkerInfo, WorkerRef

MAX_TRANSFERS = 8


class WorkerLinks:
    """Owner of both link tables and of the transfer threads."""

    def __init__(self, info: WorkerInfo, blocks: torch.Tensor, config: KVTransferConfig, peers: Peers) -> None:
        self._info = info
        self._blocks = blocks  # uint8 [num_blocks, block_bytes]
        self._layout_hash = info.layout.hash64()
        self._config = config
        self._peers = peers
        self._sinks: LinkTable[LinkSink] = LinkTable(config.max_links)
        # Never evicted here, or the target's next redemption would fail: there is one for each live peer at most, and
        # the target evicts.
        self._sources: LinkTable[LinkSource] = LinkTable(sys.maxsize)
        self._threads = ThreadPoolExecutor(MAX_TRANSFERS, thread_name_prefix="transfer")
        self._loop = asyncio.get_running_loop()

    @staticmethod
    def addresses(config: KVTransferConfig, memory: SharedPool) -> Mapping[str, str]:
        """What a ticket says about reaching this worker's pool, by kind of link."""
        known = {"shm": memory.address, "gloo": config.host}
        return {kind: known[kind] for kind in config.links}

    def close(self) -> None:
        """Close every link; transfers in progress end at their own deadline."""
        self._sinks.close()
        self._sources.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def drop_peer(self, worker_id: str, generation: int) -> None:
        """Close the links to a process that is gone."""
        self._sinks.drop_peer(worker_id, generation)
        self._sources.drop_peer(worker_id, generation)

    async def receive(self, ticket: KVTicket, block_ids: tuple[int, ...]) -> str:
        """Fetch a ticket's blocks into ours; the kind of link it took.

        Raises:
            TransferFailed, StaleReference, LayoutMismatch: they did not arrive; nothing is written any more.
        """
        ours = Reach(self._info.host_id, frozenset(self._info.link_address))
        theirs = Reach(ticket.host_id, frozenset(ticket.link_address))
        kind = choose_link(self._config.links, ours, theirs)
        await self._loop.run_in_executor(self._threads, self._receive, kind, ticket, block_ids)
        return kind

    async def send(
        self,
        handoff: HandoffId,
        target: WorkerRef,
        kind: str,
        link_epoch: int,
        address: str,
        block_ids: tuple[int, ...],
    ) -> None:
        """Send blocks of ours on the link that the target asked for; our memory is not read any more on return."""
        work = (handoff, target, kind, link_epoch, address, block_ids)
        await self._loop.run_in_executor(self._threads, self._send, *work)

    def _receive(self, kind: str, ticket: KVTicket, block_ids: tuple[int, ...]) -> None:
        """In a transfer thread."""
        deadline = Deadline(self._config.transfer_timeout_s)
        key = LinkKey(ticket.source.worker_id, ticket.source.generation, kind)

        def open_sink(link_epoch: int) -> LinkSink:
            if kind == "shm":
                return ShmSink(ticket.link_address["shm"], self._blocks, self._layout_hash, link_epoch)
            limit = self._config.max_message_bytes
            return GlooSink(self._blocks, self._layout_hash, link_epoch, self._config.host, limit)

        with self._sinks.use(key, open_sink, deadline.left_s()) as (link, link_epoch):
            refusal = None if kind in ONE_SIDED else self._redeem(kind, ticket, link_epoch, link.address)
            if refusal is None:
                transfer = self._transfer(ticket.id, len(block_ids), link_epoch)
                link.receive(transfer, ticket.block_ids, block_ids, deadline.left_s())
        if refusal is not None:
            raise refusal

    def _redeem(self, kind: str, ticket: KVTicket, link_epoch: int, address: str) -> StaleReference | None:
        """Ask the source to send, from a transfer thread. A refusal is returned: no byte moved, the link is sound."""
        call = self._peers.redeem(ticket.source, self._info.worker, ticket.id, kind, link_epoch, address)
        waiting = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            waiting.result(self._config.control_timeout_s + 1.0)
        except StaleReference as refusal:
            return refusal
        except TimeoutError as error:
            waiting.cancel()
            raise TransferFailed(f"{ticket.source.worker_id} did not answer the redemption") from error
        return None

    def _send(
        self,
        handoff: HandoffId,
        target: WorkerRef,
        kind: str,
        link_epoch: int,
        address: str,
        block_ids: tuple[int, ...],
    ) -> None:
        """In a transfer thread."""
        if kind != "gloo":
            raise TransferFailed(f"cannot send over {kind!r}")
        deadline = Deadline(self._config.transfer_timeout_s)
        key = LinkKey(target.worker_id, target.generation, kind)

        def open_source(epoch: int) -> LinkSource:
            limit = self._config.max_message_bytes
            return GlooSource(address, self._blocks, self._layout_hash, epoch, self._config.host, limit)

        with self._sources.use(key, open_source, deadline.left_s(), link_epoch) as (link, epoch):
            link.send(self._transfer(handoff, len(block_ids), epoch), block_ids, deadline.left_s())

    def _transfer(self, handoff: HandoffId, num_blocks: int, link_epoch: int) -> Transfer:
        return Transfer(handoff, num_blocks, self._info.layout.block_bytes, self._layout_hash, link_epoch)
