"""The last looks of a search: how long they are, and what they show beside a goodput.

A goodput is found by many runs at rates around it; what latencies, phases and costs are there is told by one more run
at the very rate. Knows neither set-ups nor simulators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pdserve.cluster.planner.goodput import Goodput
from pdserve.cluster.planner.trials import View

MIN_LOOK = 100
"""Requests. Shorter looks say nothing."""


def shared_out(wanted: Mapping[int, int], left: int) -> dict[int, int]:
    """As many requests as each wants, or as there are for it: who wants less than its part leaves the rest to others.
    Without those for which too few are left."""
    given: dict[int, int] = {}
    for number, place in enumerate(sorted(wanted, key=wanted.__getitem__)):
        given[place] = min(wanted[place], left // (len(wanted) - number))
        left -= given[place]
    return {place: num for place, num in given.items() if num >= MIN_LOOK}


def as_seen(goodput: Goodput, view: View | None) -> Goodput:
    """With the attainment of the run that is shown beside it. Latencies, phases and misses are then of the same
    requests, at the same rate; the runs that found the goodput are in its probes."""
    if view is None or not goodput.rate or not view.attainment.num_requests:
        return goodput
    return replace(goodput, attainment_at_rate=view.attainment)
