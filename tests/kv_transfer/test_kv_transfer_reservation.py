"""The decode worker's reservations: one end for each request, blocks that come back, deadlines that hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdserve.kv_transfer.effects import FreeBlocks, Ignored, QuarantineBlocks, Refused, raise_refusal
from pdserve.kv_transfer.reservation import (
    Admit,
    Fail,
    Phase,
    SendRelease,
    StartTransfer,
    StartVerify,
    TakeBlocks,
    Timeouts,
    Unreserve,
)
from pdserve.kv_transfer.reservations import ReservationTable
from pdserve.proto.errors import DuplicateRequest, LayoutMismatch, StaleReference
from pdserve.proto.types import HandoffId, KVLayout, KVTicket, WorkerRef

LAYOUT = KVLayout("model", "float32", 2, 2, 8, block_size=16)
SOURCE = WorkerRef("prefill-0", 3, "host:1")
TIMEOUTS = Timeouts(reserve_s=60, room_s=30, transfer_s=10, verify_s=5, renew_s=4)
ID = HandoffId("r", 0, 1)
NUM_TOKENS = 40  # three blocks
NEVER = 1e9


def ticket(id: HandoffId = ID, num_tokens: int = NUM_TOKENS) -> KVTicket:
    num_blocks = LAYOUT.num_blocks(num_tokens)
    block_ids = tuple(range(100, 100 + num_blocks))
    return KVTicket(id, SOURCE, num_tokens, LAYOUT, 9, block_ids, block_ids, 30.0, "host", {"shm": "x"})


def table_in(phase: Phase) -> ReservationTable:
    """`ID` in this phase; its request has all the time in the world."""
    table = ReservationTable(LAYOUT, TIMEOUTS)
    table.expect(ID, SOURCE, NUM_TOKENS, NEVER, 0.0)
    if phase is not Phase.RESERVED:
        assert table.offer(ticket(), 0.0) == ()
    if phase in (Phase.TRANSFERRING, Phase.VERIFYING, Phase.QUARANTINED):
        table.on_room(3, 0.0)
        table.blocks_taken(ID, (7, 5, 6), 0.0)
    if phase is Phase.VERIFYING:
        table.transfer_ended(ID, 0.0)
    if phase is Phase.QUARANTINED:
        table.abort(ID, "client left", 0.0)
    assert table.reservations[ID].phase is phase
    return table


def test_a_hand_off_that_goes_well() -> None:
    table = ReservationTable(LAYOUT, TIMEOUTS)
    assert table.expect(ID, SOURCE, NUM_TOKENS, NEVER, 0.0) == ()
    assert table.reserved_blocks == 3
    assert table.offer(ticket(), 1.0) == ()
    assert table.on_room(2, 1.0) == ()
    assert table.on_room(3, 2.0) == (TakeBlocks(ID, 3),)
    assert table.on_room(3, 2.0) == ()
    blocks = (7, 5, 6)
    assert table.blocks_taken(ID, blocks, 3.0) == (Unreserve(ID, 3), StartTransfer(ID, ticket(), blocks))
    assert table.reserved_blocks == 0
    assert table.transfer_ended(ID, 4.0) == (StartVerify(ID, ticket(), blocks),)
    assert table.verified(ID, 5.0) == (SendRelease(ID, SOURCE, "redeemed"), Admit(ID, ticket(), blocks))
    assert not table.reservations


def test_a_digest_mismatch_fails_closed() -> None:
    effects = table_in(Phase.VERIFYING).verified(ID, 1.0, "CorruptKV", "block 1 differs")
    assert effects == (
        FreeBlocks(ID, (7, 5, 6), False, "block 1 differs"),
        SendRelease(ID, SOURCE, "CorruptKV: block 1 differs"),
        Fail(ID, "CorruptKV", "block 1 differs"),
    )


def test_a_failed_transfer_gives_everything_back() -> None:
    table = table_in(Phase.TRANSFERRING)
    freed, release, fail = table.transfer_ended(ID, 1.0, "TransferFailed", "peer gone")
    assert freed == FreeBlocks(ID, (7, 5, 6), False, "peer gone")
    assert isinstance(release, SendRelease)
    assert fail == Fail(ID, "TransferFailed", "peer gone")
    assert not table.reservations


@pytest.mark.parametrize("proof", ["transfer_ended", "wire_idle"])
@pytest.mark.parametrize("end", ["abort", "deadline"])
def test_the_end_of_a_request_in_transfer_quarantines_its_blocks_until_the_wire_is_idle(end: str, proof: str) -> None:
    table = table_in(Phase.TRANSFERRING)
    effects = table.abort(ID, "client left", 1.0) if end == "abort" else table.sweep(TIMEOUTS.transfer_s)
    assert [type(effect) for effect in effects] == [QuarantineBlocks, SendRelease, Fail]
    assert table.quarantined_blocks == 3
    assert table.sweep(NEVER) == ()
    assert table.next_deadline_s is None
    (freed,) = table.transfer_ended(ID, 2.0) if proof == "transfer_ended" else table.wire_idle(ID, 2.0)
    assert isinstance(freed, FreeBlocks)
    assert freed.from_quarantine
    assert not table.reservations


@pytest.mark.parametrize(
    ("phase", "timeout_s"),
    [(Phase.RESERVED, 60), (Phase.OFFERED, 30), (Phase.TRANSFERRING, 10), (Phase.VERIFYING, 5)],
)
def test_each_phase_has_its_own_deadline_and_the_request_its_own(phase: Phase, timeout_s: float) -> None:
    table = table_in(phase)
    assert not any(isinstance(effect, Fail) for effect in table.sweep(timeout_s - 0.001))
    (fail,) = [effect for effect in table.sweep(timeout_s) if isinstance(effect, Fail)]
    assert fail.kind == "TransferFailed"
    table = ReservationTable(LAYOUT, TIMEOUTS)
    table.expect(ID, SOURCE, NUM_TOKENS, 2.0, 0.0)
    (fail,) = [effect for effect in table.sweep(2.0) if isinstance(effect, Fail)]
    assert fail.kind == "DeadlineExceeded"


@pytest.mark.parametrize(
    ("change", "ends"),
    [
        ({"source": replace(SOURCE, generation=2)}, False),
        ({"source": replace(SOURCE, worker_id="prefill-1")}, False),
        ({"id": HandoffId("r", 1, 1)}, False),
        ({"id": HandoffId("r", 0, 2)}, False),
        ({"layout": replace(LAYOUT, block_size=32)}, True),
        ({"layout": replace(LAYOUT, model_hash="other")}, True),
        ({"num_tokens": NUM_TOKENS + 1}, True),
        ({"block_ids": (1, 2)}, True),
        ({"block_digests": ()}, True),
        ({"block_digests": (1, 2, 3, 4)}, True),
        ({"lease_s": 0.0}, True),
        ({"lease_s": float("nan")}, True),
    ],
)
def test_offers_that_do_not_fit_are_refused(change: dict[str, object], ends: bool) -> None:
    table = table_in(Phase.RESERVED)
    effects = table.offer(replace(ticket(), **change), 1.0)  # type: ignore[arg-type]
    with pytest.raises(LayoutMismatch if ends else StaleReference):
        raise_refusal(effects)
    assert (ID not in table.reservations) == ends
    assert (Unreserve(ID, 3) in effects) == ends
    assert any(isinstance(effect, Fail) for effect in effects) == ends


def test_an_offer_before_it_is_expected_is_refused() -> None:
    effects = ReservationTable(LAYOUT, TIMEOUTS).offer(ticket(), 0.0)
    with pytest.raises(StaleReference):
        raise_refusal(effects)


def test_repeated_messages_change_nothing() -> None:
    table = table_in(Phase.OFFERED)
    for effects in (
        table.expect(ID, SOURCE, NUM_TOKENS, NEVER, 9.0),
        table.offer(ticket(), 9.0),
        table.transfer_ended(ID, 9.0),
        table.verified(ID, 9.0),
        table.blocks_refused(ID, 9.0),
    ):
        (ignored,) = effects
        assert isinstance(ignored, Ignored)
    assert table.reservations[ID].deadline_s == 30.0
    (refused,) = table.offer(replace(ticket(), first_token=1), 9.0)
    assert isinstance(refused, Refused)


def test_an_id_in_quarantine_cannot_be_used_again() -> None:
    with pytest.raises(DuplicateRequest):
        table_in(Phase.QUARANTINED).expect(ID, SOURCE, NUM_TOKENS, NEVER, 1.0)


def test_blocks_that_come_after_the_end_are_given_back() -> None:
    table = table_in(Phase.OFFERED)
    table.on_room(3, 1.0)
    assert Unreserve(ID, 3) in table.abort(ID, "client left", 1.0)
    (freed,) = table.blocks_taken(ID, (1, 2, 3), 2.0)
    assert isinstance(freed, FreeBlocks)
    assert freed.block_ids == (1, 2, 3)


def test_blocks_asked_for_an_earlier_use_of_the_id_are_given_back() -> None:
    table = table_in(Phase.OFFERED)
    table.on_room(3, 1.0)
    table.abort(ID, "client left", 1.0)
    table.expect(ID, SOURCE, 5, NEVER, 1.0)
    table.offer(ticket(ID, 5), 1.0)
    assert table.on_room(1, 1.0) == (TakeBlocks(ID, 1),)
    (freed,) = table.blocks_taken(ID, (1, 2, 3), 2.0)
    assert isinstance(freed, FreeBlocks)
    assert len(table.blocks_taken(ID, (4,), 2.0)) == 2


def test_room_goes_to_the_oldest_offer_and_a_large_one_is_not_overtaken() -> None:
    table = ReservationTable(LAYOUT, TIMEOUTS)
    ids = [HandoffId(name, 0, 1) for name in ("small", "large", "late")]
    sizes = dict(zip(ids, (16, 64, 16), strict=True))
    for id in ids:
        table.expect(id, SOURCE, sizes[id], NEVER, 0.0)
    for now_s, id in enumerate((ids[1], ids[0], ids[2])):
        table.offer(ticket(id, sizes[id]), float(now_s))
    assert table.on_room(3, 5.0) == ()
    assert table.on_room(5, 5.0) == (TakeBlocks(ids[1], 4), TakeBlocks(ids[0], 1))
    assert table.on_room(5, 5.0) == ()
    table.blocks_refused(ids[1], 5.0)
    assert table.on_room(5, 5.0) == (TakeBlocks(ids[1], 4),)


@pytest.mark.parametrize("phase", list(Phase))
def test_leases_are_renewed_while_their_blocks_are_wanted(phase: Phase) -> None:
    table = table_in(phase)
    assert table.due_renewals(3.9) == {}
    wanted = phase in (Phase.OFFERED, Phase.TRANSFERRING, Phase.VERIFYING)
    assert table.due_renewals(4.0) == ({SOURCE: (ID,)} if wanted else {})
    assert table.due_renewals(4.0) == {}


def test_a_short_lease_is_renewed_more_often() -> None:
    table = table_in(Phase.RESERVED)
    table.offer(replace(ticket(), lease_s=3.0), 0.0)
    assert table.next_deadline_s == 1.0
    assert table.due_renewals(1.0) == {SOURCE: (ID,)}


POOL_BLOCKS = 8
IDS = [HandoffId(name, attempt, 1) for name in "ab" for attempt in (0, 1)]


class ReservationMachine(RuleBasedStateMachine):
    """Model: a pool of blocks, each in one place, and what has begun and ended for each use of an id."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ReservationTable(LAYOUT, TIMEOUTS)
        self.now_s = 0.0
        self.free = set(range(POOL_BLOCKS))
        self.in_hand: set[int] = set()  # taken, and the table is being told
        self.receiving: dict[HandoffId, set[int]] = {}
        self.quarantined: dict[HandoffId, set[int]] = {}
        self.running: set[int] = set()
        self.reserved: dict[HandoffId, int] = {}
        self.live: set[HandoffId] = set()  # expected, neither admitted nor failed
        self.on_wire: set[HandoffId] = set()
        self.asked: list[tuple[HandoffId, int]] = []
        self.verifying: set[HandoffId] = set()

    def apply(self, effects: tuple[object, ...]) -> None:
        for effect in effects:
            match effect:
                case Unreserve(id, num_blocks):
                    assert self.reserved.pop(id) == num_blocks
                case TakeBlocks(id, num_blocks):
                    assert id in self.live
                    self.asked.append((id, num_blocks))
                case StartTransfer(id, _, block_ids):
                    assert self.in_hand == set(block_ids)
                    assert id not in self.receiving
                    assert id not in self.on_wire
                    self.receiving[id], self.in_hand = self.in_hand, set()
                    self.on_wire.add(id)
                case StartVerify(id):
                    assert id not in self.on_wire
                    self.verifying.add(id)
                case QuarantineBlocks(id, block_ids):
                    assert id in self.on_wire
                    assert self.receiving[id] == set(block_ids)
                    self.quarantined[id] = self.receiving.pop(id)
                case FreeBlocks(id, block_ids, from_quarantine) if self.in_hand:
                    assert not from_quarantine
                    assert self.in_hand == set(block_ids)
                    self.free |= self.in_hand
                    self.in_hand = set()
                case FreeBlocks(id, block_ids, from_quarantine):
                    assert id not in self.on_wire, "freed while the wire may write"
                    home = self.quarantined if from_quarantine else self.receiving
                    assert home.pop(id) == set(block_ids)
                    self.free |= set(block_ids)
                case Admit(id, _, block_ids):
                    self.live.remove(id)
                    assert id not in self.on_wire
                    assert self.receiving.pop(id) == set(block_ids)
                    self.running |= set(block_ids)
                case Fail(id):
                    self.live.remove(id)
        self.verifying &= self.live

    @rule(id=st.sampled_from(IDS), num_tokens=st.integers(1, 70), left_s=st.sampled_from([3.0, 50.0, NEVER]))
    def expect(self, id: HandoffId, num_tokens: int, left_s: float) -> None:
        known = id in self.table.reservations
        try:
            self.apply(self.table.expect(id, SOURCE, num_tokens, self.now_s + left_s, self.now_s))
        except DuplicateRequest:
            assert known
        if not known:
            self.live.add(id)
            self.reserved[id] = LAYOUT.num_blocks(num_tokens)

    @rule(id=st.sampled_from(IDS), wrong=st.sampled_from([{}, {}, {}, {"block_digests": ()}, {"first_token": 1}]))
    def offer(self, id: HandoffId, wrong: dict[str, object]) -> None:
        entry = self.table.reservations.get(id)
        offered = replace(ticket(id, entry.num_tokens if entry else 5), **wrong)  # type: ignore[arg-type]
        self.apply(self.table.offer(offered, self.now_s))

    @rule()
    def room(self) -> None:
        self.apply(self.table.on_room(len(self.free), self.now_s))

    @rule(refuse=st.booleans())
    def answer(self, refuse: bool) -> None:
        asked, self.asked = self.asked, []
        for id, num_blocks in asked:
            if refuse or len(self.free) < num_blocks:
                self.apply(self.table.blocks_refused(id, self.now_s))
                continue
            taken = sorted(self.free, reverse=True)[:num_blocks]
            self.free -= set(taken)
            self.in_hand = set(taken)
            self.apply(self.table.blocks_taken(id, taken, self.now_s))
            assert not self.in_hand, "blocks were dropped"

    @rule(data=st.data(), kind=st.sampled_from(["", "TransferFailed"]), closed=st.booleans())
    def end_transfer(self, data: st.DataObject, kind: str, closed: bool) -> None:
        id = data.draw(st.sampled_from(sorted(self.on_wire, key=str) or IDS))
        self.on_wire.discard(id)
        ended = self.table.wire_idle(id, self.now_s) if closed else self.table.transfer_ended(id, self.now_s, kind)
        self.apply(ended)

    @rule(data=st.data(), kind=st.sampled_from(["", "CorruptKV"]))
    def verified(self, data: st.DataObject, kind: str) -> None:
        id = data.draw(st.sampled_from(sorted(self.verifying, key=str) or IDS))
        effects = self.table.verified(id, self.now_s, kind)
        assert id in self.verifying or not any(isinstance(effect, Admit) for effect in effects)
        self.apply(effects)

    @rule(id=st.sampled_from(IDS))
    def abort(self, id: HandoffId) -> None:
        self.apply(self.table.abort(id, "cancelled", self.now_s))
        assert id not in self.live

    @rule()
    def sequence_ends(self) -> None:
        self.free |= self.running
        self.running.clear()

    @rule(elapsed_s=st.sampled_from([0.0, 1.0, 5.0, 30.0]))
    def sweep(self, elapsed_s: float) -> None:
        self.now_s += elapsed_s
        self.apply(self.table.sweep(self.now_s))
        self.table.due_renewals(self.now_s)
        assert (self.table.next_deadline_s or NEVER) > self.now_s

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        places = [self.free, self.running, *self.receiving.values(), *self.quarantined.values()]
        assert sum(map(len, places)) == POOL_BLOCKS
        assert set().union(*places) == set(range(POOL_BLOCKS))

    @invariant()
    def table_equals_model(self) -> None:
        table = self.table
        assert table.reserved_blocks == sum(self.reserved.values())
        assert table.quarantined_blocks == sum(map(len, self.quarantined.values()))
        dying = {id for id, entry in table.reservations.items() if entry.phase is Phase.QUARANTINED}
        assert dying == set(self.quarantined)
        assert set(table.reservations) - dying == self.live

    def teardown(self) -> None:
        self.answer(refuse=True)
        for id in list(self.on_wire):
            self.on_wire.discard(id)
            self.apply(self.table.transfer_ended(id, self.now_s))
        self.apply(self.table.sweep(self.now_s + 2 * NEVER))
        assert not self.table.reservations
        assert not self.live
        assert not self.reserved
        assert not self.receiving
        assert len(self.free) + len(self.running) == POOL_BLOCKS


TestReservations = ReservationMachine.TestCase
TestReservations.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
