"""What a search asks for and what it is told: one set-up at one rate, or the goodput of one set-up.

    search --Job--> evaluate (simulators on many cores, or a test's formula) --Result--> search

Jobs are small and results are sums, so that both can go to other processes and back. Knows nothing of simulators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pdserve.cluster.planner.attainment import Attainment
from pdserve.cluster.planner.findings import Picture, Setup, Target
from pdserve.cluster.planner.goodput import Goodput


@dataclass(frozen=True, slots=True)
class Probe:
    """Run the set-up at one rate."""

    setup: Setup
    rate: float
    seed: int
    num_requests: int

    @property
    def most_requests(self) -> int:
        return self.num_requests


@dataclass(frozen=True, slots=True)
class Hunt:
    """Find the set-up's goodput, beginning at `start_rate`."""

    setup: Setup
    start_rate: float
    seed: int
    precision: float
    max_requests: int

    @property
    def most_requests(self) -> int:
        return self.max_requests


@dataclass(frozen=True, slots=True)
class View:
    """One run of a set-up.

    `stretch` is by what factor all targets would have to be multiplied to be just met, at their shares: 1 is the edge,
    and it is never infinite. It is above 1, whatever the latencies, where the run does not show that the system keeps
    up. `needed_s` is then how long a run would have to last to show it, 0 if this one was long enough. `is_sure` is
    false where a miss may be chance. `nearest` are the targets changed as little as is needed to meet them: the failing
    latency alone if one fails, else both by the same factor; infinite where too many requests failed. `failing` names
    what is missed, `failure` says why requests failed. `extrapolated` says what of the run nobody had measured.
    """

    attainment: Attainment
    stretch: float
    picture: Picture
    nearest: tuple[Target, ...]
    extrapolated: tuple[str, ...]
    num_requests: int
    needed_s: float = 0.0
    is_sure: bool = True
    failing: str = ""
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """The goodput of a set-up. `failure` says why requests failed where no rate will do; `run_requests` is how long the
    longest run near the goodput was, 0 if that is not known."""

    goodput: Goodput
    extrapolated: tuple[str, ...]
    failure: str = ""
    run_requests: int = 0

    @property
    def num_requests(self) -> int:
        return self.goodput.num_requests


Job: TypeAlias = Probe | Hunt
Result: TypeAlias = View | Found

Evaluate: TypeAlias = Callable[[str, Sequence[Job]], list[Result]]
"""Does jobs, all of them independent, and answers in their order; the text says what they are for."""
