"""The open links of one worker, on one side: found by peer, used by one thread at a time, closed when not wanted.

    (nothing) --use--> busy --ends well--> idle --use--> busy ...
    busy --fails | drop_peer | newer generation | close--> closed when its user is done
    idle --max_links | drop_peer | newer generation | newer epoch | close--> closed

A link that failed is never used again: its epoch is dead, the next use opens a new one. The sink's side mints the
epochs (`next_epoch`, growing over all its links), the source's side opens what it is told and refuses older ones. One
user at a time also keeps both ends' order of transfers the same: the sink holds its link from before `Redeem` until it
has received.

Knows nothing of what a link carries, nor of how one is opened.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pdserve.proto.errors import StaleReference, TransferFailed


class Closable(Protocol):
    def close(self) -> None: ...


L = TypeVar("L", bound=Closable)


@dataclass(frozen=True, slots=True)
class LinkKey:
    """A link belongs to a peer process, not to a worker id: a restarted peer gets new ones."""

    worker_id: str
    generation: int
    kind: str


@dataclass(slots=True)
class _Entry(Generic[L]):
    link_epoch: int
    link: L | None = None  # none while it is being opened
    is_busy: bool = True
    is_doomed: bool = False  # close instead of keeping


class LinkTable(Generic[L]):
    """Thread-safe. `max_links` counts idle and busy ones."""

    def __init__(self, max_links: int) -> None:
        self._max_links = max_links
        self._entries: dict[LinkKey, _Entry[L]] = {}  # least recently used first
        self._dead_epochs: dict[LinkKey, int] = {}  # newest epoch that was closed, by link
        self._epochs = itertools.count(1)
        self._changed = threading.Condition()
        self._removed: list[L] = []  # not closed yet: closing may take its time, and the lock must not
        self._is_open = True

    def __len__(self) -> int:
        with self._changed:
            return len(self._entries)

    def is_idle(self, key: LinkKey) -> bool:
        """Whether it is open and nobody uses it: who uses it now need not wait."""
        with self._changed:
            entry = self._entries.get(key)
            return entry is not None and not entry.is_busy

    def next_epoch(self) -> int:
        """An epoch newer than any before; for the side that mints them."""
        return next(self._epochs)

    @contextmanager
    def use(
        self, key: LinkKey, open_link: Callable[[int], L], timeout_s: float, link_epoch: int | None = None
    ) -> Iterator[tuple[L, int]]:
        """The link and its epoch, for this thread alone until the block ends; opened by `open_link(epoch)` if needed.

        `link_epoch`: the one the peer demands; `None` to keep an open link or mint an epoch. An exception in the
        block closes the link. Raises `TransferFailed` if it is not free in time, `StaleReference` for an old
        generation or epoch, and whatever `open_link` raises.
        """
        try:
            entry = self._claim(key, time.monotonic() + timeout_s, link_epoch)
        finally:
            self._close_removed()
        try:
            if entry.link is None:
                entry.link = open_link(entry.link_epoch)
            yield entry.link, entry.link_epoch
        except BaseException:
            entry.is_doomed = True
            raise
        finally:
            self._give_back(key, entry)
            self._close_removed()

    def drop_peer(self, worker_id: str, generation: int | None = None) -> None:
        """Close the links to a peer that is gone (or to one generation of it); busy ones when their user is done."""
        with self._changed:
            self._doom(
                key
                for key in list(self._entries)
                if key.worker_id == worker_id and generation in (None, key.generation)
            )
        self._close_removed()

    def close(self) -> None:
        """Close every link, busy ones when their user is done; no more can be used."""
        with self._changed:
            self._is_open = False
            self._doom(iter(list(self._entries)))
        self._close_removed()

    def _close_removed(self) -> None:
        with self._changed:
            removed, self._removed = self._removed, []
        for link in removed:
            link.close()

    def _claim(self, key: LinkKey, deadline_s: float, link_epoch: int | None) -> _Entry[L]:
        with self._changed:
            while True:
                if not self._is_open:
                    raise TransferFailed("the links of this worker are closed")
                self._retire_generations(key)
                entry = self._find(key, link_epoch)
                if entry is not None:
                    return entry
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not self._changed.wait(left_s):
                    raise TransferFailed(f"the {key.kind} link to {key.worker_id} was not free in time")

    def _find(self, key: LinkKey, link_epoch: int | None) -> _Entry[L] | None:
        """The claimed entry, or `None` to wait. Called with the lock."""
        newest = max(self._dead_epochs.get(key, 0), self._entries[key].link_epoch if key in self._entries else 0)
        if link_epoch is not None and (link_epoch < newest or link_epoch == self._dead_epochs.get(key)):
            raise StaleReference(f"link epoch {link_epoch} to {key.worker_id} is over")
        entry = self._entries.get(key)
        if entry is not None and entry.is_busy:
            return None
        if entry is not None and link_epoch not in (None, entry.link_epoch):
            self._doom(iter([key]))
            entry = None
        if entry is None:
            if not self._has_room():
                return None
            entry = _Entry(self.next_epoch() if link_epoch is None else link_epoch)
        entry.is_busy = True
        self._entries.pop(key, None)
        self._entries[key] = entry
        return entry

    def _has_room(self) -> bool:
        """Whether one more link may be opened, after closing the least recently used idle one if need be."""
        if len(self._entries) >= self._max_links:
            idle = next((key for key, entry in self._entries.items() if not entry.is_busy), None)
            if idle is None:
                return False
            self._doom(iter([idle]))
        return True

    def _retire_generations(self, key: LinkKey) -> None:
        others = [other for other in (*self._entries, *self._dead_epochs) if other.worker_id == key.worker_id]
        newest = max((other.generation for other in others), default=key.generation)
        if key.generation < newest:
            raise StaleReference(f"{key.worker_id} generation {key.generation} is gone, {newest} is there")
        older = [other for other in others if other.generation < key.generation]
        self._doom(other for other in older if other in self._entries)
        for other in older:
            self._dead_epochs.pop(other, None)

    def _doom(self, keys: Iterator[LinkKey]) -> None:
        for key in keys:
            entry = self._entries.get(key)
            if entry is None:
                continue
            entry.is_doomed = True
            if not entry.is_busy:
                self._remove(key, entry)

    def _give_back(self, key: LinkKey, entry: _Entry[L]) -> None:
        with self._changed:
            entry.is_busy = False
            if entry.is_doomed:
                self._remove(key, entry)
            self._changed.notify_all()

    def _remove(self, key: LinkKey, entry: _Entry[L]) -> None:
        del self._entries[key]
        self._dead_epochs[key] = max(entry.link_epoch, self._dead_epochs.get(key, 0))
        if entry.link is not None:
            self._removed.append(entry.link)
