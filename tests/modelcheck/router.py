"""The router of the model: it places requests, puts completions together, and aborts what has ended.

A completion is the real `Completion`, put together anew from what it was told (and remembered). Calls and aborts follow
the real pipeline: Expect, then Prefill; every worker that may hold something of an ended request is sent one Abort,
after its outstanding call has returned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from modelcheck.messages import (
    Abort,
    CallAnswer,
    Cancel,
    Expect,
    Message,
    Outcome,
    PeerGone,
    Prefill,
    Start,
    Stimulus,
    Told,
)
from modelcheck.system import System
from modelcheck.vocabulary import PREFILL, Fault, Kind, Mark, worker_name

from pdserve.proto.types import EventError, FinishReason, HandoffId, SequenceEvent, TokenInfo
from pdserve.router.completion import Completion


@dataclass(frozen=True, slots=True)
class Called:
    worker: int


@dataclass(frozen=True, slots=True)
class Lost:
    worker: int


@dataclass(frozen=True, slots=True)
class Request:
    """`calling` is the worker whose answer is out, or -1; `told` is what the completion has heard, until the end.

    `abort_later` are workers to be told of the end when their call has returned.
    """

    is_started: bool = False
    is_over: bool = False
    source_generation: int = 0
    target_generation: int = 0
    calling: int = -1
    told: tuple[Called | Lost | Told, ...] = ()
    abort_later: bool = False


RouterState = tuple[Request, ...]


def fresh(system: System) -> RouterState:
    return (Request(),) * system.setting.num_requests


def receive(system: System, state: RouterState, stimulus: Stimulus) -> Outcome:
    """What one answer, word or notice makes of the router."""
    match stimulus:
        case Start(request, source_generation, target_generation):
            begun = Request(True, False, source_generation, target_generation)
            return _Turn(system, state, request).start(begun)
        case CallAnswer(request, reply):
            return _Turn(system, state, request).answered(reply)
        case Told(request):
            return _Turn(system, state, request).hear(stimulus)
        case Cancel(request):
            turn = _Turn(system, state, request)
            turn.marks.append((request, Mark.CANCELLED))
            return turn.end("RequestCancelled")
        case PeerGone(worker, generation):
            return _lose(system, state, worker, generation)
    raise AssertionError(stimulus)


def startable(system: System, state: RouterState) -> int | None:
    """The next request to arrive: in order, an attempt when the one before is over."""
    for request, entry in enumerate(state):
        if not entry.is_started:
            is_due = request == 0 or not system.setting.attempts or state[request - 1].is_over
            return request if is_due else None
    return None


def cancellable(state: RouterState) -> Iterator[int]:
    return (request for request, entry in enumerate(state) if entry.is_started and not entry.is_over)


def _lose(system: System, state: RouterState, worker: int, generation: int) -> Outcome:
    """The worker's output stream breaks: each of its requests hears of it."""
    outcome = Outcome(state)
    for request, entry in enumerate(state):
        leg = entry.source_generation if worker == PREFILL else entry.target_generation
        is_here = worker in (PREFILL, system.setting.targets[request])
        if is_here and leg == generation and entry.is_started and not entry.is_over:
            after = _Turn(system, outcome.state, request).hear(Lost(worker))  # type: ignore[arg-type]
            outcome = replace(after, sends=outcome.sends + after.sends, ended=outcome.ended + after.ended)
    return outcome


class _Turn:
    """What happens to one request."""

    def __init__(self, system: System, state: RouterState, request: int) -> None:
        self.system = system
        self.state = state
        self.request = request
        self.target = system.setting.targets[request]
        self.entry = state[request]
        self.sends: list[Message] = []
        self.marks: list[tuple[int, Mark]] = []
        self.ended: tuple[tuple[int, str], ...] = ()
        self.broken = ""

    def outcome(self, note: str = "", kind: Kind = Kind.MUST, fault: Fault | None = None) -> Outcome:
        state = (*self.state[: self.request], self.entry, *self.state[self.request + 1 :])
        return Outcome(
            state,
            note,
            kind,
            sends=tuple(self.sends),
            marks=tuple(self.marks),
            ended=self.ended,
            broken=self.broken,
            fault=fault,
        )

    def start(self, begun: Request) -> Outcome:
        self.entry = begun
        self.sends.append(Expect(self.request, self.target, begun.target_generation, begun.source_generation))
        self.entry = replace(begun, calling=self.target, told=(Called(self.target),))
        return self.outcome()

    def answered(self, reply: str) -> Outcome:
        """Of Expect or Prefill, whichever was out."""
        worker = self.entry.calling
        self.entry = replace(self.entry, calling=-1)
        if self.entry.is_over:
            if self.entry.abort_later:
                self.entry = replace(self.entry, abort_later=False)
                self.abort(worker)
            return self.outcome()
        if reply:
            return self.end("Unavailable" if reply == "StaleReference" else reply)
        if worker != PREFILL:
            told = (*self.entry.told, Called(PREFILL))
            self.entry = replace(self.entry, calling=PREFILL, told=told)
            generation = self.entry.source_generation
            self.sends.append(Prefill(self.request, PREFILL, generation, self.entry.target_generation))
        return self.outcome()

    def hear(self, word: Told | Lost) -> Outcome:
        if self.entry.is_over:
            return self.outcome()
        self.entry = replace(self.entry, told=(*self.entry.told, word))
        tokens, has_ended, error, _ = _completion(self.entry.told)
        if tokens != tuple(range(len(tokens))):
            self.broken = f"S3: the client of {self.system.setting.label(self.request)} is sent tokens {tokens}"
        if error:
            return self.end(error)
        return self.end("") if has_ended else self.outcome()

    def end(self, kind: str) -> Outcome:
        """The one terminal status: "" or an error's kind."""
        assert not self.entry.is_over
        *_, holders = _completion(self.entry.told)
        self.ended = ((self.request, kind),)
        abort_later = self.entry.calling in holders
        self.entry = replace(self.entry, is_over=True, told=(), abort_later=abort_later)
        for worker in sorted(holders - {self.entry.calling}):
            self.abort(worker)
        name = self.system.setting.label(self.request)
        return self.outcome(f"the client of {name} gets {kind or 'its whole completion'}")

    def abort(self, worker: int) -> None:
        generation = self.entry.source_generation if worker == PREFILL else self.entry.target_generation
        self.sends.append(Abort(self.request, worker, generation))


@cache
def _completion(told: tuple[Called | Lost | Told, ...]) -> tuple[tuple[int, ...], bool, str, frozenset[int]]:
    """Token indices in the order of delivery, whether it has ended, the error's kind, and who may hold something."""
    completion = Completion("p0", "d", max_buffered_tokens=100)
    names = {"p0": PREFILL, "d": next((word.worker for word in told if word.worker != PREFILL), -1)}
    tokens: list[int] = []
    for word in told:
        name = "p0" if word.worker == PREFILL else "d"
        match word:
            case Called():
                completion.holders.add(name)
            case Lost():
                completion.lose(name, "it died")
            case Told():
                completion.accept(name, _event(word))
        tokens += [token.token_id for token in completion.take()]
    error = "" if completion.error is None else type(completion.error).__name__
    holders = frozenset(names[name] for name in completion.holders)
    return tuple(tokens), completion.ending is not None, error, holders


def _event(word: Told) -> SequenceEvent:
    id = HandoffId("any", 0, 1)
    if word.error:
        return SequenceEvent(id, word.index, error=EventError(word.error, "told by " + worker_name(word.worker)))
    reason = FinishReason.LENGTH if word.is_finish else None
    return SequenceEvent(id, word.index, (TokenInfo(word.index),), finish_reason=reason)
