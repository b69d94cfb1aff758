"""The course of a simulation: requests as they come, and in between whatever the clock has next.

Apart from `simulation` to be compiled. Knows nothing of what happens.
"""

from __future__ import annotations

import math

from pdserve.cluster.planner.clock import Clock
from pdserve.cluster.planner.source import Source
from pdserve.cluster.planner.timelapse import Timelapse
from pdserve.cluster.planner.virtual_router import VirtualRouter


def run(clock: Clock, router: VirtualRouter, source: Source, lapse: Timelapse | None) -> None:
    """Until nobody comes any more and everybody who came has ended."""
    while clock.next_s <= 0.0:
        clock.advance()  # the workers' first turns
    while True:
        arrival_s, num_live = source.next_arrival_s(), router.num_live
        if arrival_s == math.inf and (not num_live or clock.next_s == math.inf):
            return
        if arrival_s <= clock.next_s:
            clock.skip_to(arrival_s)
            router.arrive(source.pop())
            _look(clock, router, lapse)
        # Only the end of a request can make another one come earlier.
        while clock.next_s < arrival_s and router.num_live == num_live:
            clock.advance()
            _look(clock, router, lapse)


def _look(clock: Clock, router: VirtualRouter, lapse: Timelapse | None) -> None:
    if lapse is not None and lapse.due(clock.now_s):
        lapse.sample(clock.now_s, router.num_queued, router.num_inflight, router.samples())
