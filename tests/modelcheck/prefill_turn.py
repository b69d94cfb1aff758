"""The prefill worker's state in the model, and one step of it: the real leases with the role's hands."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from modelcheck.messages import Message, Outcome, Redeem, Told
from modelcheck.pool import Pool
from modelcheck.system import System
from modelcheck.vocabulary import NUM_BLOCKS, PREFILL, Block, BlockUse, Fault, Kind, Mark, worker_ref

from pdserve.kv_transfer.effects import FreeBlocks, QuarantineBlocks
from pdserve.kv_transfer.lease import HandoffFailed, SendKey, SendOffer, StartSend, StopPrefill

NOT_HERE = -2
WAITING = -1


@dataclass(frozen=True, slots=True)
class Send:
    request: int
    target: int
    target_generation: int
    key: SendKey
    block_ids: tuple[int, ...]
    has_read: bool = False


@dataclass(frozen=True, slots=True)
class PrefillState:
    """`sequences[r]` is how many parts the engine has computed. `computed` waits for the event loop, in order.

    `live`, `aborted` and `ended` are the worker's requests, `told` its output stream to the router.
    """

    generation: int
    blocks: tuple[Block, ...]
    sequences: tuple[int, ...]
    leases: int = 0
    computed: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    preparing: tuple[SendOffer, ...] = ()
    sends: tuple[Send, ...] = ()
    live: frozenset[int] = frozenset()
    aborted: frozenset[int] = frozenset()
    ended: frozenset[int] = frozenset()
    told: tuple[Told, ...] = ()


class Turn:
    """One step of the worker under construction."""

    def __init__(self, system: System, state: PrefillState) -> None:
        self.system = system
        self.generation = state.generation
        self.pool = Pool(system, "p0", state.blocks)
        self.sequences = list(state.sequences)
        self.leases = state.leases
        self.computed = list(state.computed)
        self.preparing = list(state.preparing)
        self.sends = list(state.sends)
        self.live = set(state.live)
        self.aborted = set(state.aborted)
        self.ended = set(state.ended)
        self.told = list(state.told)
        self.sends_out: list[Message] = []
        self.marks: list[tuple[int, Mark]] = []
        self.reply = ""
        self.notes: list[str] = []

    def outcome(self, note: str = "", kind: Kind = Kind.MUST, fault: Fault | None = None) -> Outcome:
        state = PrefillState(
            self.generation,
            tuple(self.pool.blocks),
            tuple(self.sequences),
            self.leases,
            tuple(self.computed),
            tuple(sorted(self.preparing, key=str)),
            tuple(self.sends),
            frozenset(self.live),
            frozenset(self.aborted),
            frozenset(self.ended),
            tuple(self.told),
        )
        text = "; ".join([note, *self.notes] if note else self.notes)
        return Outcome(
            state,
            text,
            kind,
            self.reply,
            tuple(self.sends_out),
            tuple(self.marks),
            broken=self.pool.broken,
            fault=fault,
        )

    def accept(self, request: int, target_generation: int) -> Outcome:
        is_refused = request in self.ended and not self.system.hands.answers_repeats
        if request in self.aborted or is_refused:
            self.reply = "StaleReference"
        elif request not in self.live and request not in self.ended:
            target = worker_ref(self.system.setting.targets[request], target_generation)
            self.reply = self.call("accept", self.system.ids[request], target, NUM_BLOCKS)
            if not self.reply:
                self.live.add(request)
                self.sequences[request] = WAITING
        return self.outcome()

    def redeem(self, redeem: Redeem) -> Outcome:
        target = worker_ref(redeem.target, redeem.target_generation)
        key = SendKey(redeem.link_epoch, redeem.part)
        self.reply = self.call("send_started", self.system.ids[redeem.request], target, key, 0)
        return self.outcome()

    def addressed(self, request: int) -> int:
        """The request that an Abort or a Release names."""
        if self.system.hands.knows_attempts:
            return request
        return max((other for other in self.live if other > request), default=request)

    def abort(self, request: int, reason: str) -> None:
        self.live.discard(request)
        self.aborted.add(request)
        self.stop_engine(request)
        self.call("abort", self.system.ids[request], reason)

    def end(self, request: int) -> None:
        if request in self.live:
            self.live.remove(request)
            if self.system.hands.remembers_ends:
                self.ended.add(request)
            self.call("abort", self.system.ids[request], "the request has ended")

    def fail(self, request: int, kind: str) -> None:
        if request in self.live:
            self.live.remove(request)
            self.abort(request, kind)
            self.told.append(Told(request, PREFILL, 0, error=kind))
            self.notes.append(f"p0 tells the router that {self.system.setting.label(request)} failed: {kind}")

    def stop_engine(self, request: int) -> None:
        self.sequences[request] = NOT_HERE
        self.pool.release(self.pool.of(request, BlockUse.RUNNING), BlockUse.RUNNING, request)

    def call(self, method: str, *arguments: Hashable, **options: Hashable) -> str:
        """A call of the real table, and what it asks for."""
        self.leases, effects, error = self.system.leases.call(self.leases, method, *arguments, **options)
        for effect in effects:
            request = self.system.requests[effect.id]
            match effect:
                case SendOffer():
                    self.preparing.append(effect)
                case StopPrefill():
                    self.stop_engine(request)
                case FreeBlocks(_, block_ids, from_quarantine):
                    use = BlockUse.QUARANTINED if from_quarantine else BlockUse.LEASED
                    self.pool.release(block_ids, use, request)
                    self.notes.append(f"p0 frees blocks {list(block_ids)}")
                case QuarantineBlocks(_, block_ids):
                    self.pool.move(block_ids, BlockUse.QUARANTINED)
                    self.notes.append(f"p0 keeps blocks {list(block_ids)} in quarantine")
                case HandoffFailed(_, kind):
                    self.fail(request, kind)
                case StartSend(_, target, key, block_ids):
                    self.sends.append(Send(request, int(target.worker_id[1:]), target.generation, key, block_ids))
        return error
