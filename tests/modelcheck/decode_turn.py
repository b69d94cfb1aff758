"""The decode worker's state in the model, and one step of it: the real reservations with the role's hands."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from modelcheck.messages import Bytes, Message, Offer, Outcome, Redeem, Release, Told
from modelcheck.pool import Pool
from modelcheck.system import System
from modelcheck.tables import NOWHERE
from modelcheck.vocabulary import (
    FIRST_TOKEN,
    LAYOUT,
    NUM_BLOCKS,
    PREFILL,
    Block,
    BlockUse,
    Kind,
    Mark,
    content_of,
    worker_name,
    worker_ref,
)

from pdserve.kv_transfer.effects import FreeBlocks, QuarantineBlocks, Refused
from pdserve.kv_transfer.reservation import (
    Admit,
    Fail,
    FetchPart,
    ReleaseHeld,
    SendRelease,
    TakeBlocks,
    Unreserve,
)
from pdserve.proto.types import KVPart, KVTicket

LEASE_S = 10.0


@dataclass(frozen=True, slots=True)
class Fetch:
    """`stage`: queued for the link, redeeming, receiving (posted), reading (one-sided)."""

    request: int
    part: KVPart
    block_ids: tuple[int, ...]
    source_generation: int
    stage: str = "queued"
    link_epoch: int = 0


@dataclass(frozen=True, slots=True)
class DecodeState:
    """`asks` wait for the pool's answer. `link_epoch` is that of the open link, or 0; `link_generation` whose it is."""

    worker: int
    generation: int
    blocks: tuple[Block, ...]
    reservations: int = 0
    reserved: int = 0
    asks: tuple[int, ...] = ()
    fetches: tuple[Fetch, ...] = ()
    link_generation: int = 1
    link_epoch: int = 0
    num_epochs: int = 0
    running: frozenset[int] = frozenset()
    live: frozenset[int] = frozenset()
    aborted: frozenset[int] = frozenset()
    ended: frozenset[int] = frozenset()
    told: tuple[Told, ...] = ()


class Turn:
    """One step of the worker under construction."""

    def __init__(self, system: System, state: DecodeState) -> None:
        self.system = system
        self.worker, self.generation = state.worker, state.generation
        self.pool = Pool(system, worker_name(state.worker), state.blocks)
        self.reservations = state.reservations
        self.reserved = state.reserved
        self.asks = list(state.asks)
        self.fetches = list(state.fetches)
        self.link_generation, self.link_epoch = state.link_generation, state.link_epoch
        self.num_epochs = state.num_epochs
        self.running = set(state.running)
        self.live = set(state.live)
        self.aborted = set(state.aborted)
        self.ended = set(state.ended)
        self.told = list(state.told)
        self.sends_out: list[Message] = []
        self.marks: list[tuple[int, Mark]] = []
        self.reply = ""
        self.notes: list[str] = []

    def outcome(self, note: str = "", kind: Kind = Kind.MUST) -> Outcome:
        self.call("on_room", len(self.pool.free))
        self.start_fetch()
        state = DecodeState(
            self.worker,
            self.generation,
            tuple(self.pool.blocks),
            self.reservations,
            self.reserved,
            tuple(self.asks),
            tuple(self.fetches),
            self.link_generation,
            self.link_epoch,
            self.num_epochs,
            frozenset(self.running),
            frozenset(self.live),
            frozenset(self.aborted),
            frozenset(self.ended),
            tuple(self.told),
        )
        text = "; ".join([note, *self.notes] if note else self.notes)
        return Outcome(state, text, kind, self.reply, tuple(self.sends_out), tuple(self.marks), broken=self.pool.broken)

    @property
    def name(self) -> str:
        return worker_name(self.worker)

    # What the router and the source ask.

    def expect(self, request: int, source_generation: int) -> None:
        is_refused = request in self.ended and not self.system.hands.answers_repeats
        if request in self.aborted or is_refused:
            self.reply = "StaleReference"
        elif request not in self.live and request not in self.ended:
            source = worker_ref(PREFILL, source_generation)
            self.reply = self.call("expect", self.system.ids[request], source, NUM_BLOCKS, request_deadline_s=100.0)
            if not self.reply:
                self.live.add(request)
                self.reserved += NUM_BLOCKS

    def offer(self, offer: Offer) -> None:
        source = worker_ref(PREFILL, offer.source_generation)
        id = self.system.ids[offer.request]
        ticket = KVTicket(id, source, NUM_BLOCKS, LAYOUT, "contents", LEASE_S, "host", NOWHERE)
        first_token = FIRST_TOKEN if offer.is_last else None
        self.call("offer", ticket, KVPart(offer.part, offer.first_block, offer.block_ids, offer.digests, first_token))

    def addressed(self, request: int) -> int:
        """The request that an Abort names."""
        if self.system.hands.knows_attempts:
            return request
        return max((other for other in self.live if other > request), default=request)

    def abort(self, request: int, reason: str) -> None:
        self.live.discard(request)
        self.aborted.add(request)
        if request in self.running:
            self.running.remove(request)
            self.pool.release(self.pool.of(request, BlockUse.RUNNING), BlockUse.RUNNING, request)
        self.call("abort", self.system.ids[request], reason)

    def fail(self, request: int, kind: str) -> None:
        if request in self.live:
            self.live.remove(request)
            self.abort(request, kind)
            self.told.append(Told(request, self.worker, 0, error=kind))
            self.notes.append(f"{self.name} tells the router that {self.system.setting.label(request)} failed: {kind}")

    # The link.

    def fetch_of(self, request: int, part: int) -> Fetch:
        return next(
            fetch
            for fetch in self.fetches
            if (fetch.request, fetch.part.index) == (request, part) and fetch.stage != "queued"
        )

    def start_fetch(self) -> None:
        """The next transfer has the link to itself; it opens one if need be."""
        if not self.fetches or any(fetch.stage != "queued" for fetch in self.fetches):
            return
        fetch = self.fetches[0]
        if fetch.source_generation < self.link_generation and self.system.hands.checks_generation:
            self.end_fetch(fetch, "StaleReference")
            return
        if fetch.source_generation > self.link_generation:
            self.link_generation, self.link_epoch = fetch.source_generation, 0
        if self.link_epoch == 0:
            self.num_epochs = self.num_epochs + 1 if self.system.hands.renews_links else 1
            self.link_epoch = self.num_epochs
        stage = "reading" if self.system.setting.one_sided else "redeeming"
        self.fetches[0] = replace(fetch, stage=stage, link_epoch=self.link_epoch)
        what = f"part {fetch.part.index} of {self.system.setting.label(fetch.request)}"
        self.notes.append(f"{self.name} wants {what}, on link {self.link_epoch}")
        if stage == "redeeming":
            where = (PREFILL, fetch.source_generation, self.worker, self.generation)
            self.sends_out.append(Redeem(fetch.request, *where, fetch.part.index, self.link_epoch))

    def redeemed(self, request: int, part: int, link_epoch: int, reply: str) -> None:
        fetch = self.fetch_of(request, part)
        if not reply:
            self.fetches[self.fetches.index(fetch)] = replace(fetch, stage="receiving")
        else:  # a refusal for being stale leaves the link as it was; nothing else does
            self.end_fetch(fetch, reply, fails_link=reply != "StaleReference")

    def land(self, message: Bytes) -> None:
        """Bytes on the open link go to the transfer that is posted there, if its header names the same."""
        fetch = next((fetch for fetch in self.fetches if fetch.stage == "receiving"), None)
        if fetch is None or (message.link_epoch, self.link_epoch) != (fetch.link_epoch, fetch.link_epoch):
            self.notes.append("the link is closed: they are lost")
        elif (message.request, message.part) != (fetch.request, fetch.part.index):
            self.notes.append("they are another transfer's than the one that is posted")
            self.end_fetch(fetch, "StaleReference", fails_link=True)
        else:
            self.write(fetch, message.contents, message.request)

    def write(self, fetch: Fetch, contents: tuple[int, ...], request: int) -> None:
        """They land, whoever owns the blocks now, and are verified as they were offered."""
        first = fetch.part.first_block
        block_ids = fetch.block_ids[first : first + len(contents)]
        for block_id, content in zip(block_ids, contents, strict=True):
            block = self.pool.blocks[block_id]
            if block.owner != request or block.use not in (BlockUse.RECEIVING, BlockUse.QUARANTINED):
                what = f"KV of {self.system.setting.label(request)} lands in block {block_id} of {self.name}"
                self.pool.break_("S4", f"{what}: {self.pool.describe(block_id)}")
            self.pool.write(block_id, content)
        is_right = contents == fetch.part.block_digests or not self.system.hands.checks_digests
        self.notes.append("digests match" if is_right else "digests do not match")
        self.end_fetch(fetch, "" if is_right else "CorruptKV", fails_link=not is_right)

    def end_fetch(self, fetch: Fetch, kind: str, fails_link: bool = False) -> None:
        self.fetches.remove(fetch)
        if fails_link:
            self.link_epoch = 0
        self.call("part_ended", self.system.ids[fetch.request], fetch.part.index, error_kind=kind)

    # The table and the pool.

    def call(self, method: str, *arguments: Hashable, **options: Hashable) -> str:
        """A call of the real table, and what it asks for."""
        self.reservations, effects, error = self.system.reservations.call(
            self.reservations, method, *arguments, **options
        )
        for effect in effects:
            self.carry_out(effect, self.system.requests[effect.id])
        return error

    def carry_out(self, effect: object, request: int) -> None:
        match effect:
            case TakeBlocks():
                self.asks.append(request)
                self.notes.append(f"{self.name} has room for the blocks of {self.system.setting.label(request)}")
            case FetchPart(_, ticket, part, _, block_ids):
                self.fetches.append(Fetch(request, part, block_ids, ticket.source.generation))
            case Unreserve(_, num_blocks):
                self.reserved -= num_blocks
                if self.reserved < 0:
                    self.pool.break_("L2", f"{self.name} ends a reservation of {num_blocks} blocks twice")
            case SendRelease(_, source, outcome):
                self.sends_out.append(Release(request, PREFILL, source.generation, outcome))
            case FreeBlocks(_, block_ids, from_quarantine):
                self.pool.release(block_ids, BlockUse.QUARANTINED if from_quarantine else BlockUse.RECEIVING, request)
                self.notes.append(f"{self.name} frees blocks {list(block_ids)}")
            case QuarantineBlocks(_, block_ids):
                self.pool.move(block_ids, BlockUse.QUARANTINED)
                self.notes.append(f"{self.name} keeps blocks {list(block_ids)} in quarantine")
            case Fail(_, kind):
                self.fail(request, kind)
            case Admit(_, _, block_ids):
                self.admit(request, block_ids)
            case Refused(_, kind):
                self.reply = kind
            case ReleaseHeld():
                raise AssertionError("the model holds no prefix")

    def admit(self, request: int, block_ids: tuple[int, ...]) -> None:
        self.notes.append(f"{self.name} admits {self.system.setting.label(request)}")
        if request not in self.live:
            self.pool.break_("S6", f"{self.name} admits {self.system.setting.label(request)}, which has ended")
        self.pool.move(block_ids, BlockUse.RUNNING)
        self.running.add(request)
        self.check_kv(request, "admits")

    def check_kv(self, request: int, verb: str) -> None:
        """S1: exactly the KV of this request and attempt, all of it."""
        found = self.pool.contents(self.pool.of(request, BlockUse.RUNNING))
        expected = tuple(content_of(request, position) for position in range(NUM_BLOCKS))
        if found != expected:
            wrong = [position for position in range(len(found)) if found[position] != expected[position]]
            self.pool.break_(
                "S1", f"{self.name} {verb} {self.system.setting.label(request)} with wrong KV in block {wrong}"
            )
