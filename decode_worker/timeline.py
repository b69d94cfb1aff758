"""The moments of one hand-off as the decode worker sees them, and the two durations that a user waits for.

KV moves while the prompt is still being computed; that costs nobody anything. What counts is the time from the last
offer (the prompt is computed) to admission: waiting for blocks, then the transfer of what had not arrived yet.
"""

from __future__ import annotations

from pdserve.proto.types import Phases


class Timeline:
    """Moments in seconds of the worker's clock."""

    def __init__(self) -> None:
        self._last_offer_s = 0.0
        self._first_fetch_s: float | None = None
        self._admitted_s: float | None = None

    def offered(self, now_s: float) -> None:
        self._last_offer_s = now_s

    def started(self, now_s: float) -> None:
        if self._first_fetch_s is None:
            self._first_fetch_s = now_s

    def admitted(self, now_s: float) -> None:
        self._admitted_s = now_s

    @property
    def phases(self) -> Phases:
        """Zero until admitted. A prompt that was held already waits and transfers nothing."""
        if self._admitted_s is None:
            return Phases()
        begin_s = self._last_offer_s
        if self._first_fetch_s is not None:
            begin_s = max(begin_s, self._first_fetch_s)
        return Phases(transfer_wait_s=begin_s - self._last_offer_s, transfer_s=self._admitted_s - begin_s)
