"""The prefill worker's leases under arbitrary orders of everything that can happen to them: late, twice, or never."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.kv_transfer.effects import FreeBlocks, QuarantineBlocks
from pdserve.kv_transfer.lease import (
    HandoffFailed,
    LeaseState,
    LeaseTimes,
    SendKey,
    SendOffer,
    StartSend,
    StopPrefill,
)
from pdserve.kv_transfer.leases import LeaseTable
from pdserve.proto.errors import DuplicateRequest, StaleReference
from pdserve.proto.types import HandoffId, WorkerRef

TIMES = LeaseTimes(lease_s=10.0, retry_s=1.0)
TARGETS = (WorkerRef("decode-0", 1, "host:1"), WorkerRef("decode-0", 2, "host:1"), WorkerRef("decode-1", 1, "host:2"))
IDS = [HandoffId("a", 0, 1), HandoffId("a", 1, 1), HandoffId("b", 0, 1)]
NUM_PARTS = 3
some_id = st.sampled_from(IDS)


@dataclass
class Use:
    """One id's life, as seen from outside."""

    target: WorkerRef
    parts: list[tuple[int, ...]] = field(default_factory=list)  # those that the engine has finished
    num_heard: int = 0  # of them, those that the table was told of
    is_stopped: bool = False
    num_offered: int = 0  # parts offered at least once
    num_accepted: int = 0
    is_over: bool = False
    is_quarantined: bool = False
    has_failed: bool = False
    sends: dict[SendKey, tuple[int, ...]] = field(default_factory=dict)  # those that may read
    newest: SendKey | None = None


class LeaseMachine(RuleBasedStateMachine):
    """Every block is used once, so that a double free shows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable(TIMES)
        self.now_s = 0.0
        self.num_blocks = 0
        self.freed: set[int] = set()
        self.uses: dict[HandoffId, Use] = {}

    # What the table asks for.

    def apply(self, effects: tuple[object, ...]) -> None:
        for effect in effects:
            match effect:
                case FreeBlocks(id, block_ids, from_quarantine):
                    self.free(self.uses[id], block_ids, from_quarantine)
                case QuarantineBlocks(id, block_ids):
                    use = self.uses[id]
                    assert use.sends, "quarantined though nothing reads"
                    assert set(block_ids) == {block for part in use.parts[: use.num_heard] for block in part}
                    assert not use.is_over
                    use.is_over = use.is_quarantined = True
                case StartSend(id, target, key, block_ids):
                    use = self.uses[id]
                    assert not use.is_over
                    assert target == use.target
                    assert block_ids == use.parts[key.part][-len(block_ids) :]
                    assert not self.freed.intersection(block_ids)
                    use.sends[key], use.newest = block_ids, key
                case SendOffer(id):
                    self.offered(self.uses[id], effect)
                case StopPrefill(id):
                    self.uses[id].is_stopped = True
                case HandoffFailed(id):
                    assert not self.uses[id].has_failed
                    self.uses[id].has_failed = True

    def free(self, use: Use, block_ids: tuple[int, ...], from_quarantine: bool) -> None:
        assert not self.freed.intersection(block_ids), "freed twice"
        reading = {block for blocks in use.sends.values() for block in blocks}
        assert not reading.intersection(block_ids), "freed while a send reads"
        assert use.is_stopped or len(use.parts) == NUM_PARTS, "freed while the engine computes on top of it"
        assert not from_quarantine or use.is_quarantined
        use.is_over = True
        self.freed.update(block_ids)

    def offered(self, use: Use, offer: SendOffer) -> None:
        assert not use.is_over
        assert offer.part == use.num_accepted, "offered out of order"
        assert offer.part < use.num_heard
        assert offer.block_ids == use.parts[offer.part]
        assert offer.first_block == sum(len(part) for part in use.parts[: offer.part])
        assert (offer.first_token is not None) == (offer.part == NUM_PARTS - 1)
        use.num_offered = offer.part + 1

    # What happens to it.

    def accept(self, id: HandoffId, worker: WorkerRef) -> None:
        use = self.uses.get(id)
        if use is None:
            self.uses[id] = Use(worker)
            assert self.table.accept(id, worker, 99, self.now_s) == ()
        elif id in self.table.leases and (use.is_quarantined or use.target != worker):
            with pytest.raises(DuplicateRequest):
                self.table.accept(id, worker, 99, self.now_s)
        elif id in self.table.leases:
            self.apply(self.table.accept(id, worker, 99, self.now_s))

    @rule(id=some_id, worker=st.sampled_from(TARGETS), num_blocks=st.integers(1, 3), is_heard=st.booleans())
    def compute(self, id: HandoffId, worker: WorkerRef, num_blocks: int, is_heard: bool) -> None:
        """The engine finishes a part; the table hears of it now or later."""
        if id not in self.uses:
            self.accept(id, worker)
        use = self.uses[id]
        if not use.is_stopped and len(use.parts) < NUM_PARTS:
            use.parts.append(tuple(range(self.num_blocks, self.num_blocks + num_blocks)))
            self.num_blocks += num_blocks
        if is_heard:
            self.hear(id)

    @rule(id=some_id)
    def hear(self, id: HandoffId) -> None:
        use = self.uses.get(id)
        if use is not None and use.num_heard < len(use.parts):
            block_ids = use.parts[use.num_heard]
            use.num_heard += 1
            first_token = 7 if use.num_heard == NUM_PARTS else None
            was_over = use.is_over
            effects = self.table.part_computed(id, block_ids, first_token, self.now_s)
            self.apply(effects)
            assert not was_over or self.freed.issuperset(block_ids)

    @precondition(lambda self: any(use.parts for use in self.uses.values()))
    @rule(
        id=some_id,
        ahead=st.sampled_from([0, 0, 0, -1, 1]),
        outcome=st.sampled_from(["", "", "", "StaleReference", "silence"]),
    )
    def answer(self, id: HandoffId, ahead: int, outcome: str) -> None:
        """An answer to some offer, possibly an old one, or one to an offer that was never made."""
        use = self.uses.get(id)
        part = ahead + (use.num_accepted if use is not None else 0)
        is_awaited = use is not None and self.table.is_offering(id, part)
        is_silence = outcome == "silence"
        if use is not None and is_awaited and not outcome:
            use.num_accepted += 1
        effects = self.table.offer_ended(
            id, part, self.now_s, "WorkerLost" if is_silence else outcome, "told", is_transient=is_silence
        )
        self.apply(effects)
        if outcome and not is_silence and is_awaited:
            assert use is not None
            assert use.has_failed
            assert use.is_over
        if not is_awaited:
            assert not any(isinstance(effect, SendOffer | FreeBlocks) for effect in effects)

    @precondition(lambda self: any(use.parts for use in self.uses.values()))
    @rule(
        id=some_id,
        epoch=st.integers(0, 2),
        part=st.sampled_from([0, 0, 1, 1, 2, 3, -1]),
        first=st.sampled_from([0, 0, 1, -1]),
    )
    def redeem(self, id: HandoffId, epoch: int, part: int, first: int) -> None:
        newest = self.uses[id].newest if id in self.uses else None
        key = SendKey(epoch + (newest.link_epoch - 1 if newest is not None else 1), part)
        target = self.uses[id].target if id in self.uses else TARGETS[0]
        with pytest.raises(StaleReference):
            self.table.send_started(id, target._replace(generation=9), key, first, self.now_s)
        try:
            self.apply(self.table.send_started(id, target, key, first, self.now_s))
        except StaleReference:
            pass
        else:
            assert self.uses[id].newest == key

    @precondition(lambda self: any(use.sends for use in self.uses.values()))
    @rule(data=st.data())
    def end_send(self, data: st.DataObject) -> None:
        running = [(id, key) for id, use in self.uses.items() for key in use.sends]
        id, key = data.draw(st.sampled_from(running))
        del self.uses[id].sends[key]
        self.apply(self.table.send_ended(id, key, self.now_s))

    @rule(
        id=some_id,
        worker=st.sampled_from(TARGETS),
        what=st.sampled_from(["release", "abort", "die", "accept", "renew", "end no send"]),
        number=st.integers(1, 3),
    )
    def disturb(self, id: HandoffId, worker: WorkerRef, what: str, number: int) -> None:
        """One rule for all that ends things or should change nothing, so that most steps make progress."""
        match what:
            case "release" | "abort":
                self.end(id, what == "abort")
            case "die":
                self.die(worker)
            case "accept":
                self.accept(id, worker)
            case "renew":
                self.renew(IDS[:number])
            case "end no send":
                self.end_a_send_that_does_not_run(id, SendKey(number, 0))

    def end(self, id: HandoffId, is_abort: bool) -> None:
        use = self.uses.get(id)
        self.apply((self.table.abort if is_abort else self.table.release)(id, "ended", self.now_s))
        if use is not None:
            use.is_over = True
            assert use.is_stopped or use.num_heard == NUM_PARTS

    def die(self, worker: WorkerRef) -> None:
        spared = {id: lease for id, lease in self.table.leases.items() if lease.target != worker}
        self.apply(self.table.peer_gone(worker.worker_id, worker.generation, self.now_s))
        for use in self.uses.values():
            if use.target == worker:
                assert use.is_over or use.has_failed
                use.is_over = True
        assert {id: lease for id, lease in self.table.leases.items() if lease.target != worker} == spared

    def renew(self, ids: list[HandoffId]) -> None:
        lost = self.table.renew(ids, self.now_s)
        live = {id for id, lease in self.table.leases.items() if lease.is_live and not lease.is_expired(self.now_s)}
        assert set(ids) - set(lost) == live.intersection(ids)

    def end_a_send_that_does_not_run(self, id: HandoffId, key: SendKey) -> None:
        if id not in self.uses or key not in self.uses[id].sends:
            before = dict(self.table.leases)
            self.apply(self.table.send_ended(id, key, self.now_s))
            assert before == self.table.leases

    @rule(elapsed_s=st.sampled_from([0.0, TIMES.retry_s, TIMES.retry_s, TIMES.lease_s / 2, TIMES.lease_s]))
    def sweep(self, elapsed_s: float) -> None:
        self.now_s += elapsed_s
        self.apply(self.table.sweep(self.now_s))
        assert not any(lease.is_expired(self.now_s) for lease in self.table.leases.values())

    @invariant()
    def table_equals_model(self) -> None:
        for id, lease in self.table.leases.items():
            use = self.uses[id]
            assert set(lease.running) == set(use.sends)
            assert (lease.state is LeaseState.QUARANTINED) == use.is_quarantined
            assert use.sends or lease.state in (LeaseState.ACCEPTED, LeaseState.LEASED)
            assert not self.freed.intersection(lease.block_ids)
            assert lease.num_accepted <= use.num_offered
        for id, use in self.uses.items():
            assert not use.sends or id in self.table.leases, "forgotten while a send reads"

    def teardown(self) -> None:
        for id, use in self.uses.items():
            for key in list(use.sends):
                del use.sends[key]
                self.apply(self.table.send_ended(id, key, self.now_s))
            self.apply(self.table.abort(id, "the end", self.now_s))
            while use.num_heard < len(use.parts):
                self.hear(id)
        assert not self.table.leases
        assert self.freed == set(range(self.num_blocks))


TestLeases = LeaseMachine.TestCase
TestLeases.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
