"""The decode worker's side of a hand-off: one pure function from (reservation, event, time) to (reservation, effects).

The life cycle is drawn in `reservation`. No clock, no I/O; knows nothing of gRPC, links, or how much room there is.
"""

from __future__ import annotations

from dataclasses import replace

from pdserve.kv_transfer.effects import FreeBlocks, Ignored, QuarantineBlocks, Refused
from pdserve.kv_transfer.reservation import (
    Abort,
    Admit,
    BlocksRefused,
    BlocksTaken,
    Effects,
    Expect,
    Fail,
    Offer,
    Phase,
    RenewDue,
    RenewLease,
    Reservation,
    ReservationEffect,
    ReservationEvent,
    ReservationStep,
    Room,
    SendRelease,
    StartTransfer,
    StartVerify,
    TakeBlocks,
    Tick,
    TransferEnded,
    Unreserve,
    Verified,
    WireIdle,
)
from pdserve.proto.types import KVTicket


def step(reservation: Reservation | None, event: ReservationEvent, now_s: float) -> ReservationStep:
    """What `event` makes of `reservation` at `now_s`. `None` is an id that is not here, before or after."""
    match event:
        case Expect():
            return _expect(reservation, event, now_s)
        case Offer():
            return _offer(reservation, event.ticket, now_s)
        case Room():
            return _room(reservation, event)
        case BlocksTaken():
            return _blocks_taken(reservation, event, now_s)
        case BlocksRefused():
            if reservation is None or not reservation.asked:
                return reservation, (Ignored(event.id, "no blocks were asked for"),)
            return replace(reservation, asked=False), ()
        case TransferEnded():
            return _transfer_ended(reservation, event, now_s)
        case WireIdle():
            ended = TransferEnded(event.id, "TransferFailed", "the link was closed during the transfer")
            return _transfer_ended(reservation, ended, now_s)
        case Verified():
            return _verified(reservation, event)
        case Abort():
            return _abort(reservation, event)
        case RenewDue():
            return _renew(reservation, now_s)
        case Tick():
            return _tick(reservation, now_s)


def _expect(reservation: Reservation | None, event: Expect, now_s: float) -> ReservationStep:
    if reservation is None:
        deadline_s = min(now_s + event.timeouts.reserve_s, event.request_deadline_s)
        return (
            Reservation(
                event.id,
                event.source,
                event.num_tokens,
                event.layout,
                event.timeouts,
                event.request_deadline_s,
                deadline_s,
            ),
            (),
        )
    same = (reservation.source, reservation.num_tokens) == (event.source, event.num_tokens)
    if same and reservation.phase is not Phase.QUARANTINED:
        return reservation, (Ignored(event.id, "expected already"),)
    return reservation, (Refused(event.id, "DuplicateRequest", f"{event.id} is in flight here"),)


def _offer(reservation: Reservation | None, ticket: KVTicket, now_s: float) -> ReservationStep:
    if reservation is None or reservation.phase is Phase.QUARANTINED:
        return reservation, (Refused(ticket.id, "StaleReference", f"{ticket.id} is not expected here"),)
    expected, offering = reservation.source, ticket.source
    if (offering.worker_id, offering.generation) != (expected.worker_id, expected.generation):
        message = (
            f"{ticket.id} is expected from {expected.worker_id} generation {expected.generation}, "
            f"not from {offering.worker_id} generation {offering.generation}"
        )
        return reservation, (Refused(ticket.id, "StaleReference", message),)
    if reservation.ticket is not None:
        if reservation.ticket == ticket:
            return reservation, (Ignored(ticket.id, "offered already"),)
        return reservation, (Refused(ticket.id, "StaleReference", f"{ticket.id} was offered with another ticket"),)
    problem = _unusable(reservation, ticket)
    if problem:
        effects = _end(reservation, "LayoutMismatch", problem, release=False)
        return None, (Refused(ticket.id, "LayoutMismatch", problem), *effects)
    timeouts = reservation.timeouts
    # A source may grant shorter leases than we know of: three chances to renew in each.
    renew_s = min(timeouts.renew_s, ticket.lease_s / 3)
    offered = replace(
        reservation,
        phase=Phase.OFFERED,
        ticket=ticket,
        offered_s=now_s,
        renew_at_s=now_s + renew_s,
        deadline_s=min(now_s + timeouts.room_s, reservation.request_deadline_s),
    )
    return offered, ()


def _unusable(reservation: Reservation, ticket: KVTicket) -> str:
    """Why this ticket can never be redeemed here, or ""."""
    differences = reservation.layout.differences(ticket.layout)
    if differences:
        return f"{ticket.id}: KV layouts differ ({', '.join(differences)})"
    if ticket.num_tokens != reservation.num_tokens:
        return f"{ticket.id}: KV of {ticket.num_tokens} tokens offered, {reservation.num_tokens} expected"
    num_blocks, num_digests = len(ticket.block_ids), len(ticket.block_digests)
    if (num_blocks, num_digests) != (reservation.num_blocks, reservation.num_blocks):
        return f"{ticket.id}: {num_blocks} blocks and {num_digests} digests offered, {reservation.num_blocks} expected"
    if not ticket.lease_s > 0:
        return f"{ticket.id}: offered with a lease of {ticket.lease_s} s"
    return ""


def _room(reservation: Reservation | None, event: Room) -> ReservationStep:
    if reservation is None or reservation.phase is not Phase.OFFERED or reservation.asked:
        return reservation, (Ignored(event.id, "waits for no room"),)
    return replace(reservation, asked=True), (TakeBlocks(reservation.id, reservation.num_blocks),)


def _blocks_taken(reservation: Reservation | None, event: BlocksTaken, now_s: float) -> ReservationStep:
    if reservation is None or not reservation.asked or len(event.block_ids) != reservation.num_blocks:
        # The answer to an ask of an earlier use of this id, or to none.
        returned = FreeBlocks(event.id, event.block_ids, from_quarantine=False, reason="taken after the request ended")
        return reservation, (returned,)
    assert reservation.ticket is not None
    transferring = replace(
        reservation,
        phase=Phase.TRANSFERRING,
        asked=False,
        block_ids=event.block_ids,
        deadline_s=min(now_s + reservation.timeouts.transfer_s, reservation.request_deadline_s),
    )
    return transferring, (
        Unreserve(event.id, reservation.num_blocks),
        StartTransfer(event.id, reservation.ticket, event.block_ids),
    )


def _transfer_ended(reservation: Reservation | None, event: TransferEnded, now_s: float) -> ReservationStep:
    if reservation is None or reservation.phase not in (Phase.TRANSFERRING, Phase.QUARANTINED):
        return reservation, (Ignored(event.id, "no transfer is running"),)
    if reservation.phase is Phase.QUARANTINED:
        freed = FreeBlocks(event.id, reservation.block_ids, from_quarantine=True, reason="the wire is idle")
        return None, (freed,)
    if event.error_kind:
        return None, _end(reservation, event.error_kind, event.message)
    assert reservation.ticket is not None
    deadline_s = min(now_s + reservation.timeouts.verify_s, reservation.request_deadline_s)
    verifying = replace(reservation, phase=Phase.VERIFYING, deadline_s=deadline_s)
    return verifying, (StartVerify(event.id, reservation.ticket, reservation.block_ids),)


def _verified(reservation: Reservation | None, event: Verified) -> ReservationStep:
    if reservation is None or reservation.phase is not Phase.VERIFYING:
        return reservation, (Ignored(event.id, "nothing is being verified"),)
    if event.error_kind:
        return None, _end(reservation, event.error_kind, event.message)
    assert reservation.ticket is not None
    return None, (
        SendRelease(event.id, reservation.ticket.source, "redeemed"),
        Admit(event.id, reservation.ticket, reservation.block_ids),
    )


def _abort(reservation: Reservation | None, event: Abort) -> ReservationStep:
    if reservation is None or reservation.phase is Phase.QUARANTINED:
        return reservation, (Ignored(event.id, f"has ended already: {event.reason}"),)
    return _interrupt(reservation, event.error_kind, event.reason)


def _renew(reservation: Reservation | None, now_s: float) -> ReservationStep:
    if reservation is None or not reservation.is_leased or now_s < reservation.renew_at_s:
        return reservation, ()
    assert reservation.ticket is not None
    renew_s = min(reservation.timeouts.renew_s, reservation.ticket.lease_s / 3)
    renewed = replace(reservation, renew_at_s=now_s + renew_s)
    return renewed, (RenewLease(reservation.id, reservation.ticket.source),)


_LATE = {
    Phase.RESERVED: "no offer came from {source} within {timeouts.reserve_s:g} s",
    Phase.OFFERED: "no room for {num_blocks} blocks within {timeouts.room_s:g} s",
    Phase.TRANSFERRING: "the transfer from {source} took longer than {timeouts.transfer_s:g} s",
    Phase.VERIFYING: "the digests were not checked within {timeouts.verify_s:g} s",
}


def _tick(reservation: Reservation | None, now_s: float) -> ReservationStep:
    if reservation is None or reservation.phase is Phase.QUARANTINED or now_s < reservation.deadline_s:
        return reservation, ()
    if now_s >= reservation.request_deadline_s:
        message = f"the deadline passed while the hand-off was {reservation.phase}"
        return _interrupt(reservation, "DeadlineExceeded", message)
    message = _LATE[reservation.phase].format(
        source=reservation.source.worker_id, num_blocks=reservation.num_blocks, timeouts=reservation.timeouts
    )
    return _interrupt(reservation, "TransferFailed", message)


def _interrupt(reservation: Reservation, kind: str, message: str) -> ReservationStep:
    """End the request from outside, in any phase but QUARANTINED."""
    if reservation.phase is not Phase.TRANSFERRING:
        return None, _end(reservation, kind, message)
    return replace(reservation, phase=Phase.QUARANTINED), (
        QuarantineBlocks(reservation.id, reservation.block_ids, message),
        SendRelease(reservation.id, reservation.source, f"{kind}: {message}"),
        Fail(reservation.id, kind, message),
    )


def _end(reservation: Reservation, kind: str, message: str, release: bool = True) -> Effects:
    """Give back whatever a reservation with an idle wire holds, and fail the request."""
    effects: list[ReservationEffect] = []
    if reservation.block_ids:
        effects.append(FreeBlocks(reservation.id, reservation.block_ids, from_quarantine=False, reason=message))
    else:
        effects.append(Unreserve(reservation.id, reservation.num_blocks))
    if release and reservation.is_leased:
        effects.append(SendRelease(reservation.id, reservation.source, f"{kind}: {message}"))
    effects.append(Fail(reservation.id, kind, message))
    return tuple(effects)
