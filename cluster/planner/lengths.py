"""How long prompts and answers are: constants, lognormals through two percentiles, pairs sampled from a trace.

Pairs of a trace are drawn as pairs, so that what long prompts mean for the length of their answers is kept.
Knows nothing of contexts; what does not fit one is cut where arrivals are put together.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterable, Iterator
from typing import Generic, TypeAlias, TypeVar

import numpy as np

from pdserve.cluster.arrivals import Z90, Arrival
from pdserve.cluster.planner.processes import CHUNK

T = TypeVar("T")

MAX_TOKENS = 10_000_000
MAX_PAIRS = 1 << 16

Pair: TypeAlias = tuple[int, int]
"""Prompt and output tokens."""


def sigma(p50: float, p90: float) -> float:
    """The standard deviation of the logarithm."""
    return math.log(p90 / p50) / Z90


def lognormal_mean(p50: float, p90: float) -> float:
    return p50 * math.exp(sigma(p50, p90) ** 2 / 2)


def lognormal(p50: float, p90: float, random: np.random.Generator) -> Iterator[float]:
    """Values through two percentiles; equal ones make it a constant."""
    if p50 == p90:
        yield from itertools.repeat(p50)
    spread = sigma(p50, p90)
    while True:
        yield from (p50 * np.exp(spread * random.standard_normal(CHUNK))).tolist()


def token_counts(p50: float, p90: float, random: np.random.Generator) -> Iterator[int]:
    """The same in whole tokens, at least one."""
    if p50 == p90:
        yield from itertools.repeat(max(1, round(p50)))
    spread = sigma(p50, p90)
    while True:
        drawn = np.rint(p50 * np.exp(spread * random.standard_normal(CHUNK)))
        yield from np.clip(drawn, 1, MAX_TOKENS).astype(np.int64).tolist()


class Reservoir(Generic[T]):
    """A uniform sample of a stream of any length, of `capacity` items (Li's algorithm L: few random draws)."""

    def __init__(self, capacity: int, random: np.random.Generator) -> None:
        self.items: list[T] = []
        self.num_offered = 0
        self._capacity = capacity
        self._random = random
        self._log_weight = 0.0
        self._next_taken = 0

    def offer(self, item: T) -> None:
        self.num_offered += 1
        if self.num_offered <= self._capacity:
            self.items.append(item)
            if self.num_offered == self._capacity:
                self._skip()
        elif self.num_offered == self._next_taken:
            self.items[int(self._random.integers(self._capacity))] = item
            self._skip()

    def _skip(self) -> None:
        """Draw which item is taken next."""
        self._log_weight -= float(self._random.standard_exponential()) / self._capacity
        kept_out = math.log(-math.expm1(self._log_weight))
        self._next_taken = self.num_offered + 1 + int(-float(self._random.standard_exponential()) / kept_out)


class JointLengths:
    """Pairs of lengths as a trace has them."""

    def __init__(self, arrivals: Iterable[Arrival], capacity: int = MAX_PAIRS) -> None:
        reservoir: Reservoir[Pair] = Reservoir(capacity, np.random.default_rng(0))
        for arrival in arrivals:
            reservoir.offer((arrival.num_prompt_tokens, arrival.max_tokens))
        self._prompts = array("q", (prompt for prompt, _ in reservoir.items))
        self._outputs = array("q", (output for _, output in reservoir.items))

    def __len__(self) -> int:
        return len(self._prompts)

    def pairs(self, random: np.random.Generator) -> Iterator[Pair]:
        """Drawn with replacement, for ever."""
        prompts, outputs = self._prompts, self._outputs
        while True:
            for position in random.integers(len(prompts), size=CHUNK).tolist():
                yield prompts[position], outputs[position]
