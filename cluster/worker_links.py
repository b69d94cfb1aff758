"""The async face of a worker's links: pick the kind for each pair, run the blocking part in a thread, time it out.

A transfer has its link to itself from before `Redeem` until the last byte, so both ends see the same order. One that
fails takes its link with it; the next opens a new one under a new epoch. Knows nothing of leases or reservations: it is
told what to move, and when it returns or raises the wire is idle.
"""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

from pdserve.cluster.worker_memory import WorkerMemory
from pdserve.kv_transfer.config import KVTransferConfig
from pdserve.kv_transfer.digest import FAST, KEYED, Digester
from pdserve.kv_transfer.export import Export
from pdserve.kv_transfer.landing import Landings
from pdserve.kv_transfer.lease import SendKey, StartSend
from pdserve.kv_transfer.link import INLINE_BYTES, Deadline, LinkSink, LinkSource, Transfer
from pdserve.kv_transfer.link_turns import LinkTurns
from pdserve.kv_transfer.links import LinkKey, LinkTable
from pdserve.kv_transfer.peers import Peers, Redemption
from pdserve.kv_transfer.plan import ONE_SIDED, Reach, choose_link
from pdserve.kv_transfer.reservation import FetchPart
from pdserve.proto.errors import LayoutMismatch, StaleReference, TransferFailed
from pdserve.proto.types import HandoffId, KVLayout, WorkerInfo

MAX_TRANSFERS = 8
AT_ONCE = frozenset({"loopback", "shm"})
"""Links whose sink waits for nobody: neither for the source nor for a device."""


class WorkerLinks:
    """Owner of both link tables and of the transfer threads."""

    def __init__(
        self,
        info: WorkerInfo,
        memory: WorkerMemory,
        export: Export,
        landings: Landings,
        config: KVTransferConfig,
        peers: Peers,
    ) -> None:
        self._info = info
        self._memory = memory
        self._export = export
        self._landings = landings
        self._config = config
        self._peers = peers
        self._sinks: LinkTable[LinkSink] = LinkTable(config.max_links)
        # Never evicted here, or the target's next redemption would fail: there is one for each live peer at most, and
        # the target evicts.
        self._sources: LinkTable[LinkSource] = LinkTable(sys.maxsize)
        self._threads = ThreadPoolExecutor(MAX_TRANSFERS, thread_name_prefix="transfer")
        self._receiving = LinkTurns()
        self._sending = LinkTurns()
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """Close every link; transfers in progress end at their own deadline."""
        self._sinks.close()
        self._sources.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def drop_peer(self, worker_id: str, generation: int) -> None:
        """Close the links to a process that is gone, in a thread: it may take its time."""
        self._threads.submit(self._sinks.drop_peer, worker_id, generation)
        self._threads.submit(self._sources.drop_peer, worker_id, generation)
        self._receiving.forget(worker_id, generation)
        self._sending.forget(worker_id, generation)

    def receive_now(self, fetch: FetchPart) -> str | None:
        """`receive`, where that waits for nobody and takes less than a thread's waking; else `None`."""
        kind, ticket = self._kind(fetch), fetch.ticket
        num_bytes = (len(fetch.part.block_ids) - fetch.first) * ticket.layout.block_bytes
        is_plain = ticket.digest == FAST and ticket.layout == self._info.layout
        if kind not in AT_ONCE or num_bytes > INLINE_BYTES or not is_plain:
            return None
        key = _link_key(kind, fetch)
        if not self._receiving.is_free(key) or not self._sinks.is_idle(key):
            return None
        self._receive(kind, fetch, Deadline(self._config.transfer_timeout_s))
        return kind

    async def receive(self, fetch: FetchPart) -> str:
        """Fetch a part's blocks into ours and verify them; the kind of link it took.

        Raises:
            TransferFailed, StaleReference, LayoutMismatch: they did not arrive; nothing is written any more.
            CorruptKV: they are not what was offered.
        """
        kind, deadline = self._kind(fetch), Deadline(self._config.transfer_timeout_s)
        async with self._receiving.turn(_link_key(kind, fetch), deadline):
            await self._loop.run_in_executor(self._threads, self._receive, kind, fetch, deadline)
        return kind

    async def send(self, start: StartSend, kind: str, address: str) -> None:
        """Send blocks of ours on the link that the target asked for; our memory is not read any more on return."""
        deadline = Deadline(self._config.transfer_timeout_s)
        key = LinkKey(start.target.worker_id, start.target.generation, kind)
        async with self._sending.turn(key, deadline):
            await self._loop.run_in_executor(self._threads, self._send, start, key, address, deadline)

    def _kind(self, fetch: FetchPart) -> str:
        """Of the link to take. Raises `LayoutMismatch` if there is none."""
        ours = Reach(self._info.host_id, frozenset(self._info.link_address))
        theirs = Reach(fetch.ticket.host_id, frozenset(fetch.ticket.link_address))
        return choose_link(self._config.links, ours, theirs).kind

    def _receive(self, kind: str, fetch: FetchPart, deadline: Deadline) -> None:
        """In a transfer thread, or in the loop if it waits for nobody."""
        ticket, part = fetch.ticket, fetch.part
        key = _link_key(kind, fetch)
        source_block_ids, digests = part.block_ids[fetch.first :], part.block_digests[fetch.first :]
        first = part.first_block + fetch.first
        key_bytes = self._config.digest_key_bytes
        if (ticket.digest == KEYED) != bool(key_bytes):
            raise LayoutMismatch(f"{ticket.id}: digests are {ticket.digest} there; kv_transfer.digest_key differs")
        digester = Digester(ticket.digest, key_bytes)
        layout_hash = ticket.layout.hash64()
        check = digester.checker(ticket.id, layout_hash, first, digests, len(source_block_ids))

        def open_sink(link_epoch: int) -> LinkSink:
            return self._memory.open_sink(kind, ticket.link_address[kind], layout_hash, link_epoch)

        with self._sinks.use(key, open_sink, deadline.left_s()) as (link, link_epoch):
            send_key = SendKey(link_epoch, part.index)
            refusal = None
            if kind not in ONE_SIDED:
                redemption = Redemption(ticket.id, send_key, fetch.first, kind, link.address)
                refusal = self._redeem(fetch, redemption, deadline)
            if refusal is None:
                transfer = _transfer(ticket.id, send_key, len(source_block_ids), ticket.layout)
                with self._landings.open(ticket, first, len(source_block_ids), fetch.block_ids) as landing:
                    link.receive(transfer, source_block_ids, landing, check, deadline.left_s())
        if refusal is not None:
            raise refusal

    def _redeem(self, fetch: FetchPart, redemption: Redemption, deadline: Deadline) -> StaleReference | None:
        """Ask the source to send, from a transfer thread. A refusal is returned: no byte moved, the link is sound."""
        source = fetch.ticket.source
        call = self._peers.redeem(source, self._info.worker, redemption)
        waiting = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            waiting.result(min(self._config.control_timeout_s + 1.0, deadline.left_s()))
        except StaleReference as refusal:
            return refusal
        except TimeoutError as error:
            waiting.cancel()
            raise TransferFailed(f"{source.worker_id} did not answer the redemption") from error
        return None

    def _send(self, start: StartSend, key: LinkKey, address: str, deadline: Deadline) -> None:
        """In a transfer thread."""
        layout = self._export.layout

        def open_source(epoch: int) -> LinkSource:
            return self._memory.open_source(key.kind, address, self._export.blocks, layout.hash64(), epoch)

        with self._sources.use(key, open_source, deadline.left_s(), start.key.link_epoch) as (link, _):
            transfer = _transfer(start.id, start.key, len(start.block_ids), layout)
            link.send(transfer, start.block_ids, deadline.left_s())


def _link_key(kind: str, fetch: FetchPart) -> LinkKey:
    return LinkKey(fetch.ticket.source.worker_id, fetch.ticket.source.generation, kind)


def _transfer(id: HandoffId, key: SendKey, num_blocks: int, layout: KVLayout) -> Transfer:
    return Transfer(id, key.part, num_blocks, layout.block_bytes, layout.hash64(), key.link_epoch)
