"""The prefill worker's leases: every arrow of their life, every refusal, and that repetition changes nothing."""

from __future__ import annotations

import pytest
from lease_examples import FIRST, FIRST_TOKEN, ID, KEY, LAST, NUM_TOKENS, TARGET, TIMES, lease_in, offer

from pdserve.kv_transfer.effects import FreeBlocks, Ignored, QuarantineBlocks, Refused
from pdserve.kv_transfer.lease import (
    Abort,
    Accept,
    HandoffFailed,
    LeaseEvent,
    LeaseLost,
    LeaseRenewed,
    LeaseState,
    OfferEnded,
    PartComputed,
    Release,
    Renew,
    SendEnded,
    SendKey,
    StartSend,
    StopPrefill,
    Tick,
)
from pdserve.kv_transfer.lease_step import step
from pdserve.kv_transfer.leases import LeaseTable
from pdserve.proto.errors import DuplicateRequest
from pdserve.proto.types import HandoffId


def test_a_hand_off_that_goes_well() -> None:
    table = LeaseTable(TIMES)
    assert table.accept(ID, TARGET, NUM_TOKENS, 0.0) == ()
    assert table.part_computed(ID, FIRST, None, 1.0) == (offer(0),)
    assert table.offer_ended(ID, 0, 1.1) == ()
    assert table.part_computed(ID, LAST, FIRST_TOKEN, 2.0) == (offer(1),)
    assert table.send_started(ID, TARGET, KEY, 0, 2.1) == (StartSend(ID, TARGET, KEY, FIRST),)
    assert table.offer_ended(ID, 1, 2.2) == ()
    assert table.send_ended(ID, KEY, 2.3) == ()
    last = SendKey(KEY.link_epoch, 1)
    assert table.send_started(ID, TARGET, last, 0, 2.4) == (StartSend(ID, TARGET, last, LAST),)
    assert table.send_ended(ID, last, 2.5) == ()
    freed = FreeBlocks(ID, (*FIRST, *LAST), from_quarantine=False, reason="redeemed")
    assert table.release(ID, "redeemed", 2.6) == (freed,)
    assert not table.leases


# Accept


def test_a_repeated_accept_changes_nothing() -> None:
    for state in (LeaseState.ACCEPTED, LeaseState.LEASED, LeaseState.SENDING):
        lease = lease_in(state)
        after, (ignored,) = step(lease, Accept(ID, TARGET, NUM_TOKENS, TIMES), 5.0)
        assert after == lease
        assert isinstance(ignored, Ignored)


def test_an_accept_for_another_target_is_refused() -> None:
    table = LeaseTable(TIMES)
    table.accept(ID, TARGET, NUM_TOKENS, 0.0)
    for other in (TARGET._replace(generation=2), TARGET._replace(worker_id="decode-1")):
        with pytest.raises(DuplicateRequest):
            table.accept(ID, other, NUM_TOKENS, 0.0)


def test_an_id_in_quarantine_cannot_be_accepted_again() -> None:
    """Its new parts would be freed as they come, under the engine's hands."""
    lease = lease_in(LeaseState.QUARANTINED)
    after, (refused,) = step(lease, Accept(ID, TARGET, NUM_TOKENS, TIMES), 1.0)
    assert after == lease
    assert isinstance(refused, Refused)
    assert refused.kind == "DuplicateRequest"


# Parts and offers


def test_parts_are_offered_in_order_one_at_a_time() -> None:
    lease, _ = step(lease_in(LeaseState.ACCEPTED), PartComputed(ID, FIRST), 0.0)
    lease, effects = step(lease, PartComputed(ID, LAST, FIRST_TOKEN), 0.1)
    assert effects == ()
    assert step(lease, Tick(ID), 0.1) == (lease, ())
    _, effects = step(lease, OfferEnded(ID, 0), 0.2)
    assert effects == (offer(1),)


def test_the_lease_runs_from_the_first_part() -> None:
    accepted = lease_in(LeaseState.ACCEPTED)
    assert step(accepted, Tick(ID), 1e9) == (accepted, ())
    leased, _ = step(accepted, PartComputed(ID, FIRST), 100.0)
    assert leased is not None
    assert leased.expires_s == 110.0


def test_an_offer_without_an_answer_is_repeated_after_a_pause() -> None:
    table = LeaseTable(TIMES)
    table.accept(ID, TARGET, NUM_TOKENS, 0.0)
    table.part_computed(ID, FIRST, None, 0.0)
    assert table.offer_ended(ID, 0, 1.0, "WorkerLost", "no answer", is_transient=True) == ()
    assert not table.is_offering(ID, 0)
    assert table.part_computed(ID, LAST, FIRST_TOKEN, 1.5) == ()  # nor does another part hurry it
    assert table.sweep(1.9) == ()
    assert table.sweep(2.0) == (offer(0),)
    assert table.sweep(2.0) == ()


def test_a_refused_offer_ends_the_hand_off_aloud() -> None:
    lease, _ = step(lease_in(LeaseState.ACCEPTED), PartComputed(ID, FIRST), 0.0)
    after, effects = step(lease, OfferEnded(ID, 0, "LayoutMismatch", "dtype differs"), 0.1)
    assert after is None
    assert [type(effect) for effect in effects] == [StopPrefill, FreeBlocks, HandoffFailed]
    assert effects[-1] == HandoffFailed(ID, "LayoutMismatch", "decode-0 did not take the offer: dtype differs")


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("kind", ["", "LayoutMismatch"])
def test_an_answer_that_is_not_waited_for_changes_nothing(part: int, kind: str) -> None:
    for state in (LeaseState.LEASED, LeaseState.SENDING, LeaseState.QUARANTINED):
        lease = lease_in(state)
        after, (ignored,) = step(lease, OfferEnded(ID, part, kind), 0.1)
        assert after == lease
        assert isinstance(ignored, Ignored)
    assert isinstance(step(None, OfferEnded(ID, part, kind), 0.1)[1][0], Ignored)


def test_an_old_answer_does_not_stand_for_the_next_offer() -> None:
    lease, _ = step(lease_in(LeaseState.LEASED, is_complete=False), PartComputed(ID, LAST, FIRST_TOKEN), 0.0)
    after, (ignored,) = step(lease, OfferEnded(ID, 0), 0.0)
    assert after == lease
    assert isinstance(ignored, Ignored)


def test_digests_are_wanted_only_while_their_part_is_being_offered() -> None:
    table = LeaseTable(TIMES)
    assert not table.is_offering(ID, 0)
    table.accept(ID, TARGET, NUM_TOKENS, 0.0)
    assert not table.is_offering(ID, 0)
    table.part_computed(ID, FIRST, None, 0.0)
    assert table.is_offering(ID, 0)
    assert not table.is_offering(ID, 1)
    table.send_started(ID, TARGET, KEY, 0, 0.0)
    table.abort(ID, "cancelled", 0.0)
    assert table.leases[ID].state is LeaseState.QUARANTINED
    assert not table.is_offering(ID, 0)


def test_a_part_that_comes_after_the_end_is_freed() -> None:
    for lease in (None, lease_in(LeaseState.QUARANTINED)):
        after, effects = step(lease, PartComputed(ID, LAST, FIRST_TOKEN), 0.0)
        assert after == lease
        assert effects == (FreeBlocks(ID, LAST, False, "computed after the request ended"),)


# Ends


@pytest.mark.parametrize("end", [Release(ID, "redeemed"), Abort(ID, "cancelled")])
def test_an_end_before_the_first_part_leaves_nothing(end: LeaseEvent) -> None:
    assert step(lease_in(LeaseState.ACCEPTED), end, 0.0) == (None, (StopPrefill(ID),))


@pytest.mark.parametrize("is_complete", [True, False])
@pytest.mark.parametrize("end", [Release(ID, "gone"), Abort(ID, "gone"), Tick(ID)])
def test_the_end_of_a_lease_frees_its_blocks_after_the_computation_stops(end: LeaseEvent, is_complete: bool) -> None:
    after, effects = step(lease_in(LeaseState.LEASED, is_complete), end, TIMES.lease_s)
    assert after is None
    freed = next(effect for effect in effects if isinstance(effect, FreeBlocks))
    assert freed.block_ids == ((*FIRST, *LAST) if is_complete else FIRST)
    assert not freed.from_quarantine
    stops = [] if is_complete else [StopPrefill]
    told = [HandoffFailed] if isinstance(end, Tick) else []
    assert [type(effect) for effect in effects] == [*stops, FreeBlocks, *told]


@pytest.mark.parametrize("is_complete", [True, False])
@pytest.mark.parametrize("end", [Release(ID, "gone"), Abort(ID, "gone"), Tick(ID)])
def test_blocks_being_sent_are_quarantined_until_the_send_has_ended(end: LeaseEvent, is_complete: bool) -> None:
    lease, effects = step(lease_in(LeaseState.SENDING, is_complete), end, TIMES.lease_s)
    assert not any(isinstance(effect, FreeBlocks) for effect in effects)
    assert isinstance(effects[0 if is_complete else 1], QuarantineBlocks)
    assert lease is not None
    assert lease.state is LeaseState.QUARANTINED
    for event in (Release(ID, "redeemed"), Abort(ID, "again"), Tick(ID), SendEnded(ID, SendKey(3, 1))):
        after, effects = step(lease, event, 1e9)
        assert after == lease
        assert all(isinstance(effect, Ignored) for effect in effects)
    after, (freed,) = step(lease, SendEnded(ID, KEY), 2e9)
    assert after is None
    assert isinstance(freed, FreeBlocks)
    assert freed.from_quarantine
    assert freed.block_ids == lease.block_ids


def test_the_end_of_what_is_not_there_is_ignored() -> None:
    for event in (Release(ID, "redeemed"), Abort(ID, "cancelled"), SendEnded(ID, KEY)):
        after, (ignored,) = step(None, event, 0.0)
        assert after is None
        assert isinstance(ignored, Ignored)
    assert step(None, Tick(ID), 0.0) == (None, ())


def test_ending_another_attempt_touches_nothing() -> None:
    table = LeaseTable(TIMES)
    table.accept(ID, TARGET, NUM_TOKENS, 0.0)
    for other in (HandoffId("r", 1, 1), HandoffId("r", 0, 2)):
        (ignored,) = table.release(other, "redeemed", 0.0)
        assert isinstance(ignored, Ignored)
    assert ID in table.leases


# Time


def test_a_silent_decode_worker_loses_the_lease_exactly_at_expiry() -> None:
    lease = lease_in(LeaseState.LEASED)
    assert step(lease, Tick(ID), TIMES.lease_s - 0.001) == (lease, ())
    _, effects = step(lease, Tick(ID), TIMES.lease_s)
    failed = effects[-1]
    assert isinstance(failed, HandoffFailed)
    assert failed.kind == "TransferFailed"
    assert "decode-0" in failed.message


def test_renewal_prolongs_and_tells_what_is_lost() -> None:
    lease = lease_in(LeaseState.LEASED)
    renewed, effects = step(lease, Renew(ID), 9.0)
    assert renewed is not None
    assert effects == (LeaseRenewed(ID, 19.0),)
    assert step(renewed, Tick(ID), 18.9) == (renewed, ())
    expired = step(renewed, Renew(ID), 19.0)  # if not swept yet
    assert expired[0] == renewed
    for lost in (expired[1], step(None, Renew(ID), 0.0)[1], step(lease_in(LeaseState.QUARANTINED), Renew(ID), 0.0)[1]):
        assert isinstance(lost[0], LeaseLost)


def test_the_table_tells_which_renewals_came_too_late() -> None:
    table = LeaseTable(TIMES)
    table.accept(ID, TARGET, NUM_TOKENS, 0.0)
    table.part_computed(ID, FIRST, None, 0.0)
    other = HandoffId("other", 0, 1)
    assert table.renew([ID, other], 9.0) == (other,)
    assert table.renew([ID], 19.0) == (ID,)


def test_the_sweep_does_not_stop_at_the_first_lease_that_lives() -> None:
    table = LeaseTable(TIMES)
    ids = [HandoffId(str(index), 0, 1) for index in range(3)]
    for block, id in enumerate(ids):
        table.accept(id, TARGET, NUM_TOKENS, 0.0)
        table.part_computed(id, (block,), FIRST_TOKEN, 0.0)
    table.renew([ids[0]], 5.0)
    assert {effect.id for effect in table.sweep(12.0)} == set(ids[1:])
    assert list(table.leases) == ids[:1]


# Sends
