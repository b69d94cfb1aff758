"""The real tables of leases and reservations, watched: what they decide is counted and written into the trace.

Also checks on the way what only they can tell: that a request is admitted only when every block that it needs has been
verified. Changes nothing of what they decide.
"""

from __future__ import annotations

from simulation.trace import Trace

from pdserve.kv_transfer import lease, reservation
from pdserve.kv_transfer.effects import FreeBlocks, QuarantineBlocks, Refused
from pdserve.kv_transfer.leases import LeaseTable
from pdserve.kv_transfer.reservations import ReservationTable
from pdserve.proto.types import HandoffId, KVLayout


class WatchedLeases(LeaseTable):
    """Of the prefill worker at `place`."""

    def __init__(self, times: lease.LeaseTimes, trace: Trace, place: str) -> None:
        super().__init__(times)
        self._trace = trace
        self._place = place

    def _step(self, event: lease.LeaseEvent, now_s: float) -> lease.LeaseEffects:
        effects = super()._step(event, now_s)
        for effect in effects:
            self._note(event, effect)
        return effects

    def _note(self, event: lease.LeaseEvent, effect: lease.LeaseEffect) -> None:
        trace, place = self._trace, self._place
        match effect:
            case lease.SendOffer(id=id, part=part):
                if isinstance(event, lease.Tick):
                    trace.count("offers repeated")
                    trace.add(place, f"offers {id} part {part} again")
            case lease.StopPrefill(id=id):
                trace.count("prefills stopped")
                trace.add(place, f"stops the prefill of {id}")
            case lease.LeaseLost(id=id, reason=reason):
                trace.count("renewals too late")
                trace.add(place, f"cannot renew {id}: {reason}")
            case lease.HandoffFailed(id=id, kind=kind, message=message):
                trace.count("leases lapsed" if "lapsed" in message else f"prefill legs failed: {kind}")
                trace.add(place, f"gives up {id}: {kind}: {message}")
            case QuarantineBlocks(id=id, block_ids=block_ids, reason=reason):
                trace.count("quarantines at the source")
                trace.add(place, f"quarantines {list(block_ids)} of {id}: {reason}")
            case FreeBlocks(id=id, block_ids=block_ids, reason=reason):
                trace.add(place, f"frees {list(block_ids)} of {id}: {reason}")
            case Refused():
                trace.count("redemptions refused")


class WatchedReservations(ReservationTable):
    """Of the decode worker at `place`. `verified` is told of every block that passed its check."""

    def __init__(self, layout: KVLayout, timeouts: reservation.Timeouts, trace: Trace, place: str) -> None:
        super().__init__(layout, timeouts)
        self._trace = trace
        self._place = place
        self._verified: dict[HandoffId, set[int]] = {}

    def verified(self, id: HandoffId, position: int) -> None:
        """The source's block at this position of the hand-off."""
        self._verified.setdefault(id, set()).add(position)

    def _step(self, event: reservation.ReservationEvent, now_s: float) -> reservation.Effects:
        before = self.reservations.get(event.id)
        effects = super()._step(event, now_s)
        for effect in effects:
            self._note(event, before, effect)
        if event.id not in self.reservations:
            self._verified.pop(event.id, None)
        return effects

    def _note(
        self,
        event: reservation.ReservationEvent,
        before: reservation.Reservation | None,
        effect: reservation.Effect,
    ) -> None:
        trace, place = self._trace, self._place
        match effect:
            case reservation.FetchPart(id=id, part=part, first=first):
                if self.reservations[id].num_pulls > 1:
                    trace.count("parts pulled again")
                if first:
                    trace.count("parts fetched from their middle")
                trace.add(place, f"fetches {id} part {part.index} from block {first}")
            case reservation.Admit(id=id, block_ids=block_ids, num_held=num_held):
                trace.count("admissions")
                if num_held:
                    trace.count("admissions with a held prefix")
                trace.add(place, f"admits {id} in {list(block_ids)}, {num_held} held")
                self._check_verified(event, before, effect)
            case reservation.Fail(id=id, kind=kind, message=message):
                trace.count(f"hand-offs failed: {kind}")
                trace.add(place, f"fails {id}: {kind}: {message}")
            case reservation.ReleaseHeld():
                trace.count("held prefixes given back")
            case QuarantineBlocks(id=id, block_ids=block_ids, reason=reason):
                trace.count("quarantines at the target")
                trace.add(place, f"quarantines {list(block_ids)} of {id}: {reason}")
            case FreeBlocks(id=id, block_ids=block_ids, reason=reason):
                trace.add(place, f"frees {list(block_ids)} of {id}: {reason}")
            case Refused():
                trace.count("offers refused")

    def _check_verified(
        self, event: reservation.ReservationEvent, before: reservation.Reservation | None, admit: reservation.Admit
    ) -> None:
        """A block is needed unless what was held covers it."""
        if before is None or (before.ticket is None and not isinstance(event, reservation.Offer)):
            self._trace.violate(self._place, f"admits {admit.id} that was never offered")
            return
        layout = event.ticket.layout if isinstance(event, reservation.Offer) else before.ticket.layout  # type: ignore[union-attr]
        first = admit.num_held * before.layout.block_size // layout.block_size
        missing = set(range(first, layout.num_blocks(before.num_tokens))) - self._verified.get(admit.id, set())
        if missing:
            self._trace.violate(self._place, f"admits {admit.id} without blocks {sorted(missing)} verified")
