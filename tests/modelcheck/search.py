"""Breadth-first search through every world that can be reached: the first violation found is a shortest one.

Besides the violations that single steps report, two kinds of worlds are judged: those where nothing happens any more
unless a timer fires, and those where nothing happens at all. Then it is checked that from every world an end can be
reached by progress and timers alone: where nothing else stops it, a fair run ends.
"""

from __future__ import annotations

import gc
import time
from array import array
from dataclasses import dataclass
from itertools import pairwise

from modelcheck.draft import Step, World
from modelcheck.system import Hands, System
from modelcheck.vocabulary import Kind, Setting
from modelcheck.world import Worlds


@dataclass(frozen=True, slots=True)
class Result:
    """`broken` is "" if every property holds; `trace` then is empty, else one story for each step."""

    setting: Setting
    num_worlds: int
    num_steps: int
    depth: int
    elapsed_s: float
    broken: str = ""
    trace: tuple[tuple[str, ...], ...] = ()

    @property
    def property_name(self) -> str:
        return self.broken.partition(":")[0]


class Exhausted(Exception):
    """The search went over its limit: its bounds are too wide to be exhaustive."""


class Search:
    """Owner of the worlds found so far, in the order of their discovery."""

    def __init__(self, setting: Setting, hands: Hands | None = None, max_worlds: int = 5_000_000) -> None:
        self._system = System(setting, hands or Hands())
        self._worlds = Worlds(self._system)
        self._max_worlds = max_worlds
        first = self._worlds.first()
        self._numbers: dict[World, int] = {first: 0}
        self._found: list[World] = [first]
        self._parents = array("i", [-1])
        self._edges_from = array("i")  # fair steps: progress and timers
        self._edges_to = array("i")
        self._ends: list[int] = []
        self._num_steps = 0

    def run(self) -> Result:
        """Search until something is broken or everything has been seen."""
        started_s = time.perf_counter()
        gc.disable()  # millions of tuples, no cycles: collections would only cost time
        try:
            broken, trace = self._explore()
            if not broken:
                broken, trace = self._check_progress()
        finally:
            gc.enable()
        elapsed_s = time.perf_counter() - started_s
        depth = self._depth(len(self._found) - 1)
        return Result(self._system.setting, len(self._found), self._num_steps, depth, elapsed_s, broken, trace)

    def _explore(self) -> tuple[str, tuple[tuple[str, ...], ...]]:
        number = 0
        while number < len(self._found):
            world = self._found[number]
            kinds = 0
            for step in self._worlds.steps(world):
                self._num_steps += 1
                kinds |= 1 << step.kind
                if step.broken:
                    return step.broken, (*self._trace(number), step.story)
                target = self._numbers.get(step.world)
                if target is None:
                    target = self._add(step.world, number)
                if step.kind <= Kind.TIMER and target != number:
                    self._edges_from.append(number)
                    self._edges_to.append(target)
            broken = self._judge(world, number, kinds)
            if broken:
                return broken, self._trace(number)
            number += 1
        return "", ()

    def _add(self, world: World, parent: int) -> int:
        number = len(self._found)
        if number == self._max_worlds:
            raise Exhausted(f"{self._system.setting.name}: more than {self._max_worlds} worlds")
        self._numbers[world] = number
        self._found.append(world)
        self._parents.append(parent)
        return number

    def _judge(self, world: World, number: int, kinds: int) -> str:
        """Judge a world in which no progress is left."""
        if kinds & 1 << Kind.MUST:
            return ""
        timers_are_left = bool(kinds & 1 << Kind.TIMER)
        if not timers_are_left:
            self._ends.append(number)
        return self._worlds.judge_rest(world, timers_are_left)

    def _check_progress(self) -> tuple[str, tuple[tuple[str, ...], ...]]:
        """Walk back from the ends along fair steps: who is never met cannot end."""
        num_worlds = len(self._found)
        starts = array("i", bytes(4 * (num_worlds + 1)))
        for target in self._edges_to:
            starts[target + 1] += 1
        for number in range(num_worlds):
            starts[number + 1] += starts[number]
        sources, fill = array("i", bytes(4 * len(self._edges_to))), array("i", starts)
        for source, target in zip(self._edges_from, self._edges_to, strict=True):
            sources[fill[target]] = source
            fill[target] += 1
        can_end = bytearray(num_worlds)
        todo = list(self._ends)
        for number in todo:
            can_end[number] = 1
        while todo:
            number = todo.pop()
            for source in sources[starts[number] : starts[number + 1]]:
                if not can_end[source]:
                    can_end[source] = 1
                    todo.append(source)
        stuck = can_end.find(0)
        return ("", ()) if stuck < 0 else ("L1: from here no end can be reached", self._trace(stuck))

    def _depth(self, number: int) -> int:
        depth = 0
        while (number := self._parents[number]) >= 0:
            depth += 1
        return depth

    def _trace(self, number: int) -> tuple[tuple[str, ...], ...]:
        """The stories of the steps from the first world to this one."""
        path = [number]
        while (number := self._parents[number]) >= 0:
            path.append(number)
        path.reverse()
        stories = []
        for before, after in pairwise(path):
            step = self._step_to(self._found[before], self._found[after])
            stories.append(step.story)
        return tuple(stories)

    def _step_to(self, before: World, after: World) -> Step:
        return next(step for step in self._worlds.steps(before) if step.world == after)
