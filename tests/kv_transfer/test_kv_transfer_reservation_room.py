"""Reservations: repeated messages, blocks that come late, room and renewals."""

from __future__ import annotations

from dataclasses import replace

import pytest
from reservation_examples import BLOCKS, FIRST, ID, LAST, LAYOUT, NEVER, NUM_TOKENS, SOURCE, TICKET, TIMEOUTS, table_in

from pdserve.kv_transfer.effects import FreeBlocks, Ignored, raise_refusal
from pdserve.kv_transfer.reservation import (
    FetchPart,
    Phase,
    ReleaseHeld,
    TakeBlocks,
    Unreserve,
)
from pdserve.kv_transfer.reservations import ReservationTable
from pdserve.proto.errors import DuplicateRequest, StaleReference
from pdserve.proto.types import HandoffId, KVPart


def test_an_offer_before_it_is_expected_or_after_the_end_is_refused() -> None:
    for table in (ReservationTable(LAYOUT, TIMEOUTS), table_in(Phase.QUARANTINED)):
        with pytest.raises(StaleReference):
            raise_refusal(table.offer(TICKET, FIRST, 0.0))


def test_an_int8_source_may_serve_a_wider_pool() -> None:
    assert table_in(Phase.RESERVED).offer(replace(TICKET, layout=replace(LAYOUT, dtype="int8")), FIRST, 0.0) == ()


# Repetition


def test_repeated_messages_change_nothing() -> None:
    table = table_in(Phase.OFFERED)
    before = dict(table.reservations)
    for effects in (
        table.expect(ID, SOURCE, NUM_TOKENS, NEVER, 9.0),
        table.offer(TICKET, FIRST, 9.0),
        table.part_ended(ID, 0, 9.0),
        table.blocks_refused(ID, 9.0),
    ):
        (ignored,) = effects
        assert isinstance(ignored, Ignored)
    assert before == table.reservations


def test_the_end_of_another_part_proves_nothing() -> None:
    for phase in (Phase.TRANSFERRING, Phase.QUARANTINED):
        table = table_in(phase)
        (ignored,) = table.part_ended(ID, 1, 9.0)
        assert isinstance(ignored, Ignored)
        assert table.reservations[ID].phase is phase


def test_an_id_that_is_in_use_cannot_be_expected_differently() -> None:
    table = table_in(Phase.RESERVED)
    for source, num_tokens in ((SOURCE._replace(generation=4), NUM_TOKENS), (SOURCE, NUM_TOKENS + 1)):
        with pytest.raises(DuplicateRequest):
            table.expect(ID, source, num_tokens, NEVER, 1.0)
    with pytest.raises(DuplicateRequest):
        table_in(Phase.QUARANTINED).expect(ID, SOURCE, NUM_TOKENS, NEVER, 1.0)


def test_what_was_admitted_may_be_offered_again_for_as_long_as_its_lease_can_last() -> None:
    """The source has not heard that its offer arrived; the request may be over long since."""
    table = table_in(Phase.TRANSFERRING)
    table.offer(TICKET, LAST, 0.0)
    table.part_ended(ID, 0, 0.0)
    table.part_ended(ID, 1, 1.0)
    assert not table.reservations
    for now_s in (1.0, 1.0 + TICKET.lease_s, 0.9 + 2 * TICKET.lease_s):
        table.sweep(now_s)
        assert table.offer(TICKET, LAST, now_s) == (Ignored(ID, "redeemed already"),)
    table.sweep(1.0 + 2 * TICKET.lease_s)
    with pytest.raises(StaleReference):
        raise_refusal(table.offer(TICKET, LAST, 1.0 + 2 * TICKET.lease_s))


# Blocks and room


@pytest.mark.parametrize("num_held", [0, 1])
def test_blocks_that_come_after_the_end_are_given_back(num_held: int) -> None:
    table = table_in(Phase.OFFERED)
    table.on_room(3, 1.0)
    assert Unreserve(ID, 3) in table.abort(ID, "client left", 1.0)
    effects = table.blocks_taken(ID, BLOCKS, num_held, 2.0)
    assert effects[0] == FreeBlocks(ID, BLOCKS[num_held:], False, "taken after the request ended")
    assert effects[1:] == ((ReleaseHeld(ID, BLOCKS[:1]),) if num_held else ())


def test_blocks_asked_for_an_earlier_use_of_the_id_are_given_back() -> None:
    table = table_in(Phase.OFFERED)
    table.on_room(3, 1.0)
    table.abort(ID, "client left", 1.0)
    table.expect(ID, SOURCE, 5, NEVER, 1.0)
    table.offer(replace(TICKET, num_tokens=5), KVPart(0, 0, (1,), (1,), first_token=9), 1.0)
    assert table.on_room(1, 1.0) == (TakeBlocks(ID, 1),)
    (freed,) = table.blocks_taken(ID, BLOCKS, 0, 2.0)
    assert isinstance(freed, FreeBlocks)
    assert isinstance(table.blocks_taken(ID, (4,), 0, 2.0)[1], FetchPart)


def test_blocks_that_were_refused_are_asked_for_again() -> None:
    table = table_in(Phase.OFFERED)
    table.on_room(3, 0.0)
    assert table.blocks_refused(ID, 1.0) == ()
    assert table.on_room(3, 2.0) == (TakeBlocks(ID, 3),)


def test_room_goes_to_the_oldest_offer_and_a_large_one_is_not_overtaken() -> None:
    table = ReservationTable(LAYOUT, TIMEOUTS)
    small, large, late = (HandoffId(name, 0, 1) for name in ("small", "large", "late"))
    sizes = {small: 1, large: 4, late: 1}
    for id, num_blocks in sizes.items():
        table.expect(id, SOURCE, num_blocks * 16, NEVER, 0.0)
    for now_s, id in enumerate((large, small, late)):
        blocks = tuple(range(sizes[id]))
        table.offer(
            replace(TICKET, id=id, num_tokens=sizes[id] * 16), KVPart(0, 0, blocks, blocks, first_token=9), float(now_s)
        )
    assert table.on_room(3, 5.0) == ()
    assert table.on_room(5, 5.0) == (TakeBlocks(large, 4), TakeBlocks(small, 1))
    assert table.on_room(5, 5.0) == ()
    assert table.on_room(6, 5.0) == (TakeBlocks(late, 1),)


# Renewals


@pytest.mark.parametrize("phase", list(Phase))
def test_leases_are_renewed_while_their_blocks_are_wanted(phase: Phase) -> None:
    table = table_in(phase)
    assert table.due_renewals(3.9) == {}
    wanted = phase in (Phase.OFFERED, Phase.WAITING, Phase.TRANSFERRING)
    assert table.due_renewals(4.0) == ({SOURCE: (ID,)} if wanted else {})
    assert table.due_renewals(4.0) == {}
    assert table.due_renewals(8.0) == ({SOURCE: (ID,)} if wanted else {})


def test_a_short_lease_is_renewed_more_often() -> None:
    table = table_in(Phase.RESERVED)
    table.offer(replace(TICKET, lease_s=3.0), FIRST, 0.0)
    assert table.due_renewals(0.9) == {}
    assert table.due_renewals(1.0) == {SOURCE: (ID,)}
