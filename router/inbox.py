"""Joins one request's `Completion`, driven by events, to the one task that waits for it.

What the workers send coalesces in the completion while the task is busy writing; its bound is the
completion's. Knows nothing of what the events mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pdserve.proto.errors import PdserveError
from pdserve.proto.types import SequenceEvent
from pdserve.router.completion import Completion


class Inbox:
    """`on_error` is called once, as soon as the completion fails: even while the client is not reading."""

    def __init__(self, completion: Completion) -> None:
        self.completion = completion
        self.on_error: Callable[[], None] = _ignore
        self._news = asyncio.Event()

    def deliver(self, worker_id: str, event: SequenceEvent) -> None:
        self._update(lambda: self.completion.accept(worker_id, event))

    def worker_lost(self, worker_id: str, why: str) -> None:
        self._update(lambda: self.completion.lose(worker_id, why))

    def fail(self, error: PdserveError) -> None:
        """End it from outside, unless it has ended."""
        self._update(lambda: self.completion.fail(error))

    async def wait(self) -> None:
        """Until something has come in since the last `wait`."""
        await self._news.wait()
        self._news.clear()

    def _update(self, change: Callable[[], None]) -> None:
        had_failed = self.completion.error is not None
        change()
        self._news.set()
        if self.completion.error is not None and not had_failed:
            self.on_error()


def _ignore() -> None:
    return None
