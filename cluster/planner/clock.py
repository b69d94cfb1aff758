"""Virtual time: what is to happen, in order of its moment and, within one moment, of who asked first.

Knows nothing of what happens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Clock:
    """Owner of the events to come. Starts at 0."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._num_asked = 0

    @property
    def next_s(self) -> float:
        """When the next event happens."""
        return self._events[0][0] if self._events else math.inf

    def at(self, moment_s: float, call: Callable[..., object], *arguments: Any) -> None:
        """Call it at that moment, which is not past."""
        self._num_asked = number = self._num_asked + 1
        heappush(self._events, (moment_s, number, call, arguments))

    def after(self, delay_s: float, call: Callable[..., object], *arguments: Any) -> None:
        self._num_asked = number = self._num_asked + 1
        heappush(self._events, (self.now_s + delay_s, number, call, arguments))

    def number(self) -> int:
        """A place in line, for who may ask later."""
        self._num_asked += 1
        return self._num_asked

    def at_place(self, moment_s: float, number: int, call: Callable[..., object], *arguments: Any) -> None:
        """As if it had been asked for when the place in line was taken."""
        heappush(self._events, (moment_s, number, call, arguments))

    def skip_to(self, moment_s: float) -> None:
        """Something from outside happens at that moment, before the next event."""
        assert self.now_s <= moment_s <= self.next_s
        self.now_s = moment_s

    def advance(self) -> bool:
        """Let the next event happen; whether there was one."""
        if not self._events:
            return False
        moment_s, _, call, arguments = heappop(self._events)
        self.now_s = moment_s
        call(*arguments)
        return True
