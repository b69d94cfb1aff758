"""KV on its way between simulated workers: each worker sends one part at a time and receives one at a time.

    start = when the source's way out and the target's way in are both free;  end = start + latency + bytes / bandwidth

The latency is not occupied: another part may follow meanwhile. Knows nothing of hand-offs.
"""

from __future__ import annotations

from pdserve.cluster.planner.profile import LinkCost


class VirtualLinks:
    """Owner of when each worker's ways out and in fall free."""

    def __init__(self) -> None:
        self._out_free_s: dict[str, float] = {}
        self._in_free_s: dict[str, float] = {}
        self.num_bytes = 0
        self.waited_s = 0.0

    def send(self, source: str, target: str, cost: LinkCost, num_bytes: int, now_s: float) -> float:
        """The moment at which the bytes are there."""
        start_s = max(now_s, self._out_free_s.get(source, 0.0), self._in_free_s.get(target, 0.0))
        free_s = start_s + num_bytes / cost.bandwidth_bytes_per_s
        self._out_free_s[source] = self._in_free_s[target] = free_s
        self.num_bytes += num_bytes
        self.waited_s += start_s - now_s
        return free_s + cost.latency_s
