"""All actors together, and everything that may happen next.

    (router, messages, notices, faults left, marks, p0, d1, ...)   a world: small numbers, compared and hashed fast

A message in flight is delivered whenever the search likes, so messages are delayed and overtake each other at will. A
call whose answer is awaited may lose it (the caller gives up; the message may still arrive, later and unheard, or
never) or leave a copy behind. A worker that dies is back at once as its next generation, knowing nothing; those who
talk to it are told some time later. What can change nothing any more is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from modelcheck import decode, prefill, router
from modelcheck.actors import Actors
from modelcheck.decode_turn import DecodeState
from modelcheck.describe import loss_of
from modelcheck.draft import ROUTER, Draft, Step, World
from modelcheck.judge import judge_rest
from modelcheck.messages import (
    CALLS,
    Abort,
    Bytes,
    CallAnswer,
    Cancel,
    ConnectionReset,
    Expect,
    LeaseGone,
    Message,
    Offer,
    OfferAnswer,
    PeerGone,
    Prefill,
    ReadDone,
    Redeem,
    RedeemAnswer,
    Release,
    Start,
    Stimulus,
)
from modelcheck.prefill_turn import PrefillState
from modelcheck.system import System
from modelcheck.vocabulary import GARBAGE, PREFILL, Fault, Kind, Mark, worker_name

NOBODY_ANSWERED = "WorkerLost"


class Worlds:
    """Which steps lead from one world to the next."""

    def __init__(self, system: System) -> None:
        self.system = system
        self._actors = Actors(system)
        self._messages = self._actors.messages
        self._workers = self._actors.workers

    def first(self) -> World:
        setting = self.system.setting
        workers = [self._workers.number(prefill.fresh(self.system, 1))]
        for worker in range(1, setting.num_workers):
            workers.append(self._workers.number(decode.fresh(self.system, worker, 1)))
        router_state = self._actors.routers.number(router.fresh(self.system))
        return World(router_state, (), (), setting.budget, (0,) * setting.num_requests, tuple(workers))

    def worker(self, world: World, worker: int) -> Any:
        return self._workers[world.workers[worker]]

    def requests(self, world: World) -> router.RouterState:
        state: router.RouterState = self._actors.routers[world.router]
        return state

    def judge_rest(self, world: World, timers_are_left: bool) -> str:
        """What is wrong in a world without progress, or ""."""
        workers = tuple(self._workers[state] for state in world.workers)
        return judge_rest(self.system, self.requests(world), workers, world.budget, world.marks, timers_are_left)

    def steps(self, world: World) -> Iterator[Step]:
        yield from self._arrivals(world)
        for worker in range(len(world.workers)):
            yield from self._own_actions(world, worker)
        yield from self._joint_actions(world)
        yield from self._words(world)
        for notice in world.notices:
            yield self._notice(world, notice)
        previous = -1
        for number in world.messages:
            if number != previous:
                yield from self._message(world, number)
            previous = number
        yield from self._faults(world)

    # What happens.

    def _arrivals(self, world: World) -> Iterator[Step]:
        state = self.requests(world)
        request = router.startable(self.system, state)
        if request is not None:
            known = [self._known_generation(world, worker) for worker in range(len(world.workers))]
            start = Start(request, known[PREFILL], known[self.system.setting.targets[request]])
            name = self.system.setting.label(request)
            target = worker_name(self.system.setting.targets[request])
            draft = Draft(self.system, world, f"request {name} arrives, for p0 and {target}")
            legs = (PREFILL, self.system.setting.targets[request])
            if any(known[leg] != self.worker(world, leg).generation for leg in legs):
                draft.mark(request, Mark.CRASHED)
            yield self._react(draft, ROUTER, start)
        if world.budget[Fault.CANCEL]:
            for request in router.cancellable(state):
                story = f"the client of {self.system.setting.label(request)} goes away"
                draft = Draft(self.system, world, story, Kind.FAULT)
                draft.spend(Fault.CANCEL)
                yield self._react(draft, ROUTER, Cancel(request))

    def _known_generation(self, world: World, worker: int) -> int:
        """The router's picture of the fleet may be out of date."""
        generations = [generation for observer, who, generation in world.notices if (observer, who) == (ROUTER, worker)]
        return min(generations, default=int(self.worker(world, worker).generation))

    def _own_actions(self, world: World, worker: int) -> Iterator[Step]:
        for done in self._actors.actions(world.workers[worker], worker):
            fault = done.outcome.fault
            if fault is not None and not world.budget[fault]:
                continue
            draft = Draft(self.system, world, done.outcome.note, done.outcome.kind)
            if fault is not None:
                draft.spend(fault)
            draft.apply(worker, done, is_told=True)
            yield self._step(draft)

    def _joint_actions(self, world: World) -> Iterator[Step]:
        """What needs both ends at once: one-sided reads, connections that break, renewals of leases that are gone."""
        source: PrefillState = self.worker(world, PREFILL)
        for worker in range(1, len(world.workers)):
            state: DecodeState = self.worker(world, worker)
            name = worker_name(worker)
            for fetch in state.fetches:
                what = f"part {fetch.part.index} of {self.system.setting.label(fetch.request)}"
                is_there = fetch.source_generation == source.generation
                if fetch.stage == "reading":
                    read = prefill.contents(source, fetch.part.block_ids) if is_there else None
                    draft = Draft(self.system, world, f"{name} reads {what} from p0's memory")
                    yield self._react(draft, worker, ReadDone(fetch.request, fetch.part.index, read))
                elif fetch.stage == "receiving" and not is_there:
                    draft = Draft(self.system, world, f"{name} loses its connection while it receives {what}")
                    yield self._react(draft, worker, ConnectionReset(fetch.request))
            for entry in self.system.reservations[state.reservations]:
                if not entry.is_leased or entry.source.generation != source.generation:
                    continue
                if entry.id in self.system.leases.call(source.leases, "renew", (entry.id,))[1]:
                    request = self.system.requests[entry.id]
                    story = f"{name} renews the lease of {self.system.setting.label(request)} and hears that it is lost"
                    yield self._react(Draft(self.system, world, story), worker, LeaseGone(request))

    def _words(self, world: World) -> Iterator[Step]:
        """Each worker's output stream is in order; streams overtake each other."""
        for worker in range(len(world.workers)):
            state = self.worker(world, worker)
            if state.told:
                draft = Draft(self.system, world, self._actors.describe(state.told[0]))
                draft.workers[worker] = self._workers.number(replace(state, told=state.told[1:]))
                yield self._react(draft, ROUTER, state.told[0])

    def _notice(self, world: World, notice: tuple[int, int, int]) -> Step:
        observer, worker, generation = notice
        who = "the router" if observer == ROUTER else worker_name(observer)
        draft = Draft(self.system, world, f"{who} is told that {worker_name(worker)} generation {generation} is dead")
        draft.notices.remove(notice)
        return self._react(draft, observer, PeerGone(worker, generation))

    def _message(self, world: World, number: int) -> Iterator[Step]:
        message = self._messages[number >> 1]
        is_awaited = not number & 1
        kind = Kind.MUST if is_awaited else Kind.LATE
        current = self.worker(world, message.worker).generation
        said = (
            self._actors.describe(message)
            if is_awaited
            else f"{self._actors.describe(message)} (nobody waits for it any more)"
        )
        if message.generation != current and self.system.hands.checks_generation:
            is_peer_call = isinstance(message, Offer | Redeem)
            draft = Draft(self.system, world, f"{said} finds that process gone", kind, number)
            yield self._answer(draft, message, NOBODY_ANSWERED) if is_awaited else self._step(draft)
            if is_awaited and is_peer_call:
                draft = Draft(self.system, world, f"{said} is refused by the next generation", kind, number)
                yield self._answer(draft, message, "StaleReference")
        elif isinstance(message, Bytes) and not decode.is_ready(self.worker(world, message.worker), message):
            return
        else:
            draft = Draft(self.system, world, said, kind, number)
            done = self._actors.reaction(world.workers[message.worker], message.worker, message, number >> 1)
            draft.apply(message.worker, done)
            yield self._answer(draft, message, done.outcome.reply) if is_awaited else self._step(draft)
        if is_awaited:
            yield from self._message_faults(world, number, message)

    def _answer(self, draft: Draft, message: Message, reply: str) -> Step:
        """The answer to a call comes back; an offer's takes its time."""
        workers = draft.workers
        match message:
            case Expect() | Prefill():
                return self._react(draft, ROUTER, CallAnswer(message.request, reply))
            case Offer():
                if self._workers[workers[PREFILL]].generation == message.source_generation:
                    is_transient = reply == NOBODY_ANSWERED
                    answer = OfferAnswer(
                        message.request, PREFILL, message.source_generation, message.part, reply, is_transient
                    )
                    draft.messages.append(self._messages.number(answer) * 2)
            case Redeem():
                if self._workers[workers[message.target]].generation == message.target_generation:
                    answer_ = RedeemAnswer(message.request, message.part, message.link_epoch, reply)
                    return self._react(draft, message.target, answer_)
        return self._step(draft)

    # What goes wrong.

    def _message_faults(self, world: World, number: int, message: Message) -> Iterator[Step]:
        if world.budget[Fault.DUPLICATE] and not isinstance(message, OfferAnswer | Bytes):
            draft = Draft(self.system, world, f"{self._actors.describe(message)} is duplicated", Kind.FAULT)
            draft.messages.append(number | 1)
            draft.spend(Fault.DUPLICATE)
            yield self._step(draft)
        # A release is tried three times, more often than the budget can lose it.
        if not world.budget[Fault.LOSS] or isinstance(message, Release):
            return
        draft = Draft(self.system, world, loss_of(self.system.setting, message), Kind.FAULT, number)
        draft.spend(Fault.LOSS)
        if isinstance(message, Redeem | Bytes):
            draft.mark_pull_lost(message.request)
        if isinstance(message, Expect | Prefill):
            draft.mark(message.request, Mark.CALL_LOST)
        if isinstance(message, CALLS):
            draft.messages.append(number | 1)
            yield self._answer(draft, message, NOBODY_ANSWERED)
        elif isinstance(message, OfferAnswer):
            lost = OfferAnswer(
                message.request, PREFILL, message.generation, message.part, NOBODY_ANSWERED, is_transient=True
            )
            yield self._react(draft, PREFILL, lost)
        elif isinstance(message, Bytes):
            damaged = replace(message, contents=(GARBAGE,) * len(message.contents))
            yield self._react(draft, message.worker, damaged)
        else:
            assert isinstance(message, Abort)
            yield self._step(draft)

    def _faults(self, world: World) -> Iterator[Step]:
        if not world.budget[Fault.CRASH]:
            return
        for worker in range(len(world.workers)):
            yield self._crash(world, worker)

    def _crash(self, world: World, worker: int) -> Step:
        """The process dies and starts anew. What it sent stays on its way; answers to it find nobody."""
        generation = self.worker(world, worker).generation
        story = f"{worker_name(worker)} dies and is started again, as generation {generation + 1}"
        draft = Draft(self.system, world, story, Kind.FAULT)
        draft.spend(Fault.CRASH)
        system = self.system
        fresh: Any = (
            prefill.fresh(system, generation + 1) if worker == PREFILL else decode.fresh(system, worker, generation + 1)
        )
        draft.workers[worker] = self._workers.number(fresh)
        draft.messages = [
            number | _is_caller(self._messages[number >> 1], worker)
            for number in draft.messages
            if not _is_answer_to(self._messages[number >> 1], worker)
        ]
        observers = range(1, len(world.workers)) if worker == PREFILL else (PREFILL,)
        draft.messages = [number for number in draft.messages if not self._is_futile(number, worker, generation)]
        draft.notices += [(observer, worker, generation) for observer in (ROUTER, *observers)]
        for request, entry in enumerate(self.requests(world)):
            leg = entry.source_generation if worker == PREFILL else entry.target_generation
            is_leg = worker in (PREFILL, system.setting.targets[request])
            if is_leg and entry.is_started and not entry.is_over and leg == generation:
                draft.mark(request, Mark.CRASHED)
        return self._step(draft)

    def _is_futile(self, number: int, worker: int, generation: int) -> bool:
        """Whether nobody waits for this message and its addressee has died."""
        message = self._messages[number >> 1]
        is_addressee = (message.worker, message.generation) == (worker, generation)
        return bool(number & 1) and is_addressee and self.system.hands.checks_generation

    def _react(self, draft: Draft, actor: int, stimulus: Stimulus) -> Step:
        state = draft.router if actor == ROUTER else draft.workers[actor]
        draft.apply(actor, self._actors.reaction(state, actor, stimulus))
        return self._step(draft)

    def _step(self, draft: Draft) -> Step:
        draft.workers = [self._actors.without_old_words(draft.router, state) for state in draft.workers]
        return draft.step()


def _is_caller(message: Message, worker: int) -> bool:
    """Whether it is this worker that waits for the message's answer, or would repeat it."""
    match message:
        case Offer():
            return worker == PREFILL
        case Redeem(target=target):
            return worker == target
    return False


def _is_answer_to(message: Message, worker: int) -> bool:
    return isinstance(message, OfferAnswer | Bytes) and message.worker == worker
