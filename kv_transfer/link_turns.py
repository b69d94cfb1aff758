"""One transfer at a time on each link, and the next ones wait without a thread.

Transfers run in a few threads that all links share. If those that wait for a slow link waited there, they would keep
transfers over every other link out. Knows nothing of what is transferred.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pdserve.kv_transfer.link import Deadline
from pdserve.kv_transfer.links import LinkKey
from pdserve.proto.errors import TransferFailed


class LinkTurns:
    """Owner of the queues. Used from one event loop."""

    def __init__(self) -> None:
        self._locks: dict[LinkKey, asyncio.Lock] = {}

    def is_free(self, key: LinkKey) -> bool:
        lock = self._locks.get(key)
        return lock is None or not lock.locked()

    @asynccontextmanager
    async def turn(self, key: LinkKey, deadline: Deadline) -> AsyncIterator[None]:
        """Alone on this link until the block ends, in order of asking. Raises `TransferFailed` at the deadline."""
        lock = self._locks.setdefault(key, asyncio.Lock())
        try:
            async with asyncio.timeout(deadline.left_s()):
                await lock.acquire()
        except TimeoutError as error:
            raise TransferFailed(f"the {key.kind} link to {key.worker_id} was not free in time") from error
        try:
            yield
        finally:
            lock.release()

    def forget(self, worker_id: str, generation: int) -> None:
        """That process is gone. Who waits or is at it goes on."""
        for key in [key for key in self._locks if (key.worker_id, key.generation) == (worker_id, generation)]:
            del self._locks[key]
