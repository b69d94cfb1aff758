"""A lease in each of its states, for tests of the prefill worker's side. Knows nothing of what they assert."""

from __future__ import annotations

from pdserve.kv_transfer.lease import (
    Abort,
    Accept,
    Lease,
    LeaseEvent,
    LeaseState,
    LeaseTimes,
    OfferEnded,
    PartComputed,
    SendKey,
    SendOffer,
    SendStarted,
)
from pdserve.kv_transfer.lease_step import step
from pdserve.proto.types import HandoffId, WorkerRef

TIMES = LeaseTimes(lease_s=10.0, retry_s=1.0)
TARGET = WorkerRef("decode-0", 1, "host:1")
ID = HandoffId("r", 0, 1)
NUM_TOKENS = 40
FIRST, LAST = (4, 2), (7,)  # the blocks of two parts
FIRST_TOKEN = 99
KEY = SendKey(link_epoch=3, part=0)


def lease_in(state: LeaseState, is_complete: bool = True) -> Lease:
    """Both parts computed and accepted; or only the first, if not complete."""
    events: list[LeaseEvent] = [Accept(ID, TARGET, NUM_TOKENS, TIMES)]
    if state is not LeaseState.ACCEPTED:
        events += [PartComputed(ID, FIRST), OfferEnded(ID, 0)]
        events += [PartComputed(ID, LAST, FIRST_TOKEN), OfferEnded(ID, 1)] if is_complete else []
    if state in (LeaseState.SENDING, LeaseState.QUARANTINED):
        events.append(SendStarted(ID, TARGET, KEY))
    if state is LeaseState.QUARANTINED:
        events.append(Abort(ID, "cancelled"))
    lease: Lease | None = None
    for event in events:
        lease, _ = step(lease, event, 0.0)
    assert lease is not None
    assert lease.state is state
    return lease


def offer(part: int) -> SendOffer:
    if part == 0:
        return SendOffer(ID, TARGET, NUM_TOKENS, 0, first_block=0, block_ids=FIRST, first_token=None)
    return SendOffer(ID, TARGET, NUM_TOKENS, 1, first_block=2, block_ids=LAST, first_token=FIRST_TOKEN)
