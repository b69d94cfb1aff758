"""What a worker says to its routers: one stream each, at most one message per engine step.

Events wait here until the stream takes them; while a router is slow they pile into one message instead of many, so that
memory is bounded by the tokens in flight. A router is known by its epoch and gets its own sequences only. The latest
load rides on every message. Knows nothing of engines, roles or gRPC.
"""

from __future__ import annotations

import asyncio

from pdserve.proto.errors import StaleReference
from pdserve.proto.types import SequenceEvent, StepOutput, WorkerLoad


class OutputStream:
    """Pending output for one router; closed by its reader."""

    def __init__(self) -> None:
        self._events: list[SequenceEvent] = []
        self._load: WorkerLoad | None = None
        self._ready = asyncio.Event()
        self.replaced = False

    def push(self, event: SequenceEvent) -> None:
        self._events.append(event)

    def flush(self, load: WorkerLoad) -> None:
        self._load = load
        self._ready.set()

    def end(self) -> None:
        """Another stream took over this epoch."""
        self.replaced = True
        self._ready.set()

    async def next(self) -> StepOutput | None:
        """Everything since the last call, as one message; `None` when the stream was replaced."""
        await self._ready.wait()
        self._ready.clear()
        if self.replaced:
            return None
        assert self._load is not None
        events, self._events = tuple(self._events), []
        return StepOutput(events, self._load)


class OutputHub:
    """Owner of the streams. `emit` events, then `flush` once with the load after them."""

    def __init__(self) -> None:
        self._streams: dict[int, OutputStream] = {}

    def open(self, epoch: int, load: WorkerLoad) -> OutputStream:
        """Start the stream of a router's epoch with the load as of now; a second one replaces the first."""
        if epoch in self._streams:
            self._streams[epoch].end()
        stream = self._streams[epoch] = OutputStream()
        stream.flush(load)
        return stream

    def close(self, epoch: int, stream: OutputStream) -> bool:
        """Forget a stream; whether it was the epoch's current one."""
        if self._streams.get(epoch) is not stream:
            return False
        del self._streams[epoch]
        return True

    def require(self, epoch: int) -> None:
        """Sequences without anybody to tell must not start.

        Raises:
            StaleReference: this router has no output stream open.
        """
        if epoch not in self._streams:
            raise StaleReference("no output stream is open for this router's epoch")

    def emit(self, event: SequenceEvent) -> None:
        stream = self._streams.get(event.id.epoch)
        if stream is not None:  # else the router is gone, and its sequences are being aborted
            stream.push(event)

    def flush(self, load: WorkerLoad) -> None:
        for stream in self._streams.values():
            stream.flush(load)
