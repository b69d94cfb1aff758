"""What a router has sent to one worker and the worker's own loads do not show yet.

    placed --acknowledged by the worker--> acknowledged --LOADS_UNTIL_VISIBLE loads later--> visible: forgotten here

Without it every request of a burst would go to the worker that looked idle a moment ago. Knows nothing of connections,
of time or of what a load says. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.proto.types import HandoffId
from pdserve.router.view import Pending

# A load that was on its way when the worker acknowledged a request does not count it; the next one does.
LOADS_UNTIL_VISIBLE = 2


@dataclass(slots=True)
class _Placement:
    share: Pending
    visible_at: int | None = None  # number of the load


class Unseen:
    """Owner of the placements of one worker."""

    def __init__(self) -> None:
        self._placements: dict[HandoffId, _Placement] = {}
        self._pending: Pending | None = Pending()  # their sum, until it changes
        self._num_loads = 0

    def __len__(self) -> int:
        return len(self._placements)

    @property
    def pending(self) -> Pending:
        """Their sum."""
        if self._pending is None:
            shares = [placement.share for placement in self._placements.values()]
            self._pending = Pending(
                len(shares), sum([share.prompt_tokens for share in shares]), sum([share.num_blocks for share in shares])
            )
        return self._pending

    def place(self, id: HandoffId, share: Pending) -> None:
        """`share` is on its way to the worker."""
        self._placements[id] = _Placement(share)
        self._pending = None

    def acknowledged(self, id: HandoffId) -> None:
        """The worker has it."""
        placement = self._placements.get(id)
        if placement is not None:
            placement.visible_at = self._num_loads + LOADS_UNTIL_VISIBLE

    def load_arrived(self) -> None:
        """The worker has said what it does."""
        self._num_loads += 1
        if not self._placements:
            return
        for id in [id for id, placement in self._placements.items() if placement.visible_at == self._num_loads]:
            self.forget(id)

    def forget(self, id: HandoffId) -> None:
        if self._placements.pop(id, None) is not None:
            self._pending = None

    def clear(self) -> None:
        self._placements.clear()
        self._pending = None
