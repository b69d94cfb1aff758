"""The runs of one search for a goodput: each with its own seed, counted against a budget, and judged together by rate.

Runs share no seeds. Common random numbers would sharpen differences between rates, but they tie the errors on both
sides of the boundary together, and it is the level that is asked for. Decides nothing about which rates to run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pdserve.cluster.planner.attainment import Attainment, Outcomes, measure
from pdserve.cluster.planner.stationarity import Stationarity, check_stationarity
from pdserve.proto.errors import ConfigError

Run = Callable[[float, int, int], Outcomes]
"""`run(rate, seed, num_requests)`: the simulator."""


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """All that is known of one rate: `overall`, and the attainment of each class that has a target of its own."""

    stationarity: Stationarity
    overall: Attainment
    by_class: tuple[Attainment, ...]


class Probes:
    """`num_classes` is 1 where one target is for all requests, whatever class they are of."""

    def __init__(self, run: Run, seed: int, max_requests: int, num_classes: int) -> None:
        self._run = run
        self._seed = seed
        self.classes: tuple[int | None, ...] = (None,) if num_classes == 1 else tuple(range(num_classes))
        self.left = max_requests
        self.num_requests = 0
        self.runs: list[tuple[float, Outcomes]] = []

    def add(self, rate: float, num_requests: int) -> Outcomes:
        seed = int(np.random.SeedSequence((self._seed, len(self.runs))).generate_state(1)[0])
        outcomes = self._run(rate, seed, num_requests)
        if len(outcomes) != num_requests:
            raise ConfigError(
                f"run: {num_requests} requests were asked for, {len(outcomes)} came; "
                "give a workload that goes on for as long as it is asked to"
            )
        if len(self.classes) > 1 and outcomes.slo_class is None:
            raise ConfigError(
                f"attainment target: there are {len(self.classes)}, but requests have no SLO class; give one target"
            )
        self.left -= num_requests
        self.num_requests += num_requests
        self.runs.append((rate, outcomes))
        return outcomes

    def rates(self) -> list[float]:
        return sorted({rate for rate, _ in self.runs})

    def at(self, rate: float) -> list[Outcomes]:
        """The runs at a rate that are at least half as long as the longest: shorter ones were found to be too short."""
        runs = [outcomes for each, outcomes in self.runs if each == rate]
        longest = max(len(outcomes) for outcomes in runs)
        return [outcomes for outcomes in runs if 2 * len(outcomes) >= longest]

    def around(self, rate: float, part: float) -> list[Outcomes]:
        """The longer ones of the runs within that part of a rate; those of the nearest rate if there are none."""
        runs = [outcomes for each, outcomes in self.runs if abs(each - rate) <= part * rate]
        if not runs:
            return self.at(min(self.rates(), key=lambda one: abs(one - rate)))
        longest = max(len(outcomes) for outcomes in runs)
        return [outcomes for outcomes in runs if 2 * len(outcomes) >= longest]

    def look(self, rate: float, max_correlation: float) -> Probe:
        runs = self.at(rate)
        overall = measure(runs)
        by_class = (overall,) if self.classes == (None,) else tuple(measure(runs, one) for one in self.classes)
        return Probe(check_stationarity([outcomes.flow for outcomes in runs], max_correlation), overall, by_class)

    def attainments(self) -> tuple[tuple[float, Attainment], ...]:
        return tuple((rate, measure(self.at(rate))) for rate in self.rates())
