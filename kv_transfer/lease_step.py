"""The prefill worker's side of a hand-off: one pure function from (lease, event, time) to (lease, effects).

The life cycle is drawn in `lease`. No clock, no I/O; knows nothing of gRPC, links, or how blocks are allocated.
"""

from __future__ import annotations

from pdserve.kv_transfer.effects import FreeBlocks, Ignored, QuarantineBlocks, Refused
from pdserve.kv_transfer.lease import (
    Abort,
    Accept,
    HandoffFailed,
    Lease,
    LeaseEffect,
    LeaseEffects,
    LeaseEvent,
    LeaseLost,
    LeaseRenewed,
    LeaseState,
    LeaseStep,
    OfferEnded,
    PartComputed,
    Release,
    Renew,
    SendEnded,
    SendOffer,
    SendStarted,
    StartSend,
    StopPrefill,
    Tick,
)
from pdserve.proto.types import HandoffId


def step(lease: Lease | None, event: LeaseEvent, now_s: float) -> LeaseStep:
    """What `event` makes of `lease` at `now_s`. `None` is a hand-off without a lease, before or after."""
    match event:
        case Accept():
            return _accept(lease, event)
        case PartComputed():
            return _part_computed(lease, event, now_s)
        case OfferEnded():
            return _offer_ended(lease, event, now_s)
        case Renew():
            return _renew(lease, event, now_s)
        case SendStarted():
            return _start_send(lease, event, now_s)
        case SendEnded():
            return _end_send(lease, event)
        case Release(id, outcome):
            return _finish(lease, id, outcome)
        case Abort(id, reason):
            return _finish(lease, id, reason)
        case Tick(id):
            return _tick(lease, id, now_s)


def _accept(lease: Lease | None, event: Accept) -> LeaseStep:
    if lease is None:
        return Lease(event.id, event.target, event.num_tokens, event.times), ()
    if lease.target == event.target and lease.state is not LeaseState.QUARANTINED:
        return lease, (Ignored(event.id, "accepted already"),)
    return lease, (Refused(event.id, "DuplicateRequest", f"{event.id} is in flight here"),)


def _part_computed(lease: Lease | None, event: PartComputed, now_s: float) -> LeaseStep:
    if lease is None or lease.state is LeaseState.QUARANTINED:
        reason = "computed after the request ended"
        return lease, (FreeBlocks(event.id, event.block_ids, from_quarantine=False, reason=reason),)
    assert not lease.is_complete, f"{event.id}: a part came after the last one"
    is_first = lease.state is LeaseState.ACCEPTED
    longer = lease._replace(
        state=LeaseState.LEASED if is_first else lease.state,
        parts=(*lease.parts, event.block_ids),
        first_token=event.first_token,
        expires_s=now_s + lease.times.lease_s if is_first else lease.expires_s,
    )
    return _offer_next(longer, now_s)


def _offer_next(lease: Lease, now_s: float) -> LeaseStep:
    """Offers go out one at a time, in order: the target needs no buffer for parts that overtake others."""
    if lease.is_offering or lease.num_accepted == len(lease.parts) or now_s < lease.offer_at_s:
        return lease, ()
    part = lease.num_accepted
    offer = SendOffer(
        lease.id,
        lease.target,
        lease.num_tokens,
        part,
        first_block=sum(len(block_ids) for block_ids in lease.parts[:part]),
        block_ids=lease.parts[part],
        first_token=lease.first_token if part == len(lease.parts) - 1 else None,
    )
    return lease._replace(is_offering=True), (offer,)


def _offer_ended(lease: Lease | None, event: OfferEnded, now_s: float) -> LeaseStep:
    if lease is None or not lease.is_live or not lease.is_offering or event.part != lease.num_accepted:
        return lease, (Ignored(event.id, f"part {event.part} is not being offered"),)
    if not event.error_kind:
        return _offer_next(lease._replace(is_offering=False, num_accepted=lease.num_accepted + 1), now_s)
    answered = lease._replace(is_offering=False)
    if event.is_transient:
        return answered._replace(offer_at_s=now_s + lease.times.retry_s), ()
    message = f"{lease.target.worker_id} did not take the offer: {event.message}"
    after, effects = _finish(answered, event.id, message)
    return after, (*effects, HandoffFailed(event.id, event.error_kind, message))


def _renew(lease: Lease | None, event: Renew, now_s: float) -> LeaseStep:
    if lease is None:
        return None, (LeaseLost(event.id, "no such lease"),)
    if not lease.is_live or lease.is_expired(now_s):
        return lease, (LeaseLost(event.id, "the lease has ended"),)
    renewed = _prolong(lease, now_s)
    return renewed, (LeaseRenewed(event.id, renewed.expires_s),)


def _prolong(lease: Lease, now_s: float) -> Lease:
    return lease._replace(expires_s=max(lease.expires_s, now_s + lease.times.lease_s))


def _start_send(lease: Lease | None, event: SendStarted, now_s: float) -> LeaseStep:
    if lease is None or not lease.is_live or lease.is_expired(now_s) or lease.target != event.target:
        return lease, (Refused(event.id, "StaleReference", f"no lease for {event.id}"),)
    if event.key == lease.send:
        return lease, (Ignored(event.id, f"{event.key} was redeemed already"),)
    if lease.send is not None and event.key < lease.send:
        return lease, (Refused(event.id, "StaleReference", f"{event.id}: {event.key} is older than {lease.send}"),)
    if not 0 <= event.key.part < len(lease.parts) or not 0 <= event.first < len(lease.parts[event.key.part]):
        message = f"{event.id}: part {event.key.part} has no block {event.first}"
        return lease, (Refused(event.id, "StaleReference", message),)
    # Asking for the blocks shows that the decode worker lives: it counts as a renewal.
    running = (*lease.running, event.key)
    sending = _prolong(lease, now_s)._replace(state=LeaseState.SENDING, send=event.key, running=running)
    block_ids = lease.parts[event.key.part][event.first :]
    return sending, (StartSend(lease.id, lease.target, event.key, block_ids),)


def _end_send(lease: Lease | None, event: SendEnded) -> LeaseStep:
    if lease is None or event.key not in lease.running:
        return lease, (Ignored(event.id, f"no send {event.key}"),)
    running = tuple(key for key in lease.running if key != event.key)
    if running:
        return lease._replace(running=running), ()
    if lease.state is LeaseState.SENDING:
        return lease._replace(state=LeaseState.LEASED, running=()), ()
    return None, (FreeBlocks(lease.id, lease.block_ids, from_quarantine=True, reason="the send has ended"),)


def _finish(lease: Lease | None, id: HandoffId, reason: str) -> LeaseStep:
    if lease is None:
        return None, (Ignored(id, f"no lease to end: {reason}"),)
    stop: tuple[LeaseEffect, ...] = () if lease.is_complete else (StopPrefill(id),)
    match lease.state:
        case LeaseState.QUARANTINED:
            return lease, (Ignored(id, f"has ended already: {reason}"),)
        case LeaseState.ACCEPTED:
            return None, stop
        case LeaseState.LEASED:
            return None, (*stop, FreeBlocks(id, lease.block_ids, from_quarantine=False, reason=reason))
        case LeaseState.SENDING:
            # Even "redeemed" waits for the send to return: it usually overtakes it by moments.
            quarantined = lease._replace(state=LeaseState.QUARANTINED)
            return quarantined, (*stop, QuarantineBlocks(id, lease.block_ids, reason))


def _tick(lease: Lease | None, id: HandoffId, now_s: float) -> LeaseStep:
    if lease is None or not lease.is_live:
        return lease, ()
    if not lease.is_expired(now_s):
        return _offer_next(lease, now_s)
    target, lease_s = lease.target.worker_id, lease.times.lease_s
    reason = f"the lease lapsed: {target} neither renewed nor released within {lease_s:g} s"
    after, effects = _finish(lease, id, reason)
    failed: LeaseEffects = (HandoffFailed(id, "TransferFailed", reason),)
    return after, effects + failed
