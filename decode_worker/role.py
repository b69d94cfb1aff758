"""The decode role: expect a hand-off, fetch its parts, decode.

    expect() -> reserved -> offer(ticket, part 0) -> room: blocks taken -> each part fetched over a link and verified
        -> after the last one the sequence joins the batch, and the prefill worker is told to release its lease

The states and deadlines are `kv_transfer.reservation`'s; this module is its hands: it carries out effects and reports
back what became of them. Runs on the worker's event loop; what touches the engine is posted to its thread. Does not
know how requests were routed, nor how the KV was computed.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from pdserve.decode_worker.timeline import Timeline
from pdserve.engine.block_pool import BlockState
from pdserve.engine.engine import Engine
from pdserve.engine.loop import EngineLoop
from pdserve.engine.sequence import Sequence
from pdserve.engine.turn import Turn
from pdserve.kv_transfer.effects import FreeBlocks, Ignored, QuarantineBlocks, Refused, raise_refusal
from pdserve.kv_transfer.metrics import HandoffMetrics
from pdserve.kv_transfer.peers import Peers
from pdserve.kv_transfer.reservation import (
    Admit,
    Effect,
    Effects,
    Fail,
    FetchPart,
    ReleaseHeld,
    RenewLease,
    SendRelease,
    TakeBlocks,
    Timeouts,
    Unreserve,
)
from pdserve.kv_transfer.reservations import ReservationTable
from pdserve.proto.clock import now
from pdserve.proto.errors import InternalError, PdserveError, WorkerLost, rebuild
from pdserve.proto.status import as_typed
from pdserve.proto.types import HandoffId, KVLayout, KVPart, KVTicket, Phases, WorkerRef, WorkerRequest

logger = logging.getLogger(__name__)
RELEASE_PAUSES_S = (0.0, 0.5, 2.0)
ENDED_BY_THE_CLIENT = frozenset({"RequestCancelled", "DeadlineExceeded"})


class Receiver(Protocol):
    """Fetches and verifies a part's blocks over the best link; the kind of link it took."""

    def receive_now(self, fetch: FetchPart) -> str | None:
        """Only if that takes next to no time; `None` means: `receive` it."""

    async def receive(self, fetch: FetchPart) -> str: ...


class DecodeRole:
    """Owner of the reservations."""

    def __init__(
        self,
        layout: KVLayout,
        timeouts: Timeouts,
        loop: EngineLoop,
        receiver: Receiver,
        peers: Peers,
        metrics: HandoffMetrics,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        fail: Callable[[HandoffId, PdserveError], None],
    ) -> None:
        self._layout = layout
        self._loop = loop
        self._receiver = receiver
        self._peers = peers
        self._metrics = metrics
        self._spawn = spawn
        self._fail = fail
        self._table = ReservationTable(layout, timeouts)
        self._requests: dict[HandoffId, WorkerRequest] = {}
        self._timelines: dict[HandoffId, Timeline] = {}
        self._effects: deque[Effect] = deque()
        self._is_busy = False
        self._may_fetch_now = True
        self._wanted_blocks = 0  # by running sequences and the queue's head, soon

    def expect(self, request: WorkerRequest, source: WorkerRef) -> None:
        """Reserve room for the prompt's KV, which `source` will offer.

        Raises:
            DuplicateRequest: another use of this id is in flight.
        """
        now_s = now()
        num_tokens = len(request.prompt_token_ids)
        self._carry_out(self._table.expect(request.id, source, num_tokens, now_s + request.timeout_s, now_s))
        self._requests[request.id] = request
        self._timelines[request.id] = Timeline()
        num_blocks = self._layout.num_blocks(num_tokens)
        self._loop.post(lambda engine: engine.pool.reserve(num_blocks))

    def offer(self, ticket: KVTicket, part: KVPart) -> None:
        """A part of the KV is ready at its source.

        Raises:
            StaleReference: not expected, or not from there.
            LayoutMismatch: it can never be used here; the request has failed.
        """
        now_s = now()
        effects = self._table.offer(ticket, part, now_s)
        is_news = not any(isinstance(effect, (Ignored, Refused)) for effect in effects)
        if is_news and ticket.id in self._timelines:
            self._timelines[ticket.id].offered(now_s)
        if is_news and part.is_last:
            entry = self._table.reservations.get(ticket.id)
            num_missing = 0 if entry is None else entry.num_missing_blocks
            self._metrics.completed(num_missing * ticket.layout.block_bytes)
        self._carry_out(effects)
        raise_refusal(effects)
        self._offer_room()

    def turn_ended(self, turn: Turn) -> None:
        self._wanted_blocks = turn.wanted_blocks + turn.num_running
        self._offer_room()

    def abort(self, handoff: HandoffId, reason: str) -> None:
        self.finished(handoff)
        self._carry_out(self._table.abort(handoff, reason, now()))

    def transfer_phases(self, handoff: HandoffId) -> Phases:
        """What this role knows about where a sequence's time went."""
        timeline = self._timelines.get(handoff)
        return Phases() if timeline is None else timeline.phases

    def finished(self, handoff: HandoffId) -> None:
        self._requests.pop(handoff, None)
        self._timelines.pop(handoff, None)

    def peer_gone(self, worker_id: str, generation: int) -> None:
        """No KV will come from this process any more."""
        self._carry_out(self._table.peer_gone(worker_id, generation, now()))

    def sweep(self, now_s: float) -> None:
        self._carry_out(self._table.sweep(now_s))
        for source, handoffs in self._table.due_renewals(now_s).items():
            self._spawn(self._renew(source, handoffs))

    def _offer_room(self) -> None:
        if not self._table.is_anybody_waiting:
            return
        num_free = self._loop.ask(lambda engine: engine.pool.num_free)
        self._carry_out(self._table.on_room(num_free - self._wanted_blocks, now()))

    def _carry_out(self, effects: Effects) -> None:
        """One after the other, those that come of it behind them: many parts in one go must not pile up calls."""
        self._effects.extend(effects)
        if self._is_busy:
            return
        self._is_busy = True
        try:
            while self._effects:
                self._do(self._effects.popleft())
        finally:
            self._is_busy = False
            self._effects.clear()  # there are some only after a bug, which ends the worker

    def _do(self, effect: Effect) -> None:
        match effect:
            case TakeBlocks(id=handoff, num_blocks=num_blocks):
                self._take(handoff, num_blocks)
            case FetchPart():
                self._fetch(effect)
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
            case ReleaseHeld(block_ids=block_ids):
                self._loop.post(_release(block_ids, BlockState.RUNNING))
            case FreeBlocks(block_ids=block_ids, from_quarantine=quarantined):
                state = BlockState.QUARANTINED if quarantined else BlockState.RECEIVING
                self._loop.post(_release(block_ids, state))
            case QuarantineBlocks(block_ids=block_ids):
                self._loop.post(_move(block_ids, BlockState.RECEIVING, BlockState.QUARANTINED))
            case Ignored(id=handoff, reason=reason):
                logger.debug("hand-off %s: ignored: %s", handoff, reason)
            case Refused() | RenewLease():
                pass  # raised by `offer`; renewals are sent by `sweep`

    def _take(self, handoff: HandoffId, num_blocks: int) -> None:
        """Blocks for the whole prompt: what is held already, then free ones."""
        request, ticket = self._requests.get(handoff), self._table.reservations[handoff].ticket
        assert ticket is not None
        prompt = () if request is None else request.prompt_token_ids
        # Never into the middle of a source's block: what is held is not written to.
        unit_tokens = math.lcm(self._layout.block_size, ticket.layout.block_size)
        prompt = prompt[: len(prompt) // unit_tokens * unit_tokens]

        def take(engine: Engine) -> tuple[list[int], list[int]] | None:
            held = engine.hold_prefix(prompt)
            surplus = len(held) % (unit_tokens // self._layout.block_size)
            if surplus:
                engine.pool.release(held[-surplus:], BlockState.RUNNING)
                held = held[:-surplus]
            if engine.pool.can_take(num_blocks - len(held)):
                return held, engine.pool.take(num_blocks - len(held), BlockState.RECEIVING)
            engine.pool.release(held, BlockState.RUNNING)
            return None

        blocks = self._loop.ask(take)
        if blocks is None:
            self._carry_out(self._table.blocks_refused(handoff, now()))
        else:
            held, taken = blocks
            self._carry_out(self._table.blocks_taken(handoff, (*held, *taken), len(held), now()))

    def _fetch(self, fetch: FetchPart) -> None:
        """Move a part's bytes and check them: at once if they are few, so that nobody has to be woken."""
        started_s = now()
        if fetch.id in self._timelines:
            self._timelines[fetch.id].started(started_s)
        try:
            link = self._receiver.receive_now(fetch) if self._may_fetch_now else None
        except Exception as error:
            self._fetch_ended(fetch, started_s, as_typed(error))
            return
        if link is None:
            self._spawn(self._receive(fetch, started_s))
        else:
            self._may_fetch_now = False  # not again before everybody else had a turn of the event loop
            asyncio.get_running_loop().call_soon(self._had_a_turn)
            self._fetch_ended(fetch, started_s, link)

    def _had_a_turn(self) -> None:
        self._may_fetch_now = True

    async def _receive(self, fetch: FetchPart, started_s: float) -> None:
        try:
            outcome: str | PdserveError = await self._receiver.receive(fetch)
        except Exception as error:
            outcome = as_typed(error)
        self._fetch_ended(fetch, started_s, outcome)

    def _fetch_ended(self, fetch: FetchPart, started_s: float, outcome: str | PdserveError) -> None:
        """The part came over the link of this kind, or did not come; its wire is idle, whatever happened."""
        kind = message = ""
        if isinstance(outcome, PdserveError):
            kind, message = type(outcome).__name__, outcome.message
            self._metrics.pull_failed(kind)
            logger.warning("hand-off %s: part %d: %s", fetch.id, fetch.part.index, message)
        else:
            num_bytes = (len(fetch.part.block_ids) - fetch.first) * fetch.ticket.layout.block_bytes
            self._metrics.moved(outcome, num_bytes, now() - started_s)
        self._carry_out(self._table.part_ended(fetch.id, fetch.part.index, now(), kind, message))

    def _admit(self, admit: Admit) -> None:
        """The blocks are the sequence's now."""
        request = self._requests.get(admit.id)
        if request is None:  # a reservation without its request: our own bookkeeping is broken
            self._loop.post(_release(admit.block_ids[: admit.num_held], BlockState.RUNNING))
            self._loop.post(_release(admit.block_ids[admit.num_held :], BlockState.RECEIVING))
            self._fail(admit.id, InternalError(f"{admit.id}: admitted without a request"))
            return
        now_s = now()
        self._timelines[admit.id].admitted(now_s)
        self._metrics.waited(self._timelines[admit.id].phases.transfer_wait_s)
        sequence = Sequence.redeemed(request, admit.first_token, admit.block_ids, now_s)
        received = admit.block_ids[admit.num_held :]

        def command(engine: Engine) -> None:
            engine.pool.move(received, BlockState.RECEIVING, BlockState.RUNNING)
            engine.add(sequence)

        self._loop.post(command)

    async def _release(self, source: WorkerRef, handoff: HandoffId, outcome: str) -> None:
        for pause_s in RELEASE_PAUSES_S:
            await asyncio.sleep(pause_s)
            try:
                await self._peers.release(source, handoff, outcome)
                return
            except WorkerLost as error:
                # Not for ever: the lease at the source lapses by itself.
                logger.warning("release of %s at %s: %s", handoff, source.worker_id, error.message)
                if self._peers.is_gone(source):
                    return
            except PdserveError as error:
                logger.warning("release of %s at %s was refused: %s", handoff, source.worker_id, error.message)
                return

    async def _renew(self, source: WorkerRef, handoffs: tuple[HandoffId, ...]) -> None:
        try:
            lost = await self._peers.renew(source, handoffs)
        except PdserveError as error:
            # One lost renewal is no lost lease: there are three in each, and the phase has its own deadline.
            logger.warning("renewal at %s: %s", source.worker_id, error.message)
            return
        for handoff in lost:
            effects = self._table.abort(handoff, "the source's lease was lost", now(), "TransferFailed")
            self._carry_out(effects)


def _unreserve(num_blocks: int) -> Callable[[Engine], None]:
    return lambda engine: engine.pool.unreserve(num_blocks)


def _release(block_ids: tuple[int, ...], state: BlockState) -> Callable[[Engine], None]:
    return lambda engine: engine.pool.release(block_ids, state)


def _move(block_ids: tuple[int, ...], source: BlockState, target: BlockState) -> Callable[[Engine], None]:
    return lambda engine: engine.pool.move(block_ids, source, target)
