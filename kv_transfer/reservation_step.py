"""The decode worker's side of a hand-off: one pure function from (reservation, event, time) to (reservation, effects).

The life cycle is drawn in `reservation`. No clock, no I/O; knows nothing of gRPC, links, or how much room there is.
"""

from __future__ import annotations

from pdserve.kv_transfer.effects import FreeBlocks, Ignored, QuarantineBlocks, Refused
from pdserve.kv_transfer.reservation import (
    Abort,
    Admit,
    BlocksRefused,
    BlocksTaken,
    Effect,
    Effects,
    Expect,
    Fail,
    FetchPart,
    Offer,
    PartEnded,
    Phase,
    ReleaseHeld,
    RenewDue,
    RenewLease,
    Reservation,
    ReservationEvent,
    ReservationStep,
    Room,
    SendRelease,
    TakeBlocks,
    Tick,
    Unreserve,
)
from pdserve.proto.types import HandoffId, KVPart, KVTicket, WorkerRef

WORTH_A_SECOND_PULL = frozenset({"TransferFailed", "CorruptKV"})
"""The source still leases the blocks: what came wrong may come right over a new link."""


def step(reservation: Reservation | None, event: ReservationEvent, now_s: float) -> ReservationStep:
    """What `event` makes of `reservation` at `now_s`. `None` is an id that is not here, before or after."""
    match event:
        case Expect():
            return _expect(reservation, event, now_s)
        case Offer():
            return _offer(reservation, event, now_s)
        case Room():
            return _room(reservation, event)
        case BlocksTaken():
            return _blocks_taken(reservation, event, now_s)
        case BlocksRefused():
            if reservation is None or not reservation.asked:
                return reservation, (Ignored(event.id, "no blocks were asked for"),)
            return reservation._replace(asked=False), ()
        case PartEnded():
            return _part_ended(reservation, event, now_s)
        case Abort():
            if reservation is None or reservation.phase is Phase.QUARANTINED:
                return reservation, (Ignored(event.id, f"has ended already: {event.reason}"),)
            return _end(reservation, event.error_kind, event.reason)
        case RenewDue():
            return _renew(reservation, now_s)
        case Tick():
            return _tick(reservation, now_s)


def _expect(reservation: Reservation | None, event: Expect, now_s: float) -> ReservationStep:
    if reservation is None:
        deadline_s = min(now_s + event.timeouts.reserve_s, event.request_deadline_s)
        expected = Reservation(
            event.id,
            event.source,
            event.num_tokens,
            event.layout,
            event.timeouts,
            event.request_deadline_s,
            deadline_s,
        )
        return expected, ()
    same = (reservation.source, reservation.num_tokens) == (event.source, event.num_tokens)
    if same and reservation.phase is not Phase.QUARANTINED:
        return reservation, (Ignored(event.id, "expected already"),)
    return reservation, (Refused(event.id, "DuplicateRequest", f"{event.id} is in flight here"),)


def _offer(reservation: Reservation | None, event: Offer, now_s: float) -> ReservationStep:
    id, ticket, part = event.id, event.ticket, event.part
    stranger = _not_meant_here(reservation, ticket, part)
    if stranger:
        return reservation, (Refused(id, "StaleReference", f"{id}: {stranger}"),)
    assert reservation is not None
    if part.index < len(reservation.parts):
        return reservation, (Ignored(id, f"part {part.index} was offered already"),)
    problem = _unusable(reservation, ticket, part)
    if problem:
        after, effects = _end(reservation, "LayoutMismatch", f"{id}: {problem}", release=False)
        return after, (Refused(id, "LayoutMismatch", f"{id}: {problem}"), *effects)
    parts = (*reservation.parts, part)
    if reservation.phase is Phase.WAITING:
        return _fetch_next(reservation._replace(parts=parts), reservation.num_done, now_s)
    if reservation.phase is not Phase.RESERVED:
        return reservation._replace(parts=parts), ()
    first = reservation._replace(
        phase=Phase.OFFERED,
        ticket=ticket,
        parts=parts,
        offered_s=now_s,
        renew_at_s=now_s + _renew_every_s(reservation, ticket),
        deadline_s=_deadline_s(reservation, reservation.timeouts.room_s, now_s),
    )
    return first, ()


def _not_meant_here(reservation: Reservation | None, ticket: KVTicket, part: KVPart) -> str:
    """Why this offer is not one that is waited for, or ""."""
    if reservation is None or reservation.phase is Phase.QUARANTINED:
        return "is not expected here"
    expected, offering = reservation.source, ticket.source
    if offering != expected:  # its address counts too: where KV is fetched is for the router to say
        return f"is expected from {_words(expected)}, not from {_words(offering)}"
    if reservation.ticket is not None and reservation.ticket != ticket:
        return "was offered with another ticket"
    if part.index > len(reservation.parts):
        return f"part {part.index} came before part {len(reservation.parts)}"
    if part.index < len(reservation.parts) and reservation.parts[part.index] != part:
        return f"part {part.index} was offered with other blocks"
    return ""


def _words(worker: WorkerRef) -> str:
    return f"{worker.worker_id} generation {worker.generation} at {worker.address}"


def _unusable(reservation: Reservation, ticket: KVTicket, part: KVPart) -> str:
    """Why the KV can never be used here, or ""."""
    obstacles = reservation.layout.obstacles(ticket.layout)
    if obstacles:
        return f"KV layouts differ ({', '.join(obstacles)})"
    if ticket.num_tokens != reservation.num_tokens:
        return f"KV of {ticket.num_tokens} tokens offered, {reservation.num_tokens} expected"
    if not ticket.lease_s > 0:
        return f"offered with a lease of {ticket.lease_s} s"
    if part.first_block != reservation.num_offered_blocks:
        return f"part {part.index} begins at block {part.first_block}, {reservation.num_offered_blocks} expected"
    if not part.block_ids or len(part.block_ids) != len(part.block_digests):
        return f"part {part.index} has {len(part.block_ids)} blocks and {len(part.block_digests)} digests"
    end, expected = part.first_block + len(part.block_ids), ticket.layout.num_blocks(ticket.num_tokens)
    if end > expected or (end == expected) != part.is_last:
        return f"part {part.index} ends at block {end} of {expected}, last: {part.is_last}"
    return ""


def _room(reservation: Reservation | None, event: Room) -> ReservationStep:
    if reservation is None or reservation.phase is not Phase.OFFERED or reservation.asked:
        return reservation, (Ignored(event.id, "waits for no room"),)
    return reservation._replace(asked=True), (TakeBlocks(reservation.id, reservation.num_blocks),)


def _blocks_taken(reservation: Reservation | None, event: BlocksTaken, now_s: float) -> ReservationStep:
    if reservation is None or not reservation.asked or len(event.block_ids) != reservation.num_blocks:
        # The answer to an ask of an earlier use of this id, or to none.
        reason = "taken after the request ended"
        return reservation, _give_back(event.id, event.block_ids, event.num_held, reason)
    taken = reservation._replace(asked=False, block_ids=event.block_ids, num_held=event.num_held)
    after, effects = _fetch_next(taken, taken.num_done, now_s)
    return after, (Unreserve(event.id, reservation.num_blocks), *effects)


def _fetch_next(reservation: Reservation, num_done: int, now_s: float) -> ReservationStep:
    """`num_done` parts are: go on with the next one that is needed; admit after the last, or wait for it."""
    while num_done < len(reservation.parts):
        part = reservation.parts[num_done]
        if part.first_block + len(part.block_ids) > reservation.first_needed:
            return _pull(reservation, num_done, 1, now_s)
        num_done += 1
    if reservation.is_complete:
        first_token = reservation.parts[-1].first_token
        assert first_token is not None
        return None, (
            SendRelease(reservation.id, reservation.source, "redeemed"),
            Admit(reservation.id, first_token, reservation.block_ids, reservation.num_held),
        )
    deadline_s = _deadline_s(reservation, reservation.timeouts.part_s, now_s)
    return reservation._replace(phase=Phase.WAITING, num_done=num_done, deadline_s=deadline_s), ()


def _pull(reservation: Reservation, num_done: int, num_pulls: int, now_s: float) -> ReservationStep:
    """The part behind the `num_done` first ones, for the `num_pulls`th time."""
    part = reservation.parts[num_done]
    assert reservation.ticket is not None
    pulling = reservation._replace(
        phase=Phase.TRANSFERRING,
        num_done=num_done,
        num_pulls=num_pulls,
        deadline_s=_deadline_s(reservation, reservation.timeouts.transfer_s, now_s),
    )
    first = max(0, reservation.first_needed - part.first_block)
    return pulling, (FetchPart(reservation.id, reservation.ticket, part, first, reservation.block_ids),)


def _part_ended(reservation: Reservation | None, event: PartEnded, now_s: float) -> ReservationStep:
    fetching = (Phase.TRANSFERRING, Phase.QUARANTINED)
    if reservation is None or reservation.phase not in fetching or event.part != reservation.num_done:
        return reservation, (Ignored(event.id, f"part {event.part} is not being fetched"),)
    if reservation.phase is Phase.QUARANTINED:
        block_ids = reservation.block_ids[reservation.num_held :]
        return None, (FreeBlocks(event.id, block_ids, from_quarantine=True, reason="the wire is idle"),)
    if not event.error_kind:
        return _fetch_next(reservation, reservation.num_done + 1, now_s)
    idle = reservation._replace(phase=Phase.WAITING)
    # No answer is no death: of that the fleet tells.
    kind = "TransferFailed" if event.error_kind == "WorkerLost" else event.error_kind
    if kind in WORTH_A_SECOND_PULL and reservation.num_pulls < reservation.timeouts.max_pulls:
        return _pull(idle, idle.num_done, idle.num_pulls + 1, now_s)
    return _end(idle, kind, event.message)


def _renew(reservation: Reservation | None, now_s: float) -> ReservationStep:
    if reservation is None or not reservation.is_leased or now_s < reservation.renew_at_s:
        return reservation, ()
    assert reservation.ticket is not None
    renewed = reservation._replace(renew_at_s=now_s + _renew_every_s(reservation, reservation.ticket))
    return renewed, (RenewLease(reservation.id, reservation.ticket.source),)


def _renew_every_s(reservation: Reservation, ticket: KVTicket) -> float:
    """A source may grant shorter leases than we know of: three chances to renew in each."""
    return min(reservation.timeouts.renew_s, ticket.lease_s / 3)


def _deadline_s(reservation: Reservation, timeout_s: float, now_s: float) -> float:
    return min(now_s + timeout_s, reservation.request_deadline_s)


_LATE = {
    Phase.RESERVED: "no offer came from {source} within {timeouts.reserve_s:g} s",
    Phase.OFFERED: "no room for {num_blocks} blocks within {timeouts.room_s:g} s",
    Phase.WAITING: "{source} offered no further part within {timeouts.part_s:g} s",
    Phase.TRANSFERRING: "the transfer from {source} took longer than {timeouts.transfer_s:g} s",
}


def _tick(reservation: Reservation | None, now_s: float) -> ReservationStep:
    if reservation is None or reservation.phase is Phase.QUARANTINED or now_s < reservation.deadline_s:
        return reservation, ()
    if now_s >= reservation.request_deadline_s:
        message = f"the deadline passed while the hand-off was {reservation.phase}"
        return _end(reservation, "DeadlineExceeded", message)
    message = _LATE[reservation.phase].format(
        source=reservation.source.worker_id, num_blocks=reservation.num_blocks, timeouts=reservation.timeouts
    )
    return _end(reservation, "TransferFailed", message)


def _end(reservation: Reservation, kind: str, message: str, release: bool = True) -> ReservationStep:
    """Fail the request now; give its memory back now if nothing can write to it any more, else when that is proven.

    `release` tells the source; not needed where its own call is being refused.
    """
    id, held, received = reservation.id, reservation.num_held, reservation.block_ids[reservation.num_held :]
    effects: Effects = ()
    after: Reservation | None = None
    if reservation.phase is Phase.TRANSFERRING:
        after = reservation._replace(phase=Phase.QUARANTINED)
        effects += (QuarantineBlocks(id, received, message), *_release_held(id, reservation.block_ids[:held]))
    elif reservation.block_ids:
        effects += _give_back(id, reservation.block_ids, held, message)
    else:
        effects += (Unreserve(id, reservation.num_blocks),)
    if release and reservation.is_leased:
        effects += (SendRelease(id, reservation.source, f"{kind}: {message}"),)
    return after, (*effects, Fail(id, kind, message))


def _give_back(id: HandoffId, block_ids: tuple[int, ...], num_held: int, reason: str) -> Effects:
    received = block_ids[num_held:]
    freed: Effects = (FreeBlocks(id, received, from_quarantine=False, reason=reason),) if received else ()
    return freed + _release_held(id, block_ids[:num_held])


def _release_held(id: HandoffId, block_ids: tuple[int, ...]) -> tuple[Effect, ...]:
    return (ReleaseHeld(id, block_ids),) if block_ids else ()
