"""Sends of leased blocks, and the death of those they go to: what may start, and what proves that memory is free."""

from __future__ import annotations

import pytest
from lease_examples import FIRST, ID, KEY, LAST, NUM_TOKENS, TARGET, TIMES, lease_in

from pdserve.kv_transfer.effects import FreeBlocks, Ignored, Refused
from pdserve.kv_transfer.lease import (
    HandoffFailed,
    LeaseState,
    Release,
    SendEnded,
    SendKey,
    SendStarted,
    StartSend,
    StopPrefill,
)
from pdserve.kv_transfer.lease_step import step
from pdserve.kv_transfer.leases import LeaseTable
from pdserve.proto.errors import StaleReference
from pdserve.proto.types import HandoffId


def test_a_send_counts_as_a_renewal() -> None:
    sending, _ = step(lease_in(LeaseState.LEASED), SendStarted(ID, TARGET, KEY), 9.0)
    assert sending is not None
    assert sending.expires_s == 19.0


def test_only_what_the_target_lacks_is_sent() -> None:
    _, (start,) = step(lease_in(LeaseState.LEASED), SendStarted(ID, TARGET, KEY, first=1), 0.0)
    assert start == StartSend(ID, TARGET, KEY, FIRST[1:])


@pytest.mark.parametrize(
    "event",
    [
        SendStarted(ID, TARGET._replace(generation=2), KEY),
        SendStarted(ID, TARGET._replace(worker_id="decode-1"), KEY),
        SendStarted(ID, TARGET, SendKey(3, 2)),
        SendStarted(ID, TARGET, SendKey(3, -1)),
        SendStarted(ID, TARGET, KEY, first=2),
        SendStarted(ID, TARGET, KEY, first=-1),
    ],
)
def test_a_redemption_of_what_is_not_leased_to_the_caller_is_refused(event: SendStarted) -> None:
    lease = lease_in(LeaseState.LEASED)
    after, (refused,) = step(lease, event, 0.0)
    assert after == lease
    assert isinstance(refused, Refused)
    assert refused.kind == "StaleReference"


def test_without_a_live_lease_nothing_is_sent() -> None:
    quarantined = lease_in(LeaseState.QUARANTINED)
    for lease, now_s in ((None, 0.0), (lease_in(LeaseState.ACCEPTED), 0.0), (quarantined, 0.0)):
        after, (refused,) = step(lease, SendStarted(ID, TARGET, SendKey(9, 0)), now_s)
        assert after == lease
        assert isinstance(refused, Refused)
    table = LeaseTable(TIMES)
    table.accept(ID, TARGET, NUM_TOKENS, 0.0)
    table.part_computed(ID, FIRST, None, 0.0)
    with pytest.raises(StaleReference):
        table.send_started(ID, TARGET, KEY, 0, TIMES.lease_s)  # expired, if not swept yet


def test_a_repeated_redemption_starts_nothing_and_an_older_one_is_refused() -> None:
    sending = lease_in(LeaseState.SENDING)
    leased, _ = step(sending, SendEnded(ID, KEY), 0.0)
    for lease in (sending, leased):
        after, (ignored,) = step(lease, SendStarted(ID, TARGET, KEY), 0.0)
        assert after == lease
        assert isinstance(ignored, Ignored)
        after, (refused,) = step(lease, SendStarted(ID, TARGET, SendKey(2, 1)), 0.0)
        assert after == lease
        assert isinstance(refused, Refused)
        assert refused.kind == "StaleReference"


@pytest.mark.parametrize("newer", [SendKey(3, 1), SendKey(4, 0)])
def test_a_newer_send_may_start_before_the_older_has_ended(newer: SendKey) -> None:
    """The target has the bytes of a part, or has given up on them, before its source knows that the send is over."""
    both, effects = step(lease_in(LeaseState.SENDING), SendStarted(ID, TARGET, newer), 0.0)
    assert effects == (StartSend(ID, TARGET, newer, LAST if newer.part else FIRST),)
    for first, second in ((KEY, newer), (newer, KEY)):
        one, effects = step(both, SendEnded(ID, first), 0.0)
        assert effects == ()
        assert one is not None
        assert one.state is LeaseState.SENDING
        none, effects = step(one, SendEnded(ID, second), 0.0)
        assert effects == ()
        assert none is not None
        assert none.state is LeaseState.LEASED


def test_blocks_stay_in_quarantine_until_the_last_of_several_sends_has_ended() -> None:
    newer = SendKey(4, 0)
    both, _ = step(lease_in(LeaseState.SENDING), SendStarted(ID, TARGET, newer), 0.0)
    quarantined, _ = step(both, Release(ID, "redeemed"), 0.0)
    one, effects = step(quarantined, SendEnded(ID, newer), 0.0)
    assert effects == ()
    again, (ignored,) = step(one, SendEnded(ID, newer), 0.0)
    assert again == one
    assert isinstance(ignored, Ignored)
    after, (freed,) = step(one, SendEnded(ID, KEY), 0.0)
    assert after is None
    assert isinstance(freed, FreeBlocks)


# Deaths


def test_the_death_of_a_target_ends_what_is_kept_for_that_process() -> None:
    table = LeaseTable(TIMES)
    successor = HandoffId("successor", 0, 1)
    elsewhere = HandoffId("elsewhere", 0, 1)
    for id, target in (
        (ID, TARGET),
        (successor, TARGET._replace(generation=2)),
        (elsewhere, TARGET._replace(worker_id="decode-1")),
    ):
        table.accept(id, target, NUM_TOKENS, 0.0)
        table.part_computed(id, FIRST, None, 0.0)
    effects = table.peer_gone("decode-0", 1, 1.0)
    assert [type(effect) for effect in effects] == [StopPrefill, FreeBlocks, HandoffFailed]
    assert effects[-1] == HandoffFailed(ID, "WorkerLost", "decode-0 died before it had redeemed the KV")
    assert set(table.leases) == {successor, elsewhere}


def test_a_death_says_nothing_new_of_what_is_in_quarantine() -> None:
    table = LeaseTable(TIMES)
    table.accept(ID, TARGET, NUM_TOKENS, 0.0)
    table.part_computed(ID, FIRST, None, 0.0)
    table.send_started(ID, TARGET, KEY, 0, 0.0)
    table.abort(ID, "cancelled", 0.0)
    assert table.quarantined_blocks == 2
    assert table.peer_gone("decode-0", 1, 1.0) == ()
    (freed,) = table.send_ended(ID, KEY, 2.0)
    assert isinstance(freed, FreeBlocks)
    assert table.quarantined_blocks == 0
