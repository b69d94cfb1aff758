"""KV on its way between simulated workers: each worker sends one part at a time and receives one at a time.

    start = first gap in which the source's way out and the target's way in are both free for bytes / bandwidth
    end = start + bytes / bandwidth + latency

Parts from one worker to another go in order of asking; a part that waits for a busy target does not keep the source
from sending to others. Real links share a worker's bandwidth between parts under way: nothing is idle there either, and
who shares ends as late. The latency is not occupied: another part may follow meanwhile. Knows nothing of hand-offs.
"""

from __future__ import annotations

from bisect import insort

from pdserve.cluster.planner.profile import LinkCost

Way = list[tuple[float, float, str]]
"""When it is taken, from and until, in order, and by whom at the other end."""


class VirtualLinks:
    """Owner of when each worker's ways out and in are taken, as far as that is not past."""

    def __init__(self) -> None:
        self._out: dict[str, Way] = {}
        self._in: dict[str, Way] = {}
        self.num_bytes = 0

    def send(self, source: str, target: str, cost: LinkCost, num_bytes: int, now_s: float) -> float:
        """The moment at which the bytes are there."""
        way_out, way_in = _ahead(self._out, source, now_s), _ahead(self._in, target, now_s)
        took_s = num_bytes / cost.bandwidth_bytes_per_s
        start_s = now_s
        if way_out or way_in:
            before_s = (until_s for _, until_s, other in way_out if other == target)
            start_s = _first_gap(sorted(way_out + way_in), max(before_s, default=now_s), took_s)
        free_s = start_s + took_s
        insort(way_out, (start_s, free_s, target))
        insort(way_in, (start_s, free_s, source))
        self.num_bytes += num_bytes
        return free_s + cost.latency_s


def _ahead(ways: dict[str, Way], worker_id: str, now_s: float) -> Way:
    """What is not past; nothing overlaps on one way, so what begins first ends first."""
    way = ways.get(worker_id)
    if way is None:
        way = ways[worker_id] = []
    while way and way[0][1] <= now_s:
        del way[0]
    return way


def _first_gap(taken: Way, earliest_s: float, took_s: float) -> float:
    """Of so many seconds, not before `earliest_s`."""
    start_s = earliest_s
    for from_s, until_s, _ in taken:
        if from_s >= start_s + took_s:
            break
        start_s = max(start_s, until_s)
    return start_s
