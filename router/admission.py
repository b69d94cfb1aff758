"""Who may start, who waits, who is turned away: pure, told the time.

Knows request ids, two bounds and the pace of departures. Knows nothing of workers, of asyncio or of what a
request contains. Every id that `arrive` accepted must `leave` exactly once, wherever it got to.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum

from pdserve.proto.errors import DuplicateRequest, Overloaded

MIN_RETRY_S = 0.1
MAX_RETRY_S = 30.0
PACE_WINDOW = 64
MIN_PACE_SAMPLES = 8


class Verdict(StrEnum):
    """What `arrive` decided: start now, or wait for another request to leave."""

    ADMITTED = "admitted"
    QUEUED = "queued"


class Admission:
    """At most `max_inflight` requests run and at most `max_queued` wait, first come first served."""

    def __init__(self, max_inflight: int, max_queued: int) -> None:
        self.max_inflight = max_inflight
        self.max_queued = max_queued
        self._inflight: set[str] = set()
        self._queue: dict[str, None] = {}
        self._departures_s: deque[float] = deque(maxlen=PACE_WINDOW)

    @property
    def num_inflight(self) -> int:
        return len(self._inflight)

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    def arrive(self, request_id: str, now_s: float, deadline_s: float) -> Verdict:
        """Take the request in. Raises DuplicateRequest, or Overloaded with the time to wait before trying again."""
        if request_id in self._inflight or request_id in self._queue:
            raise DuplicateRequest("a request with this request_id is in flight")
        if len(self._inflight) < self.max_inflight:
            self._inflight.add(request_id)
            return Verdict.ADMITTED
        if len(self._queue) >= self.max_queued:
            raise Overloaded("the router's queue is full", self._retry_after_s())
        wait_s = self._predicted_wait_s()
        if wait_s is not None and now_s + wait_s > deadline_s:
            raise Overloaded("deadline_unmeetable: the queue is longer than the deadline", self._retry_after_s())
        self._queue[request_id] = None
        return Verdict.QUEUED

    def leave(self, request_id: str, now_s: float) -> str | None:
        """Forget the request, queued or running; returns the id that may start in its place."""
        if request_id in self._queue:
            del self._queue[request_id]
            return None
        self._inflight.remove(request_id)
        self._departures_s.append(now_s)
        if not self._queue:
            return None
        successor = next(iter(self._queue))
        del self._queue[successor]
        self._inflight.add(successor)
        return successor

    def _gap_s(self) -> float | None:
        """Mean time between departures; `None` until it is worth anything."""
        if len(self._departures_s) < MIN_PACE_SAMPLES:
            return None
        return (self._departures_s[-1] - self._departures_s[0]) / (len(self._departures_s) - 1)

    def _predicted_wait_s(self) -> float | None:
        gap_s = self._gap_s()
        return None if gap_s is None else gap_s * (len(self._queue) + 1)

    def _retry_after_s(self) -> float:
        wait_s = self._predicted_wait_s()
        return 1.0 if wait_s is None else min(MAX_RETRY_S, max(MIN_RETRY_S, wait_s))
