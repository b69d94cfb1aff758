"""The prefill role: compute a prompt, say its first token, lease its KV until the decode worker has it.

    prefill() -> [engine: a chunk of the prompt] -> part_computed() -> digests -> Offer(ticket, part)
        ... chunk after chunk ... -> the last part -> Redeem: send (links that need a sender) -> Release: blocks freed

The states, the order of offers and their repetition are `kv_transfer.lease`'s; this module is its hands: it carries out
effects and reports back what became of them. Runs on the worker's event loop; everything that touches the engine is
posted to its thread. Does not know how requests were routed, nor what decode workers do with a ticket.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pdserve.engine.block_pool import BlockState
from pdserve.engine.engine import Engine
from pdserve.engine.loop import EngineLoop
from pdserve.engine.plan import ComputedPart
from pdserve.engine.sequence import Sequence
from pdserve.kv_transfer.digest import FAST, Digester
from pdserve.kv_transfer.effects import FreeBlocks, Ignored, QuarantineBlocks
from pdserve.kv_transfer.export import Export
from pdserve.kv_transfer.lease import (
    HandoffFailed,
    LeaseEffects,
    LeaseTimes,
    SendKey,
    SendOffer,
    StartSend,
    StopPrefill,
)
from pdserve.kv_transfer.leases import LeaseTable
from pdserve.kv_transfer.link import INLINE_BYTES
from pdserve.kv_transfer.peers import Peers, Redemption
from pdserve.proto.clock import now
from pdserve.proto.errors import PdserveError, WorkerLost, rebuild
from pdserve.proto.status import as_typed
from pdserve.proto.types import HandoffId, KVPart, KVTicket, WorkerRef, WorkerRequest

logger = logging.getLogger(__name__)


class Sender(Protocol):
    """Sends leased blocks over a link; runs the blocking part in the link's own thread."""

    async def send(self, start: StartSend, link: str, address: str) -> None: ...


@dataclass(frozen=True, slots=True)
class SourceIdentity:
    """What a ticket says about its worker."""

    worker: WorkerRef
    host_id: str
    link_address: Mapping[str, str]


class PrefillRole:
    """Owner of the leases."""

    def __init__(
        self,
        identity: SourceIdentity,
        loop: EngineLoop,
        export: Export,
        digester: Digester,
        sender: Sender,
        peers: Peers,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        fail: Callable[[HandoffId, PdserveError], None],
        done: Callable[[HandoffId], None],
        times: LeaseTimes,
    ) -> None:
        self._identity = identity
        self._loop = loop
        self._export = export
        self._digester = digester
        self._times = times
        self._leases = LeaseTable(times)
        self._sender = sender
        self._peers = peers
        self._spawn = spawn
        self._fail = fail
        self._done = done

    def prefill(self, request: WorkerRequest, hand_off_to: WorkerRef) -> None:
        """Queue the prompt; its KV will be offered to `hand_off_to`."""
        num_tokens = len(request.prompt_token_ids)
        self._carry_out(self._leases.accept(request.id, hand_off_to, num_tokens, now()))
        sequence = Sequence(request, now(), hand_off=True)
        self._loop.post(lambda engine: engine.add(sequence))

    def part_computed(self, part: ComputedPart) -> None:
        """Blocks of a prompt are final, and ours to lease."""
        id = part.sequence.request.id
        self._carry_out(self._leases.part_computed(id, part.block_ids, part.first_token, now()))

    def redeem(self, target: WorkerRef, redemption: Redemption) -> None:
        """Start sending; returns at once, the bytes follow on the link.

        Raises:
            StaleReference: no such lease or part, not for this target, or an older link epoch.
            TransferFailed: an earlier send still runs.
        """
        id = redemption.id
        effects = self._leases.send_started(id, target, redemption.key, redemption.first, now())
        for effect in effects:
            if isinstance(effect, StartSend):
                self._spawn(self._send(effect, redemption.link, redemption.link_address))

    def renew(self, handoffs: Iterable[HandoffId]) -> tuple[HandoffId, ...]:
        """Extend leases; those that are lost."""
        return self._leases.renew(handoffs, now())

    def release(self, handoff: HandoffId, outcome: str) -> None:
        """The decode worker is done with it. Unknown hand-offs are ignored: release is idempotent."""
        if outcome != "redeemed":
            logger.warning("hand-off %s released: %s", handoff, outcome)
        self._carry_out(self._leases.release(handoff, outcome, now()))
        self._done(handoff)

    def abort(self, handoff: HandoffId, reason: str) -> None:
        self._carry_out(self._leases.abort(handoff, reason, now()))

    def finished(self, handoff: HandoffId) -> None:
        """The request ended here, with its first token or with an error: there is nothing to hand off."""
        self.abort(handoff, "the request has ended")

    def peer_gone(self, worker_id: str, generation: int) -> None:
        """Nobody will redeem what is leased to this process any more."""
        self._carry_out(self._leases.peer_gone(worker_id, generation, now()))

    def sweep(self, now_s: float) -> None:
        self._carry_out(self._leases.sweep(now_s))

    def _carry_out(self, effects: LeaseEffects) -> None:
        for effect in effects:
            match effect:
                case SendOffer():
                    self._spawn(self._offer(effect))
                case StopPrefill(id=handoff):
                    self._loop.post(_stop(handoff))
                case FreeBlocks(block_ids=block_ids, from_quarantine=quarantined):
                    self._loop.post(_release(block_ids, BlockState.QUARANTINED if quarantined else BlockState.LEASED))
                case QuarantineBlocks(block_ids=block_ids):
                    self._loop.post(_quarantine(block_ids))
                case HandoffFailed(id=handoff, kind=kind, message=message):
                    self._fail(handoff, rebuild(kind, message))
                case Ignored(id=handoff, reason=reason):
                    logger.debug("hand-off %s: ignored: %s", handoff, reason)

    async def _offer(self, offer: SendOffer) -> None:
        failure: PdserveError | None = None
        try:
            digests = await self._digest(offer)
            if not self._leases.is_offering(offer.id, offer.part):
                return  # it ended meanwhile: these may be digests of another's KV, and must not vouch for it
            await self._peers.offer(offer.target, self._ticket(offer), _part(offer, digests))
        except Exception as error:
            failure = as_typed(error)
        kind, message = ("", "") if failure is None else (type(failure).__name__, failure.message)
        # No answer is not a refusal. If the target has died, the controller says so.
        is_transient = isinstance(failure, WorkerLost)
        now_s = now()
        self._carry_out(self._leases.offer_ended(offer.id, offer.part, now_s, kind, message, is_transient))

    async def _digest(self, offer: SendOffer) -> tuple[int, ...]:
        """Digests of the part's blocks, ready to be read: beside the next chunk's computation, unless they are few."""
        num_bytes = len(offer.block_ids) * self._export.layout.block_bytes
        if num_bytes <= INLINE_BYTES and self._export.is_ready and self._digester.algorithm == FAST:
            return self._prepare(offer)
        return await asyncio.to_thread(self._prepare, offer)

    def _prepare(self, offer: SendOffer) -> tuple[int, ...]:
        self._export.prepare(offer.block_ids)
        layout_hash = self._export.layout.hash64()
        return self._digester.digests(offer.id, layout_hash, offer.first_block, self._export.blocks, offer.block_ids)

    def _ticket(self, offer: SendOffer) -> KVTicket:
        return KVTicket(
            id=offer.id,
            source=self._identity.worker,
            num_tokens=offer.num_tokens,
            layout=self._export.layout,
            digest=self._digester.algorithm,
            lease_s=self._times.lease_s,
            host_id=self._identity.host_id,
            link_address=self._identity.link_address,
        )

    async def _send(self, start: StartSend, link: str, address: str) -> None:
        try:
            await self._sender.send(start, link, address)
        except Exception as error:
            logger.warning("send of %s over %s failed: %s", start.id, link, as_typed(error).message)
        finally:
            self._ended(start.id, start.key)

    def _ended(self, handoff: HandoffId, key: SendKey) -> None:
        self._carry_out(self._leases.send_ended(handoff, key, now()))


def _part(offer: SendOffer, digests: tuple[int, ...]) -> KVPart:
    return KVPart(offer.part, offer.first_block, offer.block_ids, digests, offer.first_token)


def _stop(handoff: HandoffId) -> Callable[[Engine], None]:
    def command(engine: Engine) -> None:
        engine.abort(handoff)

    return command


def _release(block_ids: tuple[int, ...], state: BlockState) -> Callable[[Engine], None]:
    return lambda engine: engine.pool.release(block_ids, state)


def _quarantine(block_ids: tuple[int, ...]) -> Callable[[Engine], None]:
    return lambda engine: engine.pool.move(block_ids, BlockState.LEASED, BlockState.QUARANTINED)
