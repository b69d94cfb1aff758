"""The workers that a policy chooses from: the last view of each, and for each side the orders that choices need.

A worker whose load has changed is put again before the next choice, so that a choice costs what has changed since the
last one and not the size of the fleet. Draining workers are kept out of the orders. Pure; knows no policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pdserve.proto.types import KVLayout, Role
from pdserve.router.ranking import Ranking
from pdserve.router.view import WorkerView


@dataclass(slots=True)
class Group:
    """Workers of one role and one KV layout, by slot, in three orders."""

    role: Role
    layout: KVLayout
    views: dict[int, WorkerView] = field(default_factory=dict)
    by_backlog_tokens: Ranking = field(default_factory=Ranking)
    by_num_sequences: Ranking = field(default_factory=Ranking)
    by_spare_blocks: Ranking = field(default_factory=Ranking)

    def put(self, slot: int, view: WorkerView) -> None:
        self.views[slot] = view
        self.by_backlog_tokens.put(slot, view.backlog_tokens)
        self.by_num_sequences.put(slot, view.num_sequences)
        self.by_spare_blocks.put(slot, view.spare_blocks)

    def remove(self, slot: int) -> None:
        del self.views[slot]
        for ranking in (self.by_backlog_tokens, self.by_num_sequences, self.by_spare_blocks):
            ranking.remove(slot)

    def may_have_room(self, num_tokens: int) -> bool:
        """Whether anybody has room for so many tokens."""
        return self.by_spare_blocks.highest() >= self.layout.num_blocks(num_tokens)


class Candidates:
    """Owner of the views."""

    def __init__(self, views: Iterable[WorkerView] = ()) -> None:
        self._views: dict[str, WorkerView] = {}
        self._slots: dict[str, int] = {}
        self._places: dict[str, Group] = {}
        self._groups: dict[tuple[Role, KVLayout], Group] = {}
        self._num_slots = 0
        for view in views:
            self.put(view)

    @property
    def views(self) -> list[WorkerView]:
        """In order of their ids."""
        return [self._views[worker_id] for worker_id in sorted(self._views)]

    def put(self, view: WorkerView) -> None:
        """A worker as it is now."""
        worker_id = view.worker_id
        if worker_id not in self._slots:
            self._slots[worker_id] = self._num_slots
            self._num_slots += 1
        self._views[worker_id] = view
        before, now = self._places.get(worker_id), None if view.load.draining else self._group_of(view)
        if before is not None and before is not now:
            self._leave(worker_id, before)
        if now is not None:
            self._places[worker_id] = now
            now.put(self._slots[worker_id], view)

    def remove(self, worker_id: str) -> None:
        """It cannot be talked to any more. One that is not here is no error."""
        if self._views.pop(worker_id, None) is None:
            return
        if worker_id in self._places:
            self._leave(worker_id, self._places[worker_id])
        del self._slots[worker_id]

    def groups(self, role: Role) -> Iterator[Group]:
        return (group for group in self._groups.values() if group.role is role)

    def feeders(self, layout: KVLayout) -> Iterator[Group]:
        """The prefill workers that can hand off to a decode worker of this layout."""
        return (group for group in self.groups(Role.PREFILL) if not layout.obstacles(group.layout))

    def _group_of(self, view: WorkerView) -> Group:
        layout, before = view.layout, self._places.get(view.worker_id)
        if (
            before is not None
            and before.role is view.load.role
            and (before.layout is layout or before.layout == layout)
        ):
            return before  # as nearly always: worth not hashing a layout
        key = (view.load.role, layout)
        if key not in self._groups:
            self._groups[key] = Group(*key)
        return self._groups[key]

    def _leave(self, worker_id: str, group: Group) -> None:
        del self._places[worker_id]
        group.remove(self._slots[worker_id])
        if not group.views:
            del self._groups[group.role, group.layout]
