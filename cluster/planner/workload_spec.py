"""What every workload has and can do: a rate, a limit of length, and sources of requests at any rate by any seed.

`Demand` says how much of a workload is wanted and by which seed. Every stream of random numbers belongs to one purpose,
so that a field added to a workload leaves everything else about it as it was; and times are drawn apart from lengths,
so that two rates with one seed bring the same requests. Knows no kind of workload.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Self

import numpy as np
from pydantic import Field

from pdserve.cluster.planner.processes import Segment
from pdserve.cluster.planner.source import Source, limited
from pdserve.cluster.planner.workload_fields import Positive, Section
from pdserve.proto.errors import ConfigError

ROUNDING = 1e-6
"""Of a request: a course of whole requests is not one longer for the last bit of a float."""

LEAST_RATE = 1e-9
"""One in thirty years: moments beyond have no seconds any more."""


class Stream(IntEnum):
    """What random numbers are for. A number, once given, is part of what seeds mean."""

    TIMES = 1
    PHASES = 2
    PROMPTS = 3
    OUTPUTS = 4
    PREFIXES = 5
    CLASSES = 6
    TURNS = 7
    COURSE = 8
    FOUND = 9


@dataclass(frozen=True, slots=True)
class Demand:
    """How much of a kind is wanted: its mean rate, and the part it has in the whole.

    `envelope` replaces the constant rate; its mean is still `rate`. `num_requests` is how many will be taken, as far
    as is known. `begins_steady` is false for what joins later. `max_model_len` is the least of those that apply.
    `drift_scale` is what the seconds of pieces and of the time of day are multiplied by.
    """

    rate: float
    seed: int
    num_requests: int | None = None
    namespace: int = 0
    envelope: Iterator[Segment] | None = None
    max_model_len: int | None = None
    begins_steady: bool = True
    drift_scale: float = 1.0

    def part(self, number: int, rate: float, share: float, envelope: Iterator[Segment] | None = None) -> Demand:
        """What is wanted of one of several kinds; what has an envelope begins with its piece."""
        num_requests = None if self.num_requests is None else max(1, round(self.num_requests * share))
        return replace(
            self,
            rate=rate,
            num_requests=num_requests,
            namespace=number,
            envelope=envelope,
            begins_steady=envelope is None,
        )

    def random(self, *purpose: int) -> np.random.Generator:
        """Numbers for one purpose of one part."""
        return np.random.default_rng((self.seed, self.namespace, *purpose))


class WorkloadSpec(Section):
    """A workload with everything that was left open filled in.

    A value: it can be sent to other processes and draws the same requests in each. With `whole_course` a run of so and
    so many requests is a whole number of courses: pieces and the time of day pass faster, or a little slower, for it.
    """

    rate: Positive | None = None
    rate_scale: Positive = 1.0
    max_model_len: int | None = Field(default=None, ge=2)
    whole_course: bool = False

    def source(self, rate: float | None = None, seed: int = 0, num_requests: int | None = None) -> Source:
        """`num_requests` requests (without end if `None`) at a mean `rate` per second, by default the workload's own.

        The same arguments give the same requests. Another rate gives the same requests at other times.

        Raises:
            ConfigError: no rate is known, an argument is out of range, or a trace cannot be used.
        """
        rate = self.own_rate() if rate is None else rate
        if rate is None:
            raise ConfigError("workload: rate: is not known for this workload; add rate=REQUESTS_PER_SECOND")
        if not (math.isfinite(rate) and rate >= LEAST_RATE):
            raise ConfigError(
                f"workload: rate: {rate!r} is not a number of requests per second of at least {LEAST_RATE:g}"
            )
        if seed < 0:
            raise ConfigError(f"seed: {seed} is negative; use 0 or more")
        if num_requests is not None and num_requests < 1:
            raise ConfigError(f"num_requests: {num_requests} is not a positive number")
        scale = self._drift_scale(rate * self.drift_s(), num_requests)
        demand = Demand(rate, seed, num_requests, max_model_len=self.max_model_len, drift_scale=scale)
        return limited(self.build(demand), num_requests)

    def for_model(self, max_model_len: int) -> Self:
        """The same, cut to a model's context."""
        known = max_model_len if self.max_model_len is None else min(max_model_len, self.max_model_len)
        return self.model_copy(update={"max_model_len": known})

    def in_whole_courses(self) -> Self:
        """The same, for runs that are compared: shorter than a course they would see different parts of it."""
        return self.model_copy(update={"whole_course": True})

    def own_rate(self) -> float | None:
        """Requests per second, `None` where the workload does not say.

        Raises:
            ConfigError: a trace cannot be used.
        """
        return None if self.rate is None else self.rate * self.rate_scale

    def shares_prefixes(self) -> bool:
        """Whether prompts begin alike, so that prefix caches matter.

        Raises:
            ConfigError: a trace cannot be used.
        """
        raise NotImplementedError

    def slo_classes(self) -> frozenset[str | None]:
        """All that its requests may have; `None` are requests of no class."""
        raise NotImplementedError

    def drift_s(self) -> float:
        """Seconds after which what was written to change has changed: the pieces, the time of day; 0 where nothing."""
        raise NotImplementedError

    def course_s(self, rate: float) -> float:
        """Seconds after which the traffic at `rate` has shown all it has; 0 where any stretch is like any other.

        Raises:
            ConfigError: a trace cannot be used.
        """
        return self.drift_s()

    def course_requests(self, rate: float | None = None) -> int:
        """The same in requests, at `rate` or at the workload's own; 0, too, where that is not known.

        Raises:
            ConfigError: a trace cannot be used.
        """
        rate = self.own_rate() if rate is None else rate
        return 0 if rate is None else math.ceil(rate * self.course_s(rate) - ROUNDING)

    def _drift_scale(self, course_requests: float, num_requests: int | None) -> float:
        if not self.whole_course or num_requests is None or not course_requests:
            return 1.0
        num_courses = num_requests / course_requests
        return num_courses / max(1, round(num_courses))

    def build(self, demand: Demand) -> Source:
        """A source without end."""
        raise NotImplementedError
