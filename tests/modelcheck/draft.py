"""A world under construction: the parts that one step changes, and the story that it tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from modelcheck.judge import judge_end
from modelcheck.messages import Outcome
from modelcheck.system import System
from modelcheck.vocabulary import Fault, Kind, Mark

ROUTER = -1


class World(NamedTuple):
    """`messages` are numbers of messages, doubled, plus one for those that nobody waits for; sorted. `notices` are
    (observer, worker, generation). Actors are numbers of their states."""

    router: int
    messages: tuple[int, ...]
    notices: tuple[tuple[int, int, int], ...]
    budget: tuple[int, ...]
    marks: tuple[int, ...]
    workers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that may happen: its parts tell the story, `broken` is a property that it violates, or ""."""

    kind: Kind
    world: World
    story: tuple[str, ...]
    broken: str


@dataclass(frozen=True, slots=True)
class Done:
    """An outcome in numbers."""

    outcome: Outcome
    state: int
    sends: tuple[int, ...]


class Draft:
    """Made from a world, changed, and turned into a step."""

    __slots__ = ("broken", "budget", "kind", "marks", "messages", "notices", "router", "story", "system", "workers")

    def __init__(self, system: System, world: World, story: str, kind: Kind = Kind.MUST, without: int = -1) -> None:
        """`without` is a message that is on its way no more."""
        self.system = system
        self.kind = kind
        self.story = [story]
        self.broken = ""
        self.router = world.router
        self.messages = list(world.messages)
        if without >= 0:
            self.messages.remove(without)
        self.notices = list(world.notices)
        self.budget = world.budget
        self.marks = world.marks
        self.workers = list(world.workers)

    def apply(self, actor: int, done: Done, is_told: bool = False) -> None:
        """`actor` reacts. `is_told`: its note is the story already."""
        outcome = done.outcome
        if actor == ROUTER:
            self.router = done.state
        else:
            self.workers[actor] = done.state
        self.messages += done.sends
        for request, mark in outcome.marks:
            self.mark(request, mark)
        if outcome.broken and not self.broken:
            self.broken = outcome.broken
        for request, kind in outcome.ended:
            if not self.broken:
                self.broken = judge_end(self.system, request, kind, self.marks[request])
            self._set_mark(request, 0)  # nothing is judged by them any more
        if outcome.note and not is_told:
            self.story.append(outcome.note)

    def spend(self, fault: Fault) -> None:
        self.budget = (*self.budget[:fault], self.budget[fault] - 1, *self.budget[fault + 1 :])

    def mark(self, request: int, mark: Mark) -> None:
        self._set_mark(request, self.marks[request] | mark)

    def mark_pull_lost(self, request: int) -> None:
        """One lost pull is made good by the next; two of one request may be of one part."""
        is_second = self.marks[request] & Mark.PULL_LOST
        self.mark(request, Mark.PULLS_LOST if is_second else Mark.PULL_LOST)

    def step(self) -> Step:
        self.messages.sort()
        self.notices.sort()
        world = World(
            self.router, tuple(self.messages), tuple(self.notices), self.budget, self.marks, tuple(self.workers)
        )
        return Step(self.kind, world, tuple(self.story), self.broken)

    def _set_mark(self, request: int, marks: int) -> None:
        self.marks = (*self.marks[:request], marks, *self.marks[request + 1 :])
