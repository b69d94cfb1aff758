"""The prefill worker's leases: who may read which blocks, until when."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.kv_transfer.effects import FreeBlocks, Ignored, QuarantineBlocks
from pdserve.kv_transfer.lease import LeaseLapsed, LeaseState, LeaseTable, StartSend
from pdserve.proto.errors import DuplicateRequest, StaleReference, TransferFailed
from pdserve.proto.types import HandoffId, WorkerRef

LEASE_S = 10.0
TARGET = WorkerRef("decode-0", 1, "host:1")
ID = HandoffId("r", 0, 1)


def table_with_lease() -> LeaseTable:
    table = LeaseTable(LEASE_S)
    assert table.grant(ID, TARGET, (4, 2), 0.0) == ()
    return table


def test_a_released_lease_frees_its_blocks_once() -> None:
    table = table_with_lease()
    assert table.release(ID, "redeemed", 1.0) == (FreeBlocks(ID, (4, 2), False, "redeemed"),)
    (ignored,) = table.release(ID, "redeemed", 1.0)
    assert isinstance(ignored, Ignored)
    assert not table.leases


def test_release_of_another_attempt_touches_nothing() -> None:
    table = table_with_lease()
    (ignored,) = table.release(HandoffId("r", 1, 1), "redeemed", 1.0)
    assert isinstance(ignored, Ignored)
    assert ID in table.leases


def test_a_silent_decode_worker_loses_the_lease_exactly_at_expiry() -> None:
    table = table_with_lease()
    assert table.sweep(LEASE_S - 0.001) == ()
    lapsed, freed = table.sweep(LEASE_S)
    assert isinstance(lapsed, LeaseLapsed)
    assert "decode-0" in lapsed.reason
    assert freed == FreeBlocks(ID, (4, 2), False, lapsed.reason)


def test_renewal_prolongs_and_tells_what_is_lost() -> None:
    table = table_with_lease()
    other = HandoffId("other", 0, 1)
    assert table.renew([ID, other], 9.0) == (other,)
    assert table.sweep(18.9) == ()
    assert table.renew([ID], 19.0) == (ID,)  # expired, if not swept yet
    assert len(table.sweep(19.0)) == 2


@pytest.mark.parametrize("end", ["release", "abort", "lapse"])
@pytest.mark.parametrize("ok", [True, False])
def test_blocks_being_sent_are_quarantined_until_the_send_has_ended(end: str, ok: bool) -> None:
    table = table_with_lease()
    assert table.send_started(ID, 3, 0.0) == (StartSend(ID, TARGET, (4, 2), 3),)
    effects = {
        "release": lambda: table.release(ID, "gone", 1.0),
        "abort": lambda: table.abort(ID, "gone", 1.0),
        "lapse": lambda: table.sweep(LEASE_S),
    }[end]()
    assert isinstance(effects[-1], QuarantineBlocks)
    assert table.quarantined_blocks == 2
    assert table.sweep(1e9) == ()
    assert table.renew([ID], 1.0) == (ID,)
    with pytest.raises(StaleReference):
        table.send_started(ID, 4, 1.0)
    (freed,) = table.send_ended(ID, 3, ok, 2e9)
    assert isinstance(freed, FreeBlocks)
    assert freed.from_quarantine
    assert not table.leases


def test_a_failed_send_leaves_the_lease_for_another_try_on_a_newer_link() -> None:
    table = table_with_lease()
    table.send_started(ID, 3, 0.0)
    assert table.send_ended(ID, 3, False, 1.0) == ()
    assert table.leases[ID].state is LeaseState.LEASED
    (ignored,) = table.send_started(ID, 3, 1.0)
    assert isinstance(ignored, Ignored)  # a repeated Redeem must not start a second send
    with pytest.raises(StaleReference):
        table.send_started(ID, 2, 1.0)
    assert table.send_started(ID, 4, 1.0) == (StartSend(ID, TARGET, (4, 2), 4),)


def test_the_end_of_an_older_send_proves_nothing_about_the_newer() -> None:
    table = table_with_lease()
    table.send_started(ID, 3, 0.0)
    table.send_ended(ID, 3, False, 1.0)
    table.send_started(ID, 4, 1.0)
    (ignored,) = table.send_ended(ID, 3, True, 1.0)
    assert isinstance(ignored, Ignored)
    assert table.leases[ID].state is LeaseState.SENDING


def test_two_sends_at_a_time_are_refused() -> None:
    table = table_with_lease()
    table.send_started(ID, 3, 0.0)
    with pytest.raises(TransferFailed):
        table.send_started(ID, 4, 0.0)


def test_an_expired_lease_cannot_be_sent_even_before_the_sweep() -> None:
    table = table_with_lease()
    with pytest.raises(StaleReference):
        table.send_started(ID, 3, LEASE_S)


def test_granting_twice_is_idempotent_only_for_the_same_blocks() -> None:
    table = table_with_lease()
    (ignored,) = table.grant(ID, TARGET, (4, 2), 5.0)
    assert isinstance(ignored, Ignored)
    assert table.leases[ID].expires_s == LEASE_S
    with pytest.raises(DuplicateRequest):
        table.grant(ID, TARGET, (4, 3), 5.0)


def test_the_sweep_does_not_stop_at_the_first_lease_that_lives() -> None:
    table = LeaseTable(LEASE_S)
    ids = [HandoffId(str(index), 0, 1) for index in range(3)]
    for block, id in enumerate(ids):
        table.grant(id, TARGET, (block,), 0.0)
    table.renew([ids[0]], 5.0)
    assert {effect.id for effect in table.sweep(12.0)} == set(ids[1:])
    assert table.next_deadline_s == 15.0


IDS = [HandoffId(name, attempt, 1) for name in "ab" for attempt in (0, 1)]


class LeaseMachine(RuleBasedStateMachine):
    """Model: which blocks each id holds, and the epochs whose sends run. No block is used twice: double frees show."""

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable(LEASE_S)
        self.now_s = 0.0
        self.next_block = 0
        self.next_epoch = 1
        self.held: dict[HandoffId, tuple[int, ...]] = {}
        self.quarantined: set[HandoffId] = set()
        self.sending: dict[HandoffId, int] = {}
        self.freed: set[int] = set()

    def apply(self, effects: tuple[object, ...]) -> None:
        for effect in effects:
            match effect:
                case FreeBlocks(id, block_ids, from_quarantine):
                    assert id not in self.sending, "freed while the wire may read"
                    assert from_quarantine == (id in self.quarantined)
                    assert block_ids == self.held.pop(id)
                    assert not self.freed.intersection(block_ids)
                    self.freed.update(block_ids)
                    self.quarantined.discard(id)
                case QuarantineBlocks(id, block_ids):
                    assert id in self.sending
                    assert block_ids == self.held[id]
                    assert id not in self.quarantined
                    self.quarantined.add(id)
                case StartSend(id, _, block_ids, link_epoch):
                    assert id not in self.sending
                    assert id not in self.quarantined
                    assert block_ids == self.held[id]
                    self.sending[id] = link_epoch
                case LeaseLapsed(id):
                    assert id not in self.quarantined

    @rule(id=st.sampled_from(IDS), num_blocks=st.integers(1, 3))
    def grant(self, id: HandoffId, num_blocks: int) -> None:
        block_ids = tuple(range(self.next_block, self.next_block + num_blocks))
        if id in self.held:
            with pytest.raises(DuplicateRequest):
                self.table.grant(id, TARGET, block_ids, self.now_s)
            return
        self.table.grant(id, TARGET, block_ids, self.now_s)
        self.next_block += num_blocks
        self.held[id] = block_ids

    @rule(id=st.sampled_from(IDS), age=st.integers(0, 2))
    def start(self, id: HandoffId, age: int) -> None:
        epoch = max(1, self.next_epoch - age)
        self.next_epoch += age == 0
        try:
            self.apply(self.table.send_started(id, epoch, self.now_s))
        except (StaleReference, TransferFailed):
            assert id not in self.held or id in self.quarantined or id in self.sending or age or self.is_expired(id)

    def is_expired(self, id: HandoffId) -> bool:
        return self.table.leases[id].is_expired(self.now_s)

    @precondition(lambda self: self.sending)
    @rule(data=st.data(), ok=st.booleans())
    def end_send(self, data: st.DataObject, ok: bool) -> None:
        id = data.draw(st.sampled_from(sorted(self.sending, key=str)))
        epoch = self.sending.pop(id)
        self.apply(self.table.send_ended(id, epoch, ok, self.now_s))

    @rule(id=st.sampled_from(IDS), epoch=st.integers(0, 3))
    def end_some_old_send(self, id: HandoffId, epoch: int) -> None:
        if self.sending.get(id) != epoch:
            effects = self.table.send_ended(id, epoch, True, self.now_s)
            assert all(isinstance(effect, Ignored) for effect in effects)

    @rule(id=st.sampled_from(IDS))
    def release(self, id: HandoffId) -> None:
        self.apply(self.table.release(id, "redeemed", self.now_s))
        assert id not in self.held or id in self.sending

    @rule(id=st.sampled_from(IDS))
    def abort(self, id: HandoffId) -> None:
        self.apply(self.table.abort(id, "cancelled", self.now_s))
        assert id not in self.held or id in self.sending

    @rule(ids=st.lists(st.sampled_from(IDS)))
    def renew(self, ids: list[HandoffId]) -> None:
        for lost in self.table.renew(ids, self.now_s):
            assert lost not in self.held or lost in self.quarantined or self.is_expired(lost)

    @rule(elapsed_s=st.sampled_from([0.0, 1.0, LEASE_S / 2, LEASE_S]))
    def sweep(self, elapsed_s: float) -> None:
        self.now_s += elapsed_s
        self.apply(self.table.sweep(self.now_s))
        deadline_s = self.table.next_deadline_s
        assert deadline_s is None or deadline_s > self.now_s

    @invariant()
    def table_equals_model(self) -> None:
        assert {id: lease.block_ids for id, lease in self.table.leases.items()} == self.held
        states = {id: lease.state for id, lease in self.table.leases.items()}
        for id, state in states.items():
            assert (state is LeaseState.QUARANTINED) == (id in self.quarantined)
            assert (state is LeaseState.LEASED) == (id not in self.sending)

    def teardown(self) -> None:
        for id, epoch in list(self.sending.items()):
            del self.sending[id]
            self.apply(self.table.send_ended(id, epoch, True, self.now_s))
        self.apply(self.table.sweep(self.now_s + 1e9))
        assert not self.table.leases
        assert self.freed == set(range(self.next_block))


TestLeases = LeaseMachine.TestCase
TestLeases.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
