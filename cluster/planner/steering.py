"""What happens to a simulated fleet from outside: workers that die, change roles, come and go.

A `Steering` is asked at its own moments and answers with actions; it sees what a controller would see. `Script` follows
a list that was written before; an autoscaler decides by what it sees. Knows nothing of how actions are carried out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pdserve.proto.types import Role, WorkerLoad


@dataclass(frozen=True, slots=True)
class Fail:
    """The worker's process dies; an empty one takes its place after `back_after_s`, or none ever."""

    worker_id: str
    back_after_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Flip:
    """The worker takes no new requests, ends those that it has, and then becomes one of the other role."""

    worker_id: str
    role: Role


@dataclass(frozen=True, slots=True)
class Start:
    """One more worker of this role, after the time that its profile says it takes to start."""

    role: Role


@dataclass(frozen=True, slots=True)
class Stop:
    """The worker takes no new requests, ends those that it has, and then leaves."""

    worker_id: str


Action = Fail | Flip | Start | Stop


@dataclass(frozen=True, slots=True)
class Undone:
    """What somebody wanted at that moment and what did not happen."""

    at_s: float
    action: Action
    why: str


class Steering(Protocol):
    """Whoever changes the fleet."""

    def next_s(self) -> float:
        """When to be asked next; infinity: never again."""
        ...

    def act(self, now_s: float, loads: Sequence[WorkerLoad], num_queued: int) -> Sequence[Action]:
        """At that moment, with the last load of every live worker and the length of the router's queue.

        Of orders to one worker the last one counts. What cannot be done is ignored, and told in the end.
        """
        ...


class Script:
    """Actions at given moments."""

    def __init__(self, actions: Iterable[tuple[float, Action]] = ()) -> None:
        self._actions = sorted(actions, key=lambda one: one[0], reverse=True)

    @property
    def left(self) -> tuple[tuple[float, Action], ...]:
        """What is to happen yet, in order of time."""
        return tuple(reversed(self._actions))

    def next_s(self) -> float:
        return self._actions[-1][0] if self._actions else math.inf

    def act(self, now_s: float, loads: Sequence[WorkerLoad], num_queued: int) -> Sequence[Action]:
        due = []
        while self._actions and self._actions[-1][0] <= now_s:
            due.append(self._actions.pop()[1])
        return due
