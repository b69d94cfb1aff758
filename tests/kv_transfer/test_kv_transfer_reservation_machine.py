"""The decode worker's reservations under arbitrary orders of everything that can happen: late, twice, or never."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.kv_transfer.effects import FreeBlocks, Ignored, QuarantineBlocks, Refused
from pdserve.kv_transfer.reservation import Admit, Fail, FetchPart, Phase, ReleaseHeld, TakeBlocks, Timeouts, Unreserve
from pdserve.kv_transfer.reservations import ReservationTable
from pdserve.proto.errors import DuplicateRequest
from pdserve.proto.types import HandoffId, KVLayout, KVPart, KVTicket, WorkerRef

LAYOUT = KVLayout("model", "float32", 1, 1, 1, block_size=1)
SOURCES = (WorkerRef("prefill-0", 1, "host:1"), WorkerRef("prefill-0", 2, "host:1"))
TIMEOUTS = Timeouts(reserve_s=20, room_s=20, part_s=20, transfer_s=10, renew_s=4, max_pulls=2)
LEASE_S = 30.0
POOL_BLOCKS = 8
IDS = [HandoffId(name, attempt, 1) for name in "abcd" for attempt in (0, 1)]
some_id = st.sampled_from(IDS)


@dataclass
class Use:
    """One id's life, as seen from outside. `sizes` are the blocks of each part."""

    source: WorkerRef
    sizes: tuple[int, ...]
    num_offered: int = 0
    is_reserved: bool = True
    is_over: bool = False  # admitted or failed
    admitted_s: float | None = None
    fetching: FetchPart | None = None
    verified: set[int] = field(default_factory=set)  # positions of blocks
    receiving: set[int] = field(default_factory=set)
    quarantined: set[int] = field(default_factory=set)
    held: set[int] = field(default_factory=set)

    @property
    def num_blocks(self) -> int:
        return sum(self.sizes)

    def part(self, index: int) -> KVPart:
        first = sum(self.sizes[:index])
        block_ids = tuple(range(first, first + self.sizes[index]))
        return KVPart(index, first, block_ids, block_ids, first_token=9 if index == len(self.sizes) - 1 else None)


class ReservationMachine(RuleBasedStateMachine):
    """A pool whose every block is in one place, and what has begun and ended for each id."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ReservationTable(LAYOUT, TIMEOUTS)
        self.now_s = 0.0
        self.free = set(range(POOL_BLOCKS))
        self.running: set[int] = set()
        self.next_held = 1000
        self.uses: dict[HandoffId, Use] = {}
        self.asked: list[tuple[HandoffId, int]] = []
        self.dying: WorkerRef | None = None

    def ticket(self, id: HandoffId, use: Use) -> KVTicket:
        return KVTicket(id, use.source, use.num_blocks, LAYOUT, "xxh3", LEASE_S, "host", {})

    # What the table asks for.

    def apply(self, effects: tuple[object, ...]) -> None:
        for effect in effects:
            match effect:
                case Unreserve(id, num_blocks):
                    use = self.uses[id]
                    assert use.is_reserved, "unreserved twice"
                    assert num_blocks == use.num_blocks
                    use.is_reserved = False
                case TakeBlocks(id, num_blocks):
                    assert not self.uses[id].is_over
                    self.asked.append((id, num_blocks))
                case FetchPart(id):
                    self.fetch(self.uses[id], effect)
                case QuarantineBlocks(id, block_ids):
                    use = self.uses[id]
                    assert use.fetching is not None
                    assert use.receiving == set(block_ids)
                    use.quarantined, use.receiving = use.receiving, set()
                case FreeBlocks(id, block_ids, from_quarantine):
                    use = self.uses[id]
                    assert use.fetching is None, "freed while the wire may write"
                    home = use.quarantined if from_quarantine else use.receiving
                    assert home == set(block_ids)
                    self.free |= home
                    home.clear()
                case ReleaseHeld(id, block_ids):
                    assert self.uses[id].held == set(block_ids)
                    self.uses[id].held.clear()
                case Admit(id, _, block_ids, num_held):
                    self.admit(self.uses[id], block_ids, num_held)
                case Fail(id, kind):
                    assert not self.uses[id].is_over, "ended twice"
                    assert (kind == "WorkerLost") == (self.dying == self.uses[id].source)
                    self.uses[id].is_over = True

    def fetch(self, use: Use, fetch: FetchPart) -> None:
        assert not use.is_over
        assert use.fetching is None
        assert use.receiving.union(use.held) == set(fetch.block_ids)
        assert 0 <= fetch.first < len(fetch.part.block_ids)
        use.fetching = fetch

    def admit(self, use: Use, block_ids: tuple[int, ...], num_held: int) -> None:
        assert not use.is_over, "ended twice"
        assert use.fetching is None
        assert use.num_offered == len(use.sizes)
        assert use.verified.union(range(num_held)) == set(range(use.num_blocks)), "admitted without all of its KV"
        assert (len(use.held), use.receiving) == (num_held, set(block_ids[num_held:]))
        use.is_over, use.admitted_s = True, self.now_s
        self.running |= use.receiving
        use.receiving, use.held = set(), set()

    # What happens to it.

    @precondition(lambda self: len(self.uses) < len(IDS) and len(self.table.reservations) < 3)
    @rule(
        source=st.sampled_from(SOURCES),
        sizes=st.lists(st.integers(1, 2), min_size=1, max_size=3),
        left_s=st.sampled_from([15.0, 1e9, 1e9]),
    )
    def expect(self, source: WorkerRef, sizes: list[int], left_s: float) -> None:
        id = IDS[len(self.uses)]
        self.uses[id] = Use(source, tuple(sizes))
        self.apply(self.table.expect(id, source, sum(sizes), self.now_s + left_s, self.now_s))

    def expect_again(self, id: HandoffId, source: WorkerRef) -> None:
        use = self.uses.get(id)
        if use is None or id not in self.table.reservations:
            return
        before = dict(self.table.reservations)
        try:
            self.apply(self.table.expect(id, source, use.num_blocks, self.now_s + 99.0, self.now_s))
        except DuplicateRequest:
            assert use.quarantined or source != use.source
        assert before == self.table.reservations

    @precondition(lambda self: self.uses)
    @rule(
        data=st.data(),
        behind=st.sampled_from([0, 0, 0, 0, 1, -1]),
        is_wrong=st.sampled_from([False] * 7 + [True]),
    )
    def offer(self, data: st.DataObject, behind: int, is_wrong: bool) -> None:
        """The next part, or one that came before, or one too early; or one that cannot be used."""
        id = data.draw(st.sampled_from([*self.table.reservations, *self.uses]))
        use = self.uses[id]
        index = use.num_offered - behind
        if not 0 <= index < len(use.sizes):
            return
        part = use.part(index)
        is_news = index == use.num_offered and id in self.table.reservations
        part = replace(part, block_digests=()) if is_wrong and is_news else part
        stranger = SOURCES[1 - SOURCES.index(use.source)]
        self.unchanged(self.table.offer(replace(self.ticket(id, use), source=stranger), part, self.now_s))
        was_over, is_repeated = use.is_over, index < use.num_offered
        effects = self.table.offer(self.ticket(id, use), part, self.now_s)
        refused = [effect for effect in effects if isinstance(effect, Refused)]
        assert refused or index <= use.num_offered, "a part was taken out of order"
        use.num_offered += is_news and not was_over and not refused
        self.apply(effects)
        if is_repeated or was_over:
            assert all(isinstance(effect, Ignored | Refused) for effect in effects)
        if is_repeated and use.admitted_s is not None and self.now_s < use.admitted_s + LEASE_S:
            assert not refused, "its source may not know yet"

    @precondition(lambda self: any(use.num_offered and use.is_reserved for use in self.uses.values()))
    @rule(is_refused=st.sampled_from([False, False, True]), num_held=st.integers(0, 2), is_late=st.booleans())
    def give_room(self, is_refused: bool, num_held: int, is_late: bool) -> None:
        self.apply(self.table.on_room(len(self.free), self.now_s))
        if not is_late:
            self.answer(is_refused, num_held)

    @precondition(lambda self: self.asked)
    @rule(is_refused=st.booleans(), num_held=st.integers(0, 2))
    def answer(self, is_refused: bool, num_held: int) -> None:
        asked, self.asked = self.asked, []
        for id, num_blocks in asked:
            num_held = min(num_held, num_blocks)
            if is_refused or len(self.free) < num_blocks - num_held:
                self.apply(self.table.blocks_refused(id, self.now_s))
                continue
            use = self.uses[id]
            use.held = set(range(self.next_held, self.next_held + num_held))
            self.next_held += num_held
            taken = sorted(self.free)[: num_blocks - num_held]
            self.free -= set(taken)
            use.receiving = set(taken)
            was_over = use.is_over
            self.apply(self.table.blocks_taken(id, (*sorted(use.held), *taken), num_held, self.now_s))
            assert not was_over or not (use.receiving or use.held), "blocks were dropped"

    @precondition(lambda self: any(use.fetching for use in self.uses.values()))
    @rule(
        data=st.data(), kind=st.sampled_from(["", "", "", "TransferFailed", "CorruptKV", "WorkerLost", "InternalError"])
    )
    def end_fetch(self, data: st.DataObject, kind: str) -> None:
        id = data.draw(st.sampled_from([id for id in IDS if id in self.uses and self.uses[id].fetching]))
        use = self.uses[id]
        assert use.fetching is not None
        part, first = use.fetching.part, use.fetching.first
        use.fetching = None
        if not kind:
            use.verified.update(range(part.first_block + first, part.first_block + len(part.block_ids)))
        self.apply(self.table.part_ended(id, part.index, self.now_s, kind, kind))

    @rule(
        id=some_id,
        source=st.sampled_from(SOURCES),
        what=st.sampled_from(["abort", "die", "end no fetch", "no ask", "renew", "expect", "end", "sweep", "sweep"]),
        elapsed_s=st.sampled_from([0.0, 1.0, 1.0, 5.0, 20.0]),
    )
    def disturb(self, id: HandoffId, source: WorkerRef, what: str, elapsed_s: float) -> None:
        """One rule for all that ends things or should change nothing, so that most steps make progress."""
        match what:
            case "abort":
                self.apply(self.table.abort(id, "cancelled", self.now_s))
                assert id not in self.uses or self.uses[id].is_over
            case "die":
                self.dying = source
                self.apply(self.table.peer_gone(source.worker_id, source.generation, self.now_s))
                self.dying = None
                here = self.table.reservations.values()
                assert all(entry.phase is Phase.QUARANTINED for entry in here if entry.source == source)
            case "end no fetch" if id not in self.uses or self.uses[id].fetching is None:
                self.unchanged(self.table.part_ended(id, 0, self.now_s))
            case "no ask" if not self.asked:
                self.unchanged(self.table.blocks_refused(id, self.now_s))
            case "expect":
                self.expect_again(id, source)
            case "end":  # of the sequences that run
                self.free |= self.running
                self.running = set()
            case "sweep":
                self.sweep(elapsed_s)
            case "renew":
                renewed = [id for ids in self.table.due_renewals(self.now_s).values() for id in ids]
                assert all(self.uses[id].num_offered and not self.uses[id].is_over for id in renewed)

    def unchanged(self, effects: tuple[object, ...]) -> None:
        before = (dict(self.table.reservations), set(self.free))
        self.apply(effects)
        assert before == (dict(self.table.reservations), self.free)

    def sweep(self, elapsed_s: float) -> None:
        self.now_s += elapsed_s
        self.apply(self.table.sweep(self.now_s))
        for entry in self.table.reservations.values():
            assert entry.phase is Phase.QUARANTINED or self.now_s < entry.deadline_s

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        places = [self.free, self.running]
        for use in self.uses.values():
            places += [use.receiving, use.quarantined]
        assert sorted(block for place in places for block in place) == list(range(POOL_BLOCKS))

    @invariant()
    def table_equals_model(self) -> None:
        for id, use in self.uses.items():
            entry = self.table.reservations.get(id)
            assert (entry is not None) == (not use.is_over or bool(use.fetching))
            if entry is not None:
                assert (entry.phase is Phase.QUARANTINED) == use.is_over
                assert (entry.phase in (Phase.TRANSFERRING, Phase.QUARANTINED)) == (use.fetching is not None)
                assert use.is_reserved == (entry.phase in (Phase.RESERVED, Phase.OFFERED))

    def teardown(self) -> None:
        """Let everything end: nothing may be left."""
        self.apply(self.table.sweep(self.now_s + 2e9))
        if self.asked:
            self.answer(False, 0)
        for id, use in self.uses.items():
            if use.fetching is not None:
                part, use.fetching = use.fetching.part, None
                self.apply(self.table.part_ended(id, part.index, self.now_s))
        assert not self.table.reservations
        assert all(use.is_over and not use.is_reserved and not use.held for use in self.uses.values())
        assert self.free | self.running == set(range(POOL_BLOCKS))


TestReservations = ReservationMachine.TestCase
TestReservations.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
