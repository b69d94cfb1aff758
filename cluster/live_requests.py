"""Which requests a worker works on, until when, and which it must not start any more. One owner, no I/O.

(unknown) --accept--> live --end--> ended
aborted ids are remembered for a while: an accept that was overtaken by its abort must not start.
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
        self._aborted: OrderedDict[HandoffId, None] = OrderedDict()

    def __contains__(self, handoff: HandoffId) -> bool:
        return handoff in self._deadlines

    def all(self) -> list[HandoffId]:
        return list(self._deadlines)

    def is_new(self, handoff: HandoffId) -> bool:
        """False for a repeated accept.

        Raises:
            StaleReference: it was aborted already.
        """
        if handoff in self._aborted:
            raise StaleReference(f"{handoff} was aborted")
        return handoff not in self._deadlines

    def accept(self, handoff: HandoffId, deadline_s: float) -> None:
        self._deadlines[handoff] = deadline_s

    def end(self, handoff: HandoffId) -> bool:
        """It ended; whether it was live until now."""
        return self._deadlines.pop(handoff, None) is not None

    def abort(self, handoff: HandoffId) -> None:
        """End it, and accept nothing more under its id."""
        self.end(handoff)
        self._aborted[handoff] = None
        if len(self._aborted) > MAX_REMEMBERED:
            self._aborted.popitem(last=False)

    def of_epoch(self, epoch: int) -> list[HandoffId]:
        return [handoff for handoff in self._deadlines if handoff.epoch == epoch]

    def overdue(self, now_s: float) -> list[HandoffId]:
        return [handoff for handoff, deadline_s in self._deadlines.items() if now_s >= deadline_s]
