"""Virtual time: what is to happen, in order of its moment and, within one moment, of who asked first.

Knows nothing of what happens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Clock:
    """Owner of the events to come. Starts at 0."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._numbers = itertools.count()

    @property
    def next_s(self) -> float:
        """When the next event happens."""
        return self._events[0][0] if self._events else math.inf

    def at(self, moment_s: float, call: Callable[..., object], *arguments: Any) -> None:
        """Call it at that moment, which is not past."""
        heappush(self._events, (moment_s, next(self._numbers), call, arguments))

    def after(self, delay_s: float, call: Callable[..., object], *arguments: Any) -> None:
        heappush(self._events, (self.now_s + delay_s, next(self._numbers), call, arguments))

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
