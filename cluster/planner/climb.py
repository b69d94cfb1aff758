"""Better sizes for one set-up, one step at a time (coordinate search), all judged at one rate by the same requests.

The rate is a little above what the set-up takes, where a better size shows. A round tries the steps that have not been
turned down; the best one is taken if it gains enough, and the rate goes up when it is met. Knows nothing of who runs
what it asks for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pdserve.cluster.planner.findings import Setup
from pdserve.cluster.planner.setups import Choices, neighbours

ABOVE = 1.03
GAIN = 0.97
"""The stretch of a step that is taken is at most so much of the one before."""

WORSE = 1.02
RAISE = 1.08


class Climber:
    """One set-up and the steps that are still open to it."""

    def __init__(self, setup: Setup, rate: float, choices: Choices) -> None:
        self.setup = setup
        self.rate = rate * ABOVE
        self.stretch = math.inf
        self.is_done = False
        self._choices = choices
        self._turned_down: set[str] = set()
        self._tried: list[tuple[str, Setup]] = []

    def to_try(self) -> list[Setup]:
        """The set-up as it is, and the steps from it."""
        steps = neighbours(self.setup, self._choices)
        self._tried = [("", self.setup), *((word, one) for word, one in steps if word not in self._turned_down)]
        if len(self._tried) == 1:
            self.is_done = True
            self._tried = []
        return [setup for _, setup in self._tried]

    def see(self, stretches: Sequence[float]) -> None:
        """How far each that was to be tried is from the targets."""
        if not self._tried:
            return
        before, best = stretches[0], min(range(len(stretches)), key=lambda index: (stretches[index], index))
        self._turned_down |= {
            word for (word, _), stretch in zip(self._tried, stretches, strict=True) if stretch > WORSE * before
        }
        self.stretch = min(stretches[best], before)
        if stretches[best] > GAIN * before:
            self.is_done = True
            return
        word, self.setup = self._tried[best]
        self._turned_down.add(_opposite(word))
        if stretches[best] < 1:
            # Not farther than where a queue of the same kind would be full.
            self.rate *= min(RAISE, 1 / math.sqrt(max(1e-6, stretches[best])))


def _opposite(word: str) -> str:
    if word.endswith(" up"):
        return word.removesuffix(" up") + " down"
    return word.removesuffix(" down") + " up" if word.endswith(" down") else word
