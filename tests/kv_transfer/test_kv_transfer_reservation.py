"""The decode worker's reservations: every arrow of their life, every refusal, and that repetition changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from reservation_examples import (
    BLOCKS,
    FIRST,
    ID,
    LAST,
    LAYOUT,
    NEVER,
    NUM_TOKENS,
    SOURCE,
    TICKET,
    TIMEOUTS,
    WHOLE,
    failure,
    table_in,
)

from pdserve.kv_transfer.effects import FreeBlocks, Ignored, QuarantineBlocks, Refused, raise_refusal
from pdserve.kv_transfer.reservation import (
    Admit,
    Fail,
    FetchPart,
    Phase,
    ReleaseHeld,
    SendRelease,
    TakeBlocks,
    Unreserve,
)
from pdserve.kv_transfer.reservations import ReservationTable
from pdserve.proto.errors import LayoutMismatch, StaleReference
from pdserve.proto.types import HandoffId, KVPart, KVTicket


def test_a_hand_off_that_goes_well() -> None:
    table = ReservationTable(LAYOUT, TIMEOUTS)
    assert table.expect(ID, SOURCE, NUM_TOKENS, NEVER, 0.0) == ()
    assert table.offer(TICKET, FIRST, 1.0) == ()
    assert table.on_room(2, 1.0) == ()
    assert table.on_room(3, 2.0) == (TakeBlocks(ID, 3),)
    assert table.on_room(3, 2.0) == ()
    fetch = FetchPart(ID, TICKET, FIRST, 0, BLOCKS)
    assert table.blocks_taken(ID, BLOCKS, 0, 3.0) == (Unreserve(ID, 3), fetch)
    assert table.part_ended(ID, 0, 4.0) == ()
    assert table.reservations[ID].phase is Phase.WAITING
    assert table.offer(TICKET, LAST, 5.0) == (FetchPart(ID, TICKET, LAST, 0, BLOCKS),)
    assert table.part_ended(ID, 1, 6.0) == (SendRelease(ID, SOURCE, "redeemed"), Admit(ID, 9, BLOCKS, 0))
    assert not table.reservations


def test_parts_that_come_while_another_is_fetched_wait_for_their_turn() -> None:
    table = table_in(Phase.TRANSFERRING)
    assert table.offer(TICKET, LAST, 1.0) == ()
    assert table.part_ended(ID, 0, 2.0) == (FetchPart(ID, TICKET, LAST, 0, BLOCKS),)
    assert any(isinstance(effect, Admit) for effect in table.part_ended(ID, 1, 3.0))


def test_nothing_is_admitted_before_the_last_part_is_verified() -> None:
    table = table_in(Phase.TRANSFERRING)
    table.offer(TICKET, LAST, 1.0)
    assert not any(isinstance(effect, Admit) for effect in table.part_ended(ID, 0, 2.0))
    effects = table.part_ended(ID, 1, 3.0, "LayoutMismatch", "no")
    assert not any(isinstance(effect, Admit) for effect in effects)
    assert failure(effects).kind == "LayoutMismatch"


# What is held already


def test_parts_that_are_held_already_are_not_fetched() -> None:
    table = table_in(Phase.OFFERED)
    table.on_room(3, 0.0)
    assert table.blocks_taken(ID, BLOCKS, 2, 0.0) == (Unreserve(ID, 3),)
    assert table.reservations[ID].phase is Phase.WAITING
    assert table.offer(TICKET, LAST, 1.0) == (FetchPart(ID, TICKET, LAST, 0, BLOCKS),)


def test_of_a_part_that_is_held_in_part_only_the_rest_is_fetched() -> None:
    table = table_in(Phase.OFFERED)
    table.on_room(3, 0.0)
    assert table.blocks_taken(ID, BLOCKS, 1, 0.0)[1] == FetchPart(ID, TICKET, FIRST, 1, BLOCKS)


def test_a_prompt_that_is_held_whole_is_admitted_when_its_first_token_is_there() -> None:
    table = ReservationTable(LAYOUT, TIMEOUTS)
    table.expect(ID, SOURCE, NUM_TOKENS, NEVER, 0.0)
    table.offer(TICKET, WHOLE, 0.0)
    table.on_room(3, 0.0)
    assert table.blocks_taken(ID, BLOCKS, 3, 0.0)[-1] == Admit(ID, 9, BLOCKS, 3)


def test_held_blocks_are_counted_in_the_blocks_of_the_source() -> None:
    ticket = replace(TICKET, layout=replace(LAYOUT, block_size=32))
    part = KVPart(0, 0, (50, 51), (1, 2), first_token=9)
    table = ReservationTable(LAYOUT, TIMEOUTS)
    table.expect(ID, SOURCE, NUM_TOKENS, NEVER, 0.0)
    assert table.offer(ticket, part, 0.0) == ()
    table.on_room(3, 0.0)
    assert table.blocks_taken(ID, BLOCKS, 2, 0.0)[1] == FetchPart(ID, ticket, part, 1, BLOCKS)


@pytest.mark.parametrize("phase", [Phase.WAITING, Phase.TRANSFERRING])
def test_held_blocks_are_given_back_at_once_whatever_the_wire_does(phase: Phase) -> None:
    table = table_in(Phase.OFFERED)
    table.on_room(3, 0.0)
    table.blocks_taken(ID, BLOCKS, 1, 0.0)
    if phase is Phase.WAITING:
        table.part_ended(ID, 0, 0.0)
    effects = table.abort(ID, "client left", 1.0)
    assert ReleaseHeld(ID, (7,)) in effects
    kept = FreeBlocks if phase is Phase.WAITING else QuarantineBlocks
    assert [effect.block_ids for effect in effects if isinstance(effect, kept)] == [(5, 6)]


# Pulls that fail


@pytest.mark.parametrize("kind", ["TransferFailed", "CorruptKV", "WorkerLost"])
def test_a_part_that_comes_wrong_is_pulled_once_more(kind: str) -> None:
    table = table_in(Phase.TRANSFERRING)
    assert table.part_ended(ID, 0, 1.0, kind, "no") == (FetchPart(ID, TICKET, FIRST, 0, BLOCKS),)
    assert table.reservations[ID].deadline_s == 11.0
    told = "TransferFailed" if kind == "WorkerLost" else kind
    assert table.part_ended(ID, 0, 2.0, kind, "again") == (
        FreeBlocks(ID, BLOCKS, False, "again"),
        SendRelease(ID, SOURCE, f"{told}: again"),
        Fail(ID, told, "again"),
    )
    assert not table.reservations


def test_each_part_has_its_own_pulls() -> None:
    table = table_in(Phase.TRANSFERRING)
    table.offer(TICKET, LAST, 0.0)
    assert len(table.part_ended(ID, 0, 0.0, "TransferFailed", "no")) == 1
    assert len(table.part_ended(ID, 0, 0.0)) == 1
    assert table.part_ended(ID, 1, 0.0, "CorruptKV", "no") == (FetchPart(ID, TICKET, LAST, 0, BLOCKS),)


def test_a_refused_part_is_not_pulled_again() -> None:
    effects = table_in(Phase.TRANSFERRING).part_ended(ID, 0, 1.0, "StaleReference", "no such lease")
    assert failure(effects) == Fail(ID, "StaleReference", "no such lease")


def test_a_redemption_without_an_answer_does_not_pass_for_a_death() -> None:
    """The fleet tells who died; a lost message is no death."""
    table = table_in(Phase.TRANSFERRING)
    table.part_ended(ID, 0, 1.0, "WorkerLost", "did not answer")
    assert failure(table.part_ended(ID, 0, 1.0, "WorkerLost", "did not answer")).kind == "TransferFailed"


# Ends


@pytest.mark.parametrize("end", ["abort", "deadline", "peer gone"])
def test_the_end_of_a_request_in_transfer_quarantines_its_blocks_until_the_wire_is_idle(end: str) -> None:
    table = table_in(Phase.TRANSFERRING)
    effects = {
        "abort": lambda: table.abort(ID, "client left", 1.0),
        "deadline": lambda: table.sweep(TIMEOUTS.transfer_s),
        "peer gone": lambda: table.peer_gone("prefill-0", 3, 1.0),
    }[end]()
    assert [type(effect) for effect in effects] == [QuarantineBlocks, SendRelease, Fail]
    assert table.quarantined_blocks == 3
    assert table.sweep(NEVER) == ()
    assert table.peer_gone("prefill-0", 3, 2.0)[0] == Ignored(
        ID, "has ended already: prefill-0 died before its KV had arrived"
    )
    (freed,) = table.part_ended(ID, 0, 2.0, "TransferFailed", "closed")
    assert freed == FreeBlocks(ID, BLOCKS, True, "the wire is idle")
    assert not table.reservations


@pytest.mark.parametrize("phase", [Phase.RESERVED, Phase.OFFERED, Phase.WAITING])
def test_the_end_of_a_request_without_a_transfer_frees_everything_at_once(phase: Phase) -> None:
    table = table_in(phase)
    effects = table.abort(ID, "client left", 1.0)
    memory = FreeBlocks(ID, BLOCKS, False, "client left") if phase is Phase.WAITING else Unreserve(ID, 3)
    release = [] if phase is Phase.RESERVED else [SendRelease(ID, SOURCE, "RequestCancelled: client left")]
    assert effects == (memory, *release, Fail(ID, "RequestCancelled", "client left"))
    assert not table.reservations
    assert isinstance(table.abort(ID, "again", 1.0)[0], Ignored)


@pytest.mark.parametrize(
    ("phase", "timeout_s"),
    [(Phase.RESERVED, 60), (Phase.OFFERED, 30), (Phase.WAITING, 20), (Phase.TRANSFERRING, 10)],
)
def test_each_phase_has_its_own_deadline_and_the_request_its_own(phase: Phase, timeout_s: float) -> None:
    table = table_in(phase)
    assert table.sweep(timeout_s - 0.001) == ()
    assert failure(table.sweep(timeout_s)).kind == "TransferFailed"
    table = ReservationTable(LAYOUT, TIMEOUTS)
    table.expect(ID, SOURCE, NUM_TOKENS, 2.0, 0.0)
    assert failure(table.sweep(2.0)).kind == "DeadlineExceeded"


def test_progress_renews_the_deadline_and_repetition_does_not() -> None:
    table = table_in(Phase.TRANSFERRING)
    table.part_ended(ID, 0, 9.0)
    assert table.reservations[ID].deadline_s == 29.0
    table.offer(TICKET, FIRST, 15.0)
    assert table.reservations[ID].deadline_s == 29.0


def test_the_sweep_does_not_stop_at_the_first_that_lives() -> None:
    table = ReservationTable(LAYOUT, TIMEOUTS)
    ids = [HandoffId(str(index), 0, 1) for index in range(3)]
    for id, deadline_s in zip(ids, (50.0, 5.0, 5.0), strict=True):
        table.expect(id, SOURCE, NUM_TOKENS, deadline_s, 0.0)
    assert {effect.id for effect in table.sweep(5.0)} == set(ids[1:])


def test_the_death_of_a_source_ends_what_is_expected_from_that_process() -> None:
    table = ReservationTable(LAYOUT, TIMEOUTS)
    successor, elsewhere = HandoffId("successor", 0, 1), HandoffId("elsewhere", 0, 1)
    table.expect(ID, SOURCE, NUM_TOKENS, NEVER, 0.0)
    table.expect(successor, SOURCE._replace(generation=4), NUM_TOKENS, NEVER, 0.0)
    table.expect(elsewhere, SOURCE._replace(worker_id="prefill-1"), NUM_TOKENS, NEVER, 0.0)
    fail = failure(table.peer_gone("prefill-0", 3, 1.0))
    assert fail == Fail(ID, "WorkerLost", "prefill-0 died before its KV had arrived")
    assert set(table.reservations) == {successor, elsewhere}


# Offers that are refused


@pytest.mark.parametrize(
    "change",
    [
        {"source": SOURCE._replace(generation=2)},
        {"source": SOURCE._replace(worker_id="prefill-1")},
        {"id": HandoffId("r", 1, 1)},
        {"id": HandoffId("r", 0, 2)},
    ],
)
def test_an_offer_that_is_not_meant_here_is_refused_and_changes_nothing(change: dict[str, object]) -> None:
    table = table_in(Phase.RESERVED)
    before = dict(table.reservations)
    effects = table.offer(replace(TICKET, **change), FIRST, 1.0)  # type: ignore[arg-type]
    assert [type(effect) for effect in effects] == [Refused]
    with pytest.raises(StaleReference):
        raise_refusal(effects)
    assert before == table.reservations


@pytest.mark.parametrize("phase", [Phase.OFFERED, Phase.WAITING, Phase.TRANSFERRING])
@pytest.mark.parametrize(
    ("ticket", "part"),
    [
        (replace(TICKET, lease_s=1.0), LAST),
        (TICKET, replace(LAST, index=2)),
        (TICKET, replace(FIRST, block_ids=(1, 2))),
        (TICKET, replace(FIRST, block_digests=(1, 3))),
    ],
)
def test_an_offer_that_contradicts_the_first_is_refused_and_changes_nothing(
    phase: Phase, ticket: KVTicket, part: KVPart
) -> None:
    table = table_in(phase)
    before = dict(table.reservations)
    with pytest.raises(StaleReference):
        raise_refusal(table.offer(ticket, part, 1.0))
    assert before == table.reservations


@pytest.mark.parametrize(
    ("ticket", "part"),
    [
        (replace(TICKET, layout=replace(LAYOUT, model_hash="other")), FIRST),
        (replace(TICKET, layout=replace(LAYOUT, num_kv_heads=4)), FIRST),
        (replace(TICKET, num_tokens=NUM_TOKENS + 1), FIRST),
        (replace(TICKET, lease_s=0.0), FIRST),
        (replace(TICKET, lease_s=float("nan")), FIRST),
        (TICKET, replace(FIRST, first_block=1)),
        (TICKET, replace(FIRST, block_ids=(), block_digests=())),
        (TICKET, replace(FIRST, block_digests=(1,))),
        (TICKET, replace(FIRST, block_digests=(1, 2, 3))),
        (TICKET, replace(FIRST, first_token=9)),  # the last part, but the prompt is longer
        (TICKET, replace(WHOLE, first_token=None)),  # the whole prompt, but not the last part
        (TICKET, KVPart(0, 0, (1, 2, 3, 4), (1, 2, 3, 4), first_token=9)),
    ],
)
def test_an_offer_that_can_never_be_used_is_refused_and_ends_the_request(ticket: KVTicket, part: KVPart) -> None:
    table = table_in(Phase.RESERVED)
    effects = table.offer(ticket, part, 1.0)
    assert [type(effect) for effect in effects] == [Refused, Unreserve, Fail]
    with pytest.raises(LayoutMismatch):
        raise_refusal(effects)
    assert not table.reservations


def test_a_later_part_that_can_never_be_used_ends_the_request_too() -> None:
    for phase, memory in ((Phase.WAITING, FreeBlocks), (Phase.TRANSFERRING, QuarantineBlocks)):
        effects = table_in(phase).offer(TICKET, replace(LAST, first_block=1), 1.0)
        assert [type(effect) for effect in effects] == [Refused, memory, Fail]
