"""Which requests a worker works on, until when, and which it must not start any more. One owner, no I/O.

(unknown) --accept--> live --end--> ended
Ended and aborted ids are remembered for a while: an accept that was overtaken by its abort, or that comes once more
after the end, must not start.
"""

from __future__ import annotations

from collections import OrderedDict

from pdserve.proto.errors import StaleReference
from pdserve.proto.types import HandoffId

MAX_REMEMBERED = 8192


class LiveRequests:
    """Deadlines are seconds of the caller's clock."""

    def __init__(self) -> None:
        self._deadlines: dict[HandoffId, float] = {}
        self._over: OrderedDict[HandoffId, None] = OrderedDict()

    def __contains__(self, handoff: HandoffId) -> bool:
        return handoff in self._deadlines

    def all(self) -> list[HandoffId]:
        return list(self._deadlines)

    def is_new(self, handoff: HandoffId) -> bool:
        """False for a repeated accept.

        Raises:
            StaleReference: it has ended or was aborted already.
        """
        if handoff in self._over:
            raise StaleReference(f"{handoff} is over")
        return handoff not in self._deadlines

    def accept(self, handoff: HandoffId, deadline_s: float) -> None:
        self._deadlines[handoff] = deadline_s

    def end(self, handoff: HandoffId) -> bool:
        """It ended; whether it was live until now."""
        was_live = self._deadlines.pop(handoff, None) is not None
        if was_live:
            self._remember(handoff)
        return was_live

    def abort(self, handoff: HandoffId) -> None:
        """End it, and accept nothing more under its id."""
        self._deadlines.pop(handoff, None)
        self._remember(handoff)

    def of_epoch(self, epoch: int) -> list[HandoffId]:
        return [handoff for handoff in self._deadlines if handoff.epoch == epoch]

    def overdue(self, now_s: float) -> list[HandoffId]:
        return [handoff for handoff, deadline_s in self._deadlines.items() if now_s >= deadline_s]

    def _remember(self, handoff: HandoffId) -> None:
        self._over[handoff] = None
        if len(self._over) > MAX_REMEMBERED:
            self._over.popitem(last=False)
