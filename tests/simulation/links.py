"""A worker's links over simulated wires: what `cluster.worker_links` does in threads, on the simulation's time.

Keeps its rules: one transfer at a time on a link, from before `Redeem` until the last byte; a link that failed is
closed and the next gets a new epoch; the source refuses older epochs; every block is verified by the real digests as it
lands; when `receive` or `send` comes back the wire is idle. That may be long after the deadline.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from simulation.loop import Process
from simulation.wires import Rows, Sink, Wires

from pdserve.engine.block_pool import BlockPool, BlockState
from pdserve.kv_transfer.config import KVTransferConfig
from pdserve.kv_transfer.digest import KEYED, Digester
from pdserve.kv_transfer.export import Export
from pdserve.kv_transfer.landing import Landings
from pdserve.kv_transfer.lease import SendKey, StartSend
from pdserve.kv_transfer.link import Landing, PartCheck, Transfer
from pdserve.kv_transfer.links import LinkKey
from pdserve.kv_transfer.peers import Peers, Redemption
from pdserve.kv_transfer.plan import ONE_SIDED, Reach, choose_link
from pdserve.kv_transfer.reservation import FetchPart
from pdserve.proto.clock import now
from pdserve.proto.errors import CorruptKV, LayoutMismatch, StaleReference, TransferFailed
from pdserve.proto.types import HandoffId, KVLayout, WorkerInfo


@dataclass(slots=True)
class _Entry:
    link_epoch: int
    link: Any = None
    is_busy: bool = True
    is_doomed: bool = False


class SimLinkTable:
    """`kv_transfer.links.LinkTable` for tasks instead of threads."""

    def __init__(self) -> None:
        self._entries: dict[LinkKey, _Entry] = {}
        self._dead_epochs: dict[LinkKey, int] = {}
        self._last_epoch = 0
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def use(
        self, key: LinkKey, open_link: Callable[[int], Any], timeout_s: float, link_epoch: int | None = None
    ) -> AsyncIterator[tuple[Any, int]]:
        try:
            entry = self._claim(key, link_epoch)
            if entry is None:
                async with asyncio.timeout(timeout_s):
                    while (entry := self._claim(key, link_epoch)) is None:
                        await self._changed.wait()
        except TimeoutError as error:
            raise TransferFailed(f"the {key.kind} link to {key.worker_id} was not free in time") from error
        try:
            if entry.link is None:
                entry.link = open_link(entry.link_epoch)
            yield entry.link, entry.link_epoch
        except BaseException:
            entry.is_doomed = True
            raise
        finally:
            entry.is_busy = False
            if entry.is_doomed:
                self._remove(key, entry)
            self._changed.set()
            self._changed = asyncio.Event()

    def is_idle(self, key: LinkKey) -> bool:
        entry = self._entries.get(key)
        return entry is not None and not entry.is_busy

    def drop_peer(self, worker_id: str, generation: int) -> None:
        for key in [key for key in self._entries if (key.worker_id, key.generation) == (worker_id, generation)]:
            self._doom(key)

    def _claim(self, key: LinkKey, link_epoch: int | None) -> _Entry | None:
        entry, dead = self._entries.get(key), self._dead_epochs.get(key, 0)
        newest = max(dead, entry.link_epoch if entry else 0)
        if link_epoch is not None and (link_epoch < newest or link_epoch == dead):
            raise StaleReference(f"link epoch {link_epoch} to {key.worker_id} is over")
        if entry is not None and entry.is_busy:
            return None
        if entry is not None and link_epoch not in (None, entry.link_epoch):
            self._doom(key)
            entry = None
        if entry is None:
            self._last_epoch += link_epoch is None
            entry = self._entries[key] = _Entry(self._last_epoch if link_epoch is None else link_epoch)
        entry.is_busy = True
        return entry

    def _doom(self, key: LinkKey) -> None:
        entry = self._entries[key]
        entry.is_doomed = True
        if not entry.is_busy:
            self._remove(key, entry)

    def _remove(self, key: LinkKey, entry: _Entry) -> None:
        del self._entries[key]
        self._dead_epochs[key] = max(entry.link_epoch, self._dead_epochs.get(key, 0))
        if isinstance(entry.link, Sink):
            entry.link.close()


class SimLinks:
    """Receiver and sender of one worker."""

    def __init__(
        self,
        wires: Wires,
        process: Process,
        info: WorkerInfo,
        export: Export,
        landings: Landings,
        config: KVTransferConfig,
        peers: Peers,
        pool: BlockPool,
    ) -> None:
        self._wires = wires
        self._process = process
        self._info = info
        self._export = export
        self._landings = landings
        self._config = config
        self._peers = peers
        self._pool = pool
        self.on_verified: Callable[[HandoffId, int], None] = _nobody
        self._sinks = SimLinkTable()
        self._sources = SimLinkTable()
        self._trace = wires.network.trace

    def drop_peer(self, worker_id: str, generation: int) -> None:
        self._sinks.drop_peer(worker_id, generation)
        self._sources.drop_peer(worker_id, generation)

    def receive_now(self, fetch: FetchPart) -> str | None:
        """See `WorkerLinks.receive_now`; here it depends on chance, not on the size."""
        kind = self._kind(fetch)
        key = LinkKey(fetch.ticket.source.worker_id, fetch.ticket.source.generation, kind)
        if kind not in ONE_SIDED or not self._sinks.is_idle(key) or self._wires.random.random() < 0.5:
            return None
        self._trace.count("fetches at once")
        work = self._fetch(kind, fetch, math.inf)
        try:
            work.send(None)
        except StopIteration:
            return kind
        raise AssertionError("what is done at once waits for nobody")

    async def receive(self, fetch: FetchPart) -> str:
        """See `WorkerLinks.receive`."""
        kind = self._kind(fetch)
        await self._fetch(kind, fetch, now() + self._config.transfer_timeout_s)
        return kind

    def _kind(self, fetch: FetchPart) -> str:
        ours = Reach(self._info.host_id, frozenset(self._info.link_address))
        theirs = Reach(fetch.ticket.host_id, frozenset(fetch.ticket.link_address))
        return choose_link(self._config.links, ours, theirs).kind

    async def _fetch(self, kind: str, fetch: FetchPart, deadline_s: float) -> None:
        """Without a deadline it is done at once, as far as the link is one-sided and idle."""
        self._trace.count(f"fetches over {kind}")
        try:
            await self._receive(kind, fetch, deadline_s)
        except CorruptKV as error:
            self._trace.count("corruptions detected")
            self._trace.add(self._process.name, f"fetch failed: {error.message}")
            raise
        except Exception as error:
            self._trace.count("fetches refused" if isinstance(error, StaleReference) else "fetches failed")
            self._trace.add(self._process.name, f"fetch of {fetch.id} part {fetch.part.index} failed: {error}")
            raise
        self._trace.count("parts fetched")
        self._trace.add(self._process.name, f"fetched {fetch.id} part {fetch.part.index} over {kind}")

    async def _receive(self, kind: str, fetch: FetchPart, deadline_s: float) -> None:
        ticket, part = fetch.ticket, fetch.part
        key_bytes = self._config.digest_key_bytes
        if (ticket.digest == KEYED) != bool(key_bytes):
            raise LayoutMismatch(f"{ticket.id}: digests are {ticket.digest} there; kv_transfer.digest_key differs")
        source_block_ids, digests = part.block_ids[fetch.first :], part.block_digests[fetch.first :]
        first = part.first_block + fetch.first
        check = self._watched(
            Digester(ticket.digest, key_bytes).checker(ticket.id, ticket.layout.hash64(), first, digests),
            ticket.id,
            first,
        )
        key = LinkKey(ticket.source.worker_id, ticket.source.generation, kind)

        def open_sink(_: int) -> Sink | Rows:
            return (
                self._wires.memory(ticket.link_address[kind]) if kind in ONE_SIDED else self._wires.sink(self._process)
            )

        async with self._sinks.use(key, open_sink, deadline_s - now()) as (link, link_epoch):
            send_key = SendKey(link_epoch, part.index)
            refusal = None
            if isinstance(link, Sink):
                refusal = await self._redeem(fetch, Redemption(ticket.id, send_key, fetch.first, kind, link.address))
            if refusal is None:
                transfer = _transfer(ticket.id, send_key, len(source_block_ids), ticket.layout)
                with self._landings.open(ticket, first, len(source_block_ids), fetch.block_ids) as landing:
                    if isinstance(link, Sink):
                        await self._await_blocks(link, transfer, landing, check, deadline_s)
                    else:
                        await self._copy(link, source_block_ids, landing, check, deadline_s)
        if refusal is not None:
            raise refusal

    async def _redeem(self, fetch: FetchPart, redemption: Redemption) -> StaleReference | None:
        try:
            async with asyncio.timeout(self._config.control_timeout_s + 1.0):
                await self._peers.redeem(fetch.ticket.source, self._info.worker, redemption)
        except StaleReference as refusal:
            return refusal
        except TimeoutError as error:
            raise TransferFailed(f"{fetch.ticket.source.worker_id} did not answer the redemption") from error
        return None

    async def _copy(
        self, rows: Rows, source_block_ids: tuple[int, ...], landing: Landing, check: PartCheck, deadline_s: float
    ) -> None:
        for position, block_id in enumerate(source_block_ids):
            if deadline_s < math.inf:
                await self._wires.pause()
            block = self._wires.carry(rows, block_id)  # whatever the time: a late write is a write
            self._land(landing, position, block, check)
            if now() >= deadline_s:
                raise TransferFailed("the transfer's deadline passed")

    async def _await_blocks(
        self, sink: Sink, transfer: Transfer, landing: Landing, check: PartCheck, deadline_s: float
    ) -> None:
        done = sink.begin(transfer, lambda position, block: self._land(landing, position, block, check))
        try:
            async with asyncio.timeout(deadline_s - now()):
                await asyncio.shield(done)
        except TimeoutError as error:
            await self._fall_idle(done)
            raise TransferFailed("the transfer's deadline passed") from error
        finally:
            sink.end()
            if done.done() and not done.cancelled():
                done.exception()

    async def _fall_idle(self, done: asyncio.Future[None]) -> None:
        """Some wires are idle at once when aborted, others go on writing for a while."""
        faults, random = self._wires.faults, self._wires.random
        if faults.hangs and random.random() < 0.7:
            self._trace.count("receivers that could not stop")
            await asyncio.sleep(random.uniform(0.1, faults.hang_s))

    async def send(self, start: StartSend, kind: str, address: str) -> None:
        """See `WorkerLinks.send`."""
        deadline_s = now() + self._config.transfer_timeout_s
        layout, rows = self._export.layout, self._export.blocks.numpy()
        key = LinkKey(start.target.worker_id, start.target.generation, kind)
        epoch = start.key.link_epoch
        async with self._sources.use(key, lambda _: address, deadline_s - now(), epoch) as (link_address, _):
            header = _transfer(start.id, start.key, len(start.block_ids), layout).header()
            try:
                for position, block_id in enumerate(start.block_ids):
                    await self._wires.pause()
                    state = self._pool.state(block_id)
                    if state not in (BlockState.LEASED, BlockState.QUARANTINED):
                        self._trace.violate(self._process.name, f"the wire reads block {block_id}, which is {state}")
                    self._wires.send(self._process, link_address, header, position, self._wires.carry(rows, block_id))
                    if now() >= deadline_s:
                        raise TransferFailed("the transfer's deadline passed")
            except TransferFailed:
                self._wires.broke(self._process, link_address)
                raise
        self._trace.count("parts sent")

    def _land(self, landing: Landing, position: int, block: bytes | None, check: PartCheck) -> None:
        """Written, then verified. A forgotten block is verified as it lies there."""
        row = landing.block_ids[position]
        if landing.pool is self._export.blocks:
            state = self._pool.state(row)
            if state is BlockState.QUARANTINED:
                self._trace.count("writes into quarantine")
            elif state is not BlockState.RECEIVING:
                self._trace.violate(self._process.name, f"the wire writes into block {row}, which is {state}")
        if block is not None:
            landing.pool.numpy()[row] = np.frombuffer(block, dtype=np.uint8)
        check(position, landing.pool, [row])

    def _watched(self, check: PartCheck, id: HandoffId, start: int) -> PartCheck:
        def watched(first: int, pool: torch.Tensor, block_ids: Sequence[int]) -> None:
            check(first, pool, block_ids)
            for position in range(first, first + len(block_ids)):
                self.on_verified(id, start + position)

        return watched


def _nobody(id: HandoffId, position: int) -> None:
    """A worker that receives nothing."""


def _transfer(id: HandoffId, key: SendKey, num_blocks: int, layout: KVLayout) -> Transfer:
    return Transfer(id, key.part, num_blocks, layout.block_bytes, layout.hash64(), key.link_epoch)
