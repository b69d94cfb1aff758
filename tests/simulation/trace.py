"""What happened in one simulated run: an ordered, hashable trace, counts of what occurred, and what was wrong.

Every line of the trace has a moment, a place and a sentence; the same seed must give the same lines. Knows nothing of
what the lines mean.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """One event at `time_s`, on the simulation's own clock."""

    time_s: float
    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.time_s:10.4f}  {self.place:<12} {self.text}"


class Trace:
    """Owner of the lines, the counts and the violations of one run."""

    def __init__(self, time_s: Callable[[], float]) -> None:
        self._time_s = time_s
        self.lines: list[Line] = []
        self.counts: Counter[str] = Counter()
        self.violations: list[str] = []

    def add(self, place: str, text: str) -> None:
        self.lines.append(Line(self._time_s(), place, text))

    def count(self, name: str, num: int = 1) -> None:
        self.counts[name] += num

    def violate(self, place: str, text: str) -> None:
        """A property does not hold: the run has failed."""
        self.violations.append(f"{self._time_s():.4f} {place}: {text}")
        self.add(place, f"VIOLATION: {text}")

    def digest(self) -> str:
        """Equal for equal traces, in every process."""
        state = hashlib.blake2b(digest_size=16)
        for line in self.lines:
            state.update(f"{line.time_s!r}|{line.place}|{line.text}\n".encode())
        return state.hexdigest()
