"""The decode role: expect a hand-off, redeem its ticket, verify the KV, decode.

    expect() -> reserved -> offer(ticket) -> room: blocks taken -> transfer over a link -> digests verified
        -> the sequence joins the batch, and the prefill worker is told to release its lease

The states and deadlines are `kv_transfer.reservation`'s; this module is its hands: it carries out effects and reports
back what became of them. Runs on the worker's event loop; what touches the engine is posted to its thread. Does not
know how requests were routed, nor how the KV was computed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Protocol

import torch

from pdserve.engine.block_pool import BlockState
from pdserve.engine.engine import Engine
from pdserve.engine.loop import EngineLoop, Turn
from pdserve.engine.sequence import Sequence
from pdserve.kv_transfer.config import KVTransferConfig
from pdserve.kv_transfer.digest import verify
from pdserve.kv_transfer.effects import FreeBlocks, Ignored, QuarantineBlocks, Refused, raise_refusal
from pdserve.kv_transfer.metrics import HandoffMetrics
from pdserve.kv_transfer.peers import Peers
from pdserve.kv_transfer.reservation import (
    Admit,
    Effects,
    Fail,
    Phase,
    RenewLease,
    SendRelease,
    StartTransfer,
    StartVerify,
    TakeBlocks,
    Timeouts,
    Unreserve,
)
from pdserve.kv_transfer.reservations import ReservationTable
from pdserve.proto.errors import InternalError, PdserveError, rebuild
from pdserve.proto.status import as_typed
from pdserve.proto.types import HandoffId, KVTicket, Phases, WorkerInfo, WorkerRef, WorkerRequest

logger = logging.getLogger(__name__)
ENDED_BY_THE_CLIENT = frozenset({"RequestCancelled", "DeadlineExceeded"})


class Receiver(Protocol):
    """Fetches a ticket's blocks over the best link; the name of the link when they have arrived."""

    async def receive(self, ticket: KVTicket, block_ids: tuple[int, ...]) -> str: ...


class DecodeRole:
    """Owner of the reservations."""

    def __init__(
        self,
        info: WorkerInfo,
        config: KVTransferConfig,
        loop: EngineLoop,
        call_soon: Callable[..., object],
        blocks: torch.Tensor,
        receiver: Receiver,
        peers: Peers,
        metrics: HandoffMetrics,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        fail: Callable[[HandoffId, PdserveError], None],
    ) -> None:
        self._layout = info.layout
        self._loop = loop
        self._call_soon = call_soon
        self._blocks = blocks  # uint8 [num_blocks, block_bytes]
        self._receiver = receiver
        self._peers = peers
        self._metrics = metrics
        self._spawn = spawn
        self._fail = fail
        timeouts = Timeouts(
            reserve_s=config.reserve_timeout_s,
            room_s=config.room_timeout_s,
            transfer_s=config.transfer_timeout_s,
            verify_s=config.verify_timeout_s,
            renew_s=config.renew_s,
        )
        self._table = ReservationTable(info.layout, timeouts)
        self._requests: dict[HandoffId, WorkerRequest] = {}
        self._phases: dict[HandoffId, Phases] = {}
        self._room_blocks = 0

    def expect(self, request: WorkerRequest, source: WorkerRef) -> None:
        """Reserve room for the prompt's KV, which `source` will offer.

        Raises:
            DuplicateRequest: another use of this id is in flight.
        """
        now_s = time.monotonic()
        num_tokens = len(request.prompt_token_ids)
        self._carry_out(self._table.expect(request.id, source, num_tokens, now_s + request.timeout_s, now_s))
        self._requests[request.id] = request
        num_blocks = self._layout.num_blocks(num_tokens)
        self._loop.post(lambda engine: engine.pool.reserve(num_blocks))

    def offer(self, ticket: KVTicket) -> None:
        """The KV is ready at its source.

        Raises:
            StaleReference: not expected, or not from there.
            LayoutMismatch: it can never be used here; the request has failed.
        """
        effects = self._table.offer(ticket, time.monotonic())
        self._carry_out(effects)
        raise_refusal(effects)
        self._offer_room()

    def turn_ended(self, turn: Turn) -> None:
        """Room is what is free, less what running sequences and the queue's head are about to need."""
        self._room_blocks = turn.pool.free - turn.wanted_blocks - turn.num_running
        self._offer_room()

    def abort(self, handoff: HandoffId, reason: str) -> None:
        self.finished(handoff)
        self._carry_out(self._table.abort(handoff, reason, time.monotonic()))

    def transfer_phases(self, handoff: HandoffId) -> Phases:
        """What this role knows about where a sequence's time went."""
        return self._phases.get(handoff, Phases())

    def finished(self, handoff: HandoffId) -> None:
        self._requests.pop(handoff, None)
        self._phases.pop(handoff, None)

    def peer_gone(self, worker_id: str, generation: int) -> None:
        """No KV will come from this process any more."""
        gone = [
            entry.id
            for entry in self._table.reservations.values()
            if (entry.source.worker_id, entry.source.generation) == (worker_id, generation)
        ]
        for handoff in gone:
            reason = f"{worker_id} died before its KV had arrived"
            self._carry_out(self._table.abort(handoff, reason, time.monotonic(), "WorkerLost"))

    def sweep(self, now_s: float) -> None:
        self._carry_out(self._table.sweep(now_s))
        for source, handoffs in self._table.due_renewals(now_s).items():
            self._spawn(self._renew(source, handoffs))

    def _offer_room(self) -> None:
        self._carry_out(self._table.on_room(self._room_blocks, time.monotonic()))

    def _carry_out(self, effects: Effects) -> None:
        for effect in effects:
            match effect:
                case TakeBlocks(id=handoff, num_blocks=num_blocks):
                    self._take(handoff, num_blocks)
                case StartTransfer():
                    self._spawn(self._transfer(effect))
                case StartVerify():
                    self._spawn(self._verify(effect))
                case Admit():
                    self._admit(effect)
                case Fail(id=handoff, kind=kind, message=message):
                    if kind not in ENDED_BY_THE_CLIENT:
                        self._metrics.failed(kind)
                    self._fail(handoff, rebuild(kind, message))
                case Unreserve(num_blocks=num_blocks):
                    self._loop.post(_unreserve(num_blocks))
                case SendRelease(id=handoff, source=source, outcome=outcome):
                    self._spawn(self._release(source, handoff, outcome))
                case FreeBlocks(block_ids=block_ids, from_quarantine=quarantined):
                    state = BlockState.QUARANTINED if quarantined else BlockState.RECEIVING
                    self._loop.post(_release(block_ids, state))
                case QuarantineBlocks(block_ids=block_ids):
                    self._loop.post(_move(block_ids, BlockState.RECEIVING, BlockState.QUARANTINED))
                case Ignored(id=handoff, reason=reason):
                    logger.info("hand-off %s: ignored: %s", handoff, reason)
                case Refused() | RenewLease():
                    pass  # raised by `offer`; renewals are sent by `sweep`

    def _take(self, handoff: HandoffId, num_blocks: int) -> None:
        def command(engine: Engine) -> None:
            if engine.pool.can_take(num_blocks):
                block_ids = tuple(engine.pool.take(num_blocks, BlockState.RECEIVING))
                self._call_soon(self._blocks_taken, handoff, block_ids)
            else:
                self._call_soon(self._blocks_refused, handoff)

        self._loop.post(command)

    def _blocks_taken(self, handoff: HandoffId, block_ids: tuple[int, ...]) -> None:
        self._carry_out(self._table.blocks_taken(handoff, block_ids, time.monotonic()))

    def _blocks_refused(self, handoff: HandoffId) -> None:
        self._carry_out(self._table.blocks_refused(handoff, time.monotonic()))

    async def _transfer(self, start: StartTransfer) -> None:
        """Move the bytes, check them, and report both: the wire is idle after the first, the KV is right after both."""
        reservation = self._table.reservations.get(start.id)
        if reservation is None or reservation.phase is not Phase.TRANSFERRING:
            return self._carry_out(self._table.wire_idle(start.id, time.monotonic()))
        started_s = time.monotonic()
        failure, link = None, ""
        try:
            link = await self._receiver.receive(start.ticket, start.block_ids)
        except Exception as error:
            failure = as_typed(error)
        kind, message = _described(failure)
        if failure is None and start.id in self._requests:
            wait_s, transfer_s = started_s - reservation.offered_s, time.monotonic() - started_s
            self._phases[start.id] = Phases(transfer_wait_s=wait_s, transfer_s=transfer_s)
            self._metrics.waited(wait_s)
            self._metrics.moved(link, len(start.block_ids) * self._layout.block_bytes, transfer_s)
        return self._carry_out(self._table.transfer_ended(start.id, time.monotonic(), kind, message))

    async def _verify(self, start: StartVerify) -> None:
        started_s = time.monotonic()
        failure: PdserveError | None = None
        try:
            await asyncio.to_thread(verify, start.id, self._blocks, start.block_ids, start.ticket.block_digests)
        except Exception as error:
            failure = as_typed(error)
        if start.id in self._phases:
            moved = self._phases[start.id]
            self._phases[start.id] = replace(moved, transfer_s=moved.transfer_s + time.monotonic() - started_s)
        kind, message = _described(failure)
        self._carry_out(self._table.verified(start.id, time.monotonic(), kind, message))

    def _admit(self, admit: Admit) -> None:
        """The blocks are the sequence's now."""
        request = self._requests.get(admit.id)
        if request is None:  # a reservation without its request: our own bookkeeping is broken
            self._loop.post(_release(admit.block_ids, BlockState.RECEIVING))
            self._fail(admit.id, InternalError(f"{admit.id}: admitted without a request"))
            return
        sequence = Sequence.redeemed(request, admit.ticket.first_token, admit.block_ids, time.monotonic())

        def command(engine: Engine) -> None:
            engine.pool.move(admit.block_ids, BlockState.RECEIVING, BlockState.RUNNING)
            engine.add(sequence)

        self._loop.post(command)

    async def _release(self, source: WorkerRef, handoff: HandoffId, outcome: str) -> None:
        try:
            await self._peers.release(source, handoff, outcome)
        except PdserveError as error:
            # The lease at the source lapses by itself.
            logger.warning("release of %s at %s: %s", handoff, source.worker_id, error.message)

    async def _renew(self, source: WorkerRef, handoffs: tuple[HandoffId, ...]) -> None:
        try:
            lost = await self._peers.renew(source, handoffs)
        except PdserveError as error:
            # One lost renewal is no lost lease: there are three in each, and the phase has its own deadline.
            logger.warning("renewal at %s: %s", source.worker_id, error.message)
            return
        for handoff in lost:
            effects = self._table.abort(handoff, "the source's lease was lost", time.monotonic(), "TransferFailed")
            self._carry_out(effects)


def _described(error: PdserveError | None) -> tuple[str, str]:
    return ("", "") if error is None else (type(error).__name__, error.message)


def _unreserve(num_blocks: int) -> Callable[[Engine], None]:
    return lambda engine: engine.pool.unreserve(num_blocks)


def _release(block_ids: tuple[int, ...], state: BlockState) -> Callable[[Engine], None]:
    return lambda engine: engine.pool.release(block_ids, state)


def _move(block_ids: tuple[int, ...], source: BlockState, target: BlockState) -> Callable[[Engine], None]:
    return lambda engine: engine.pool.move(block_ids, source, target)
