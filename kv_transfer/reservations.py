"""Owner of every reservation of one decode worker: a thin table over `reservation_step.step`.

Each method returns what to do, in order. Room is given in order of offers; an offer that does not fit holds back
those behind it, so that a long prompt is not starved by short ones. Knows no clock and does no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from types import MappingProxyType

from pdserve.kv_transfer.effects import Ignored, raise_refusal
from pdserve.kv_transfer.reservation import (
    Abort,
    Admit,
    BlocksRefused,
    BlocksTaken,
    Effects,
    Expect,
    Offer,
    PartEnded,
    Phase,
    RenewDue,
    RenewLease,
    Reservation,
    ReservationEvent,
    Room,
    Tick,
    Timeouts,
)
from pdserve.kv_transfer.reservation_step import step
from pdserve.proto.types import HandoffId, KVLayout, KVPart, KVTicket, WorkerRef


class ReservationTable:
    """`layout` is this worker's own; tickets with another are refused."""

    def __init__(self, layout: KVLayout, timeouts: Timeouts) -> None:
        self._layout = layout
        self._timeouts = timeouts
        self._reservations: dict[HandoffId, Reservation] = {}
        self._admitted: dict[HandoffId, float] = {}  # and until when its source may go on offering it
        self._until_s: list[tuple[float, HandoffId]] = []  # the same as a heap

    def __len__(self) -> int:
        return len(self._reservations)

    @property
    def reservations(self) -> Mapping[HandoffId, Reservation]:
        return MappingProxyType(self._reservations)

    @property
    def is_anybody_waiting(self) -> bool:
        """For blocks that were not asked for yet."""
        return any(entry.phase is Phase.OFFERED and not entry.asked for entry in self._reservations.values())

    @property
    def quarantined_blocks(self) -> int:
        entries = (entry for entry in self._reservations.values() if entry.phase is Phase.QUARANTINED)
        return sum(len(entry.block_ids) - entry.num_held for entry in entries)

    def expect(
        self, id: HandoffId, source: WorkerRef, num_tokens: int, request_deadline_s: float, now_s: float
    ) -> Effects:
        """Reserve room for a prompt of `num_tokens`. Raises `DuplicateRequest` if another use of `id` is in flight."""
        event = Expect(id, source, num_tokens, self._layout, self._timeouts, request_deadline_s)
        effects = self._step(event, now_s)
        raise_refusal(effects)
        return effects

    def offer(self, ticket: KVTicket, part: KVPart, now_s: float) -> Effects:
        """The source has a part of the KV. A `Refused` among the effects must be raised to it, after the others are
        done: `StaleReference` (not expected, or not from there) or `LayoutMismatch` (the request has failed, too).
        """
        if ticket.id in self._admitted:  # the answer was lost, and the release is not there yet
            return (Ignored(ticket.id, "redeemed already"),)
        return self._step(Offer(ticket.id, ticket, part), now_s)

    def on_room(self, num_free_blocks: int, now_s: float) -> Effects:
        """Ask for blocks for those offers, oldest first, that fit into what is free and not asked for yet."""
        waiting = [entry for entry in self._reservations.values() if entry.phase is Phase.OFFERED]
        if not waiting:
            return ()
        room = num_free_blocks - sum(entry.num_blocks for entry in waiting if entry.asked)
        effects: list[Effects] = []
        for entry in sorted((entry for entry in waiting if not entry.asked), key=lambda entry: entry.offered_s):
            room -= entry.num_blocks
            if room < 0:
                break
            effects.append(self._step(Room(entry.id), now_s))
        return sum(effects, ())

    def blocks_taken(self, id: HandoffId, block_ids: Sequence[int], num_held: int, now_s: float) -> Effects:
        return self._step(BlocksTaken(id, tuple(block_ids), num_held), now_s)

    def blocks_refused(self, id: HandoffId, now_s: float) -> Effects:
        return self._step(BlocksRefused(id), now_s)

    def part_ended(self, id: HandoffId, part: int, now_s: float, error_kind: str = "", message: str = "") -> Effects:
        """What became of a `FetchPart`; its wire is idle."""
        return self._step(PartEnded(id, part, error_kind, message), now_s)

    def abort(self, id: HandoffId, reason: str, now_s: float, error_kind: str = "RequestCancelled") -> Effects:
        """End the request at once: cancelled, source lost (`WorkerLost`), lease lost (`TransferFailed`)."""
        return self._step(Abort(id, reason, error_kind), now_s)

    def peer_gone(self, worker_id: str, generation: int, now_s: float) -> Effects:
        """That process died: no KV will come from it. What its successor was asked for stays."""
        reason = f"{worker_id} died before its KV had arrived"
        effects: Effects = ()
        for entry in list(self._reservations.values()):
            if (entry.source.worker_id, entry.source.generation) == (worker_id, generation):
                effects += self.abort(entry.id, reason, now_s, "WorkerLost")
        return effects

    def due_renewals(self, now_s: float) -> dict[WorkerRef, tuple[HandoffId, ...]]:
        """Leases to renew now, by source; they count as renewed at `now_s`."""
        due: dict[WorkerRef, tuple[HandoffId, ...]] = {}
        for id in list(self._reservations):
            for effect in self._step(RenewDue(id), now_s):
                assert isinstance(effect, RenewLease)
                due[effect.source] = (*due.get(effect.source, ()), effect.id)
        return due

    def sweep(self, now_s: float) -> Effects:
        """End what missed its deadline. Visits every reservation: deadlines are in no order."""
        while self._until_s and self._until_s[0][0] <= now_s:
            until_s, id = heappop(self._until_s)
            if self._admitted.get(id) == until_s:
                del self._admitted[id]
        return tuple(effect for id in list(self._reservations) for effect in self._step(Tick(id), now_s))

    def _step(self, event: ReservationEvent, now_s: float) -> Effects:
        before = self._reservations.get(event.id)
        reservation, effects = step(before, event, now_s)
        if reservation is not None:
            self._reservations[event.id] = reservation
            return effects
        self._reservations.pop(event.id, None)
        if before is not None and before.ticket is not None and any(isinstance(effect, Admit) for effect in effects):
            # Even a request that is over soon: an offer repeated after that is no error. Twice, for a late renewal.
            until_s = now_s + 2 * before.ticket.lease_s
            self._admitted[event.id] = until_s
            heappush(self._until_s, (until_s, event.id))
        return effects
