"""The decode role of a simulated worker: the real reservation table, and hands that only take time.

What `decode_worker.role` does, without I/O: a fetch ends when the link says that the bytes are there, and every digest
matches. Knows nothing of how requests are placed, nor how KV was computed.
"""

from __future__ import annotations

from collections.abc import Callable

from pdserve.cluster.planner.clock import Clock
from pdserve.cluster.planner.virtual_engine import VirtualEngine
from pdserve.engine.block_pool import BlockState
from pdserve.engine.scheduler import Scheduler
from pdserve.engine.turn import Turn
from pdserve.kv_transfer.effects import FreeBlocks, QuarantineBlocks, raise_refusal
from pdserve.kv_transfer.reservation import (
    Admit,
    Effects,
    Fail,
    FetchPart,
    ReleaseHeld,
    SendRelease,
    TakeBlocks,
    Timeouts,
    Unreserve,
)
from pdserve.kv_transfer.reservations import ReservationTable
from pdserve.proto.types import HandoffId, KVLayout, KVPart, KVTicket, WorkerRef, WorkerRequest


class VirtualDecode:
    """Owner of the reservations. `arrival_s(source, num_bytes)` is when bytes that are asked for now are there."""

    def __init__(
        self,
        layout: KVLayout,
        clock: Clock,
        engine: VirtualEngine,
        timeouts: Timeouts,
        arrival_s: Callable[[WorkerRef, int], float],
        release: Callable[[WorkerRef, HandoffId, str], None],
        fail: Callable[[HandoffId, str], None],
    ) -> None:
        self._layout = layout
        self._clock = clock
        self._engine = engine
        self._arrival_s = arrival_s
        self._release_at = release
        self._fail = fail
        self._table = ReservationTable(layout, timeouts)
        self._requests: dict[HandoffId, WorkerRequest] = {}
        self._wanted_blocks = 0

    def expect(self, request: WorkerRequest, source: WorkerRef) -> None:
        now_s, num_tokens = self._clock.now_s, len(request.prompt_token_ids)
        self._carry_out(self._table.expect(request.id, source, num_tokens, now_s + request.timeout_s, now_s))
        self._requests[request.id] = request
        num_blocks = self._layout.num_blocks(num_tokens)
        self._engine.post(lambda scheduler: scheduler.pool.reserve(num_blocks))

    def offer(self, ticket: KVTicket, part: KVPart) -> None:
        """Raises StaleReference or LayoutMismatch."""
        effects = self._table.offer(ticket, part, self._clock.now_s)
        self._carry_out(effects)
        raise_refusal(effects)
        self._offer_room()

    def turn_ended(self, turn: Turn) -> None:
        self._wanted_blocks = turn.wanted_blocks + turn.num_running
        if len(self._table):
            self._offer_room()

    def abort(self, handoff: HandoffId, reason: str) -> None:
        self._requests.pop(handoff, None)
        self._carry_out(self._table.abort(handoff, reason, self._clock.now_s))

    def lost(self, handoff: HandoffId) -> None:
        """Its source no longer leases it."""
        self._carry_out(self._table.abort(handoff, "the source's lease was lost", self._clock.now_s, "TransferFailed"))

    def peer_gone(self, peer: WorkerRef) -> None:
        """That process died: no KV will come from it."""
        self._carry_out(self._table.peer_gone(peer.worker_id, peer.generation, self._clock.now_s))

    @property
    def num_reservations(self) -> int:
        return len(self._table)

    @property
    def is_idle(self) -> bool:
        return not len(self._table)

    def sweep(self) -> dict[WorkerRef, tuple[HandoffId, ...]]:
        """Leases to renew now, by source."""
        self._carry_out(self._table.sweep(self._clock.now_s))
        return self._table.due_renewals(self._clock.now_s)

    def _offer_room(self) -> None:
        num_free = self._engine.pool.num_free
        self._carry_out(self._table.on_room(num_free - self._wanted_blocks, self._clock.now_s))

    def _carry_out(self, effects: Effects) -> None:
        for effect in effects:
            match effect:
                case TakeBlocks(id=id, num_blocks=num_blocks):
                    self._take(id, num_blocks)
                case FetchPart():
                    self._fetch(effect)
                case Admit():
                    self._admit(effect)
                case SendRelease(id=id, source=source, outcome=outcome):
                    self._release_at(source, id, outcome)
                case Unreserve(num_blocks=num_blocks):
                    self._unreserve(num_blocks)
                case Fail(id=id, kind=kind, message=message):
                    self._requests.pop(id, None)
                    self._fail(id, f"{kind}: {message}")
                case ReleaseHeld(block_ids=block_ids):
                    self._release(block_ids, BlockState.RUNNING)
                case FreeBlocks(block_ids=block_ids, from_quarantine=quarantined):
                    self._release(block_ids, BlockState.QUARANTINED if quarantined else BlockState.RECEIVING)
                case QuarantineBlocks(block_ids=block_ids):
                    self._quarantine(block_ids)
                case _:
                    pass  # refusals are raised by `offer`, renewals sent after `sweep`

    def _take(self, id: HandoffId, num_blocks: int) -> None:
        request, pool = self._requests.get(id), self._engine.pool
        held = [] if request is None else self._engine.scheduler.claims.hold(request.prompt_token_ids)
        num_missing = num_blocks - len(held)
        if pool.can_take(num_missing):
            taken = pool.take(num_missing, BlockState.RECEIVING)
            self._carry_out(self._table.blocks_taken(id, (*held, *taken), len(held), self._clock.now_s))
        else:
            pool.release(held, BlockState.RUNNING)
            self._carry_out(self._table.blocks_refused(id, self._clock.now_s))

    def _fetch(self, fetch: FetchPart) -> None:
        num_bytes = (len(fetch.part.block_ids) - fetch.first) * fetch.ticket.layout.block_bytes
        self._clock.at(self._arrival_s(fetch.ticket.source, num_bytes), self._fetched, fetch.id, fetch.part.index)

    def _fetched(self, id: HandoffId, part: int) -> None:
        self._carry_out(self._table.part_ended(id, part, self._clock.now_s))

    def _admit(self, admit: Admit) -> None:
        request = self._requests.pop(admit.id)
        sequence = self._engine.sequence_type.redeemed(request, admit.first_token, admit.block_ids, self._clock.now_s)
        received = admit.block_ids[admit.num_held :]

        def command(scheduler: Scheduler) -> None:
            scheduler.pool.move(received, BlockState.RECEIVING, BlockState.RUNNING)
            scheduler.add(sequence)

        self._engine.post(command)

    def _unreserve(self, num_blocks: int) -> None:
        self._engine.post(lambda scheduler: scheduler.pool.unreserve(num_blocks))

    def _release(self, block_ids: tuple[int, ...], state: BlockState) -> None:
        self._engine.post(lambda scheduler: scheduler.pool.release(block_ids, state))

    def _quarantine(self, block_ids: tuple[int, ...]) -> None:
        self._engine.post(
            lambda scheduler: scheduler.pool.move(block_ids, BlockState.RECEIVING, BlockState.QUARANTINED)
        )
