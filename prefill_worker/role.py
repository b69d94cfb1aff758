"""The prefill role: compute a prompt, say its first token, lease its KV until the decode worker has it.

    prefill() -> [engine: chunks of the prompt] -> handed off -> lease granted -> digests
        -> Offer(ticket) to the decode worker -> Redeem: send (links that need a sender) -> Release: blocks freed

Whatever goes wrong after the lease was granted ends in `release` or in the lease lapsing: blocks are freed once nothing
reads them. Runs on the worker's event loop; everything that touches the engine is posted to its thread. Does not
know how requests were routed, nor what decode workers do with a ticket.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pdserve.engine.block_pool import BlockState
from pdserve.engine.engine import Engine
from pdserve.engine.loop import EngineLoop
from pdserve.engine.sequence import Sequence
from pdserve.kv_transfer.digest import block_digests
from pdserve.kv_transfer.effects import FreeBlocks, QuarantineBlocks
from pdserve.kv_transfer.lease import LeaseEffect, LeaseLapsed, LeaseState, LeaseTable, StartSend
from pdserve.kv_transfer.peers import Peers
from pdserve.proto.errors import PdserveError, StaleReference, TransferFailed, WorkerLost
from pdserve.proto.status import as_typed
from pdserve.proto.types import HandoffId, KVLayout, KVTicket, WorkerRef, WorkerRequest

logger = logging.getLogger(__name__)


class Sender(Protocol):
    """Sends leased blocks over a link; runs the blocking part in the link's own thread."""

    async def send(
        self, handoff: HandoffId, target: WorkerRef, link: str, epoch: int, address: str, block_ids: tuple[int, ...]
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class SourceIdentity:
    """What a ticket says about its worker."""

    worker: WorkerRef
    layout: KVLayout
    host_id: str
    link_address: Mapping[str, str]


class PrefillRole:
    """Owner of the leases."""

    def __init__(
        self,
        identity: SourceIdentity,
        loop: EngineLoop,
        blocks: torch.Tensor,
        sender: Sender,
        peers: Peers,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        fail: Callable[[HandoffId, PdserveError], None],
        done: Callable[[HandoffId], None],
        lease_s: float,
    ) -> None:
        self._identity = identity
        self._loop = loop
        self._blocks = blocks  # uint8 [num_blocks, block_bytes]
        self._lease_s = lease_s
        self._leases = LeaseTable(lease_s)
        self._sender = sender
        self._peers = peers
        self._spawn = spawn
        self._fail = fail
        self._done = done
        self._targets: dict[HandoffId, WorkerRef] = {}

    def prefill(self, request: WorkerRequest, hand_off_to: WorkerRef) -> None:
        """Queue the prompt; its KV will be offered to `hand_off_to`."""
        sequence = Sequence(request, time.monotonic(), hand_off=True)
        self._targets[request.id] = hand_off_to
        self._loop.post(lambda engine: engine.add(sequence))

    def finished(self, handoff: HandoffId) -> None:
        """The request ended here, with its first token or with an error: there is nothing to hand off."""
        self._targets.pop(handoff, None)

    def handed_off(self, sequence: Sequence, first_token: int) -> None:
        """The prompt is computed; its blocks are ours to lease."""
        handoff, block_ids = sequence.request.id, tuple(sequence.block_ids)
        target = self._targets.pop(handoff, None)
        if target is None:  # aborted while the step ran
            self._release_blocks(block_ids, BlockState.LEASED)
            return
        self._apply(self._leases.grant(handoff, target, block_ids, time.monotonic()))
        self._spawn(self._offer(handoff, target, block_ids, sequence.num_prompt_tokens, first_token))

    async def _offer(
        self, handoff: HandoffId, target: WorkerRef, block_ids: tuple[int, ...], num_tokens: int, first_token: int
    ) -> None:
        try:
            digests = await asyncio.to_thread(block_digests, handoff, self._blocks, block_ids)
            if not self._is_leased(handoff):
                return  # aborted meanwhile: the blocks may be another's, and the digests of another's KV
            ticket = KVTicket(
                id=handoff,
                source=self._identity.worker,
                num_tokens=num_tokens,
                layout=self._identity.layout,
                first_token=first_token,
                block_ids=block_ids,
                block_digests=digests,
                lease_s=self._lease_s,
                host_id=self._identity.host_id,
                link_address=self._identity.link_address,
            )
            await self._peers.offer(target, ticket)
        except Exception as error:
            # Failure to start is said aloud: nobody may wait for KV that will never come.
            failure = as_typed(error)
            self._apply(self._leases.abort(handoff, failure.message, time.monotonic()))
            self._fail(handoff, TransferFailed(f"{target.worker_id} did not take the offer: {failure.message}"))

    def _is_leased(self, handoff: HandoffId) -> bool:
        lease = self._leases.leases.get(handoff)
        return lease is not None and lease.state is LeaseState.LEASED

    def redeem(self, handoff: HandoffId, target: WorkerRef, link: str, link_epoch: int, address: str) -> None:
        """Start sending; returns at once, the bytes follow on the link.

        Raises:
            StaleReference: no such lease, not for this target, or an older link epoch.
            TransferFailed: an earlier send still runs.
        """
        lease = self._leases.leases.get(handoff)
        if lease is None or lease.target != target:
            raise StaleReference(f"no lease for hand-off {handoff}")
        for effect in self._leases.send_started(handoff, link_epoch, time.monotonic()):
            if isinstance(effect, StartSend):
                self._spawn(self._send(effect, link, address))

    async def _send(self, start: StartSend, link: str, address: str) -> None:
        ok = False
        try:
            await self._sender.send(start.id, start.target, link, start.link_epoch, address, start.block_ids)
            ok = True
        except Exception as error:
            logger.warning("send of %s over %s failed: %s", start.id, link, as_typed(error).message)
        finally:
            self._apply(self._leases.send_ended(start.id, start.link_epoch, ok, time.monotonic()))

    def renew(self, handoffs: Iterable[HandoffId]) -> tuple[HandoffId, ...]:
        """Extend leases; those that are lost."""
        return self._leases.renew(handoffs, time.monotonic())

    def release(self, handoff: HandoffId, outcome: str) -> None:
        """The decode worker is done with it. Unknown hand-offs are ignored: release is idempotent."""
        if outcome != "redeemed":
            logger.warning("hand-off %s released: %s", handoff, outcome)
        self._apply(self._leases.release(handoff, outcome, time.monotonic()))
        self._done(handoff)

    def abort(self, handoff: HandoffId, reason: str) -> None:
        self._targets.pop(handoff, None)
        self._apply(self._leases.abort(handoff, reason, time.monotonic()))

    def peer_gone(self, worker_id: str, generation: int) -> None:
        """Nobody will redeem what is leased to this process any more."""
        gone = [
            lease.id
            for lease in self._leases.leases.values()
            if (lease.target.worker_id, lease.target.generation) == (worker_id, generation)
        ]
        for handoff in gone:
            self._fail(handoff, WorkerLost(f"{worker_id} died before it had redeemed the KV"))

    def sweep(self, now_s: float) -> None:
        self._apply(self._leases.sweep(now_s))

    def _apply(self, effects: Iterable[LeaseEffect]) -> None:
        for effect in effects:
            match effect:
                case FreeBlocks(block_ids=block_ids, from_quarantine=quarantined):
                    self._release_blocks(block_ids, BlockState.QUARANTINED if quarantined else BlockState.LEASED)
                case QuarantineBlocks(block_ids=block_ids):
                    self._loop.post(_mover(block_ids, BlockState.LEASED, BlockState.QUARANTINED))
                case LeaseLapsed(id=handoff, reason=reason):
                    self._fail(handoff, TransferFailed(f"the lease on its KV lapsed: {reason}"))

    def _release_blocks(self, block_ids: tuple[int, ...], state: BlockState) -> None:
        def command(engine: Engine) -> None:
            engine.pool.release(block_ids, state)

        self._loop.post(command)


def _mover(block_ids: tuple[int, ...], source: BlockState, target: BlockState) -> Callable[[Engine], None]:
    def command(engine: Engine) -> None:
        engine.pool.move(block_ids, source, target)

    return command
