"""One worker process, identified by its generation, as the router talks to it.

    connecting -> connected -> (stream breaks) -> connecting ...  until `run` is cancelled

One channel, one output stream for this router's epoch. `connected` begins with the stream's initial metadata
or first message, whichever comes first: from then on no event can be missed, and only then may requests
be placed here. A worker therefore answers `Outputs` at once (its load, or initial metadata). When the stream
breaks every attached request is told, at once and exactly once; nothing is replayed.

Knows nothing of other workers or of what a request is beyond its hand-off id and size.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import grpc
import grpc.aio
from google.protobuf.message import Message

from pdserve.proto import wire
from pdserve.proto import worker_pb2 as pb
from pdserve.proto import worker_pb2_grpc as rpc
from pdserve.proto.channels import OpenChannel, open_channel
from pdserve.proto.errors import DeadlineExceeded, PdserveError, WorkerLost
from pdserve.proto.status import error_from_call
from pdserve.proto.types import HandoffId, Role, SequenceEvent, StepOutput, WorkerInfo, WorkerLoad, WorkerRequest
from pdserve.router.refusals import as_told
from pdserve.router.unseen import Unseen
from pdserve.router.view import Pending, WorkerView

LOG = logging.getLogger("pdserve.router")


class StreamBroken(Exception):
    """The output stream ended for a reason that gRPC has no error for."""


class EventSink(Protocol):
    """Where one request's events go."""

    def deliver(self, worker_id: str, event: SequenceEvent) -> None: ...

    def worker_lost(self, worker_id: str, why: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """What connections need from the configuration. Times in seconds."""

    epoch: int
    rpc_timeout_s: float
    reconnect_s: float
    max_reconnect_s: float
    on_change: Callable[[], None]
    on_dropped_event: Callable[[], None]
    open_channel: OpenChannel = open_channel


class WorkerConnection:
    """Owner of the channel, of the last load and of the table of requests that hear from this worker."""

    def __init__(self, info: WorkerInfo, settings: Settings, on_view: Callable[[str], object]) -> None:
        """`on_view(worker_id)` hears that `view` answers differently from now on."""
        self.info = info
        self.load: WorkerLoad | None = None
        self.connected = False
        self._settings = settings
        self._on_view = on_view
        self._sinks: dict[HandoffId, EventSink] = {}
        self._unseen = Unseen()
        self._closed = False
        self._channel = settings.open_channel(info.worker.address)
        self._stub = rpc.WorkerStub(self._channel)

    @property
    def worker_id(self) -> str:
        return self.info.worker.worker_id

    @property
    def role(self) -> Role:
        return self.load.role if self.load is not None else self.info.role

    @property
    def state(self) -> str:
        """One of the metrics' worker states, for a worker that the controller calls ready."""
        if not self.connected or self.load is None:
            return "unreachable"
        return "draining" if self.load.draining else "ready"

    def view(self) -> WorkerView | None:
        """What a policy may see; `None` while the worker is unreachable."""
        if not self.connected or self.load is None:
            return None
        return WorkerView(self.load, self.info.layout, self._unseen.pending)

    def attach(self, id: HandoffId, sink: EventSink, share: Pending) -> None:
        """From now on `sink` hears of `id`, and `share` counts as sent."""
        self._sinks[id] = sink
        self._unseen.place(id, share)
        self._on_view(self.worker_id)

    def detach(self, id: HandoffId) -> None:
        self._sinks.pop(id, None)
        self._unseen.forget(id)
        self._on_view(self.worker_id)

    async def run(self) -> None:
        """Keep the stream up until cancelled, then tell every request and close."""
        delay_s = self._settings.reconnect_s
        try:
            while True:
                try:
                    await self._follow()
                    why = "its output stream ended"
                except grpc.aio.AioRpcError as error:
                    why = f"its output stream broke ({error.code().name})"
                # Whatever a worker sends must not end the router: it ends this stream.
                except Exception as error:
                    LOG.exception("worker %s: output stream", self.worker_id)
                    why = f"its output stream broke ({type(error).__name__})"
                delay_s = self._settings.reconnect_s if self.connected else delay_s * 2
                self._lose(why)
                await asyncio.sleep(min(delay_s, self._settings.max_reconnect_s))
        finally:
            await self.close()

    async def close(self) -> None:
        """Tell every request, end every call. Safe to repeat."""
        self._closed = True
        self._lose("it left the fleet")
        await self._channel.close()

    async def expect(self, request: WorkerRequest, source: WorkerInfo) -> None:
        message = pb.ExpectRequest(request=wire.request_to_wire(request), source=wire.ref_to_wire(source.worker))
        await self._call(self._stub.Expect, message, request)

    async def prefill(self, request: WorkerRequest, hand_off_to: WorkerInfo | None) -> None:
        target = None if hand_off_to is None else wire.ref_to_wire(hand_off_to.worker)
        message = pb.PrefillRequest(request=wire.request_to_wire(request), hand_off_to=target)
        await self._call(self._stub.Prefill, message, request)

    async def abort(self, id: HandoffId, reason: str) -> None:
        """Best effort: a worker that cannot be reached has its own deadline for the request."""
        if self._closed:
            return
        message = pb.AbortRequest(id=wire.handoff_to_wire(id), reason=reason)
        try:
            await self._stub.Abort(message, timeout=self._settings.rpc_timeout_s)
        except grpc.aio.AioRpcError as error:
            LOG.warning("worker %s: abort of %s failed: %s", self.worker_id, id, error.code().name)
        except asyncio.CancelledError:
            self._own_cancellation()

    async def _call(self, method: Callable[..., Awaitable[pb.Ack]], message: Message, request: WorkerRequest) -> None:
        if self._closed:
            raise WorkerLost(f"worker {self.worker_id} left the fleet")
        timeout_s = min(self._settings.rpc_timeout_s, request.timeout_s)
        try:
            await method(message, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._translate(error, timeout_s < self._settings.rpc_timeout_s) from error
        except asyncio.CancelledError:
            self._own_cancellation()
            raise WorkerLost(f"worker {self.worker_id} left the fleet") from None
        self._unseen.acknowledged(request.id)

    def _own_cancellation(self) -> None:
        """Closing the channel cancels its calls; a cancellation that we did not cause goes on."""
        task = asyncio.current_task()
        if not self._closed or (task is not None and task.cancelling()):
            raise

    async def _follow(self) -> None:
        call = self._stub.Outputs(pb.OutputsRequest(epoch=self._settings.epoch))
        try:
            async with asyncio.timeout(self._settings.rpc_timeout_s):
                await call.initial_metadata()
                load = await self._stub.Load(pb.LoadRequest(), timeout=self._settings.rpc_timeout_s)
            self._see(wire.load_from_wire(load))
            self.connected = True
            self._on_view(self.worker_id)
            self._settings.on_change()
            async for message in call:
                self._dispatch(wire.output_from_wire(message))
        finally:
            call.cancel()

    def _dispatch(self, output: StepOutput) -> None:
        self._see(output.load)
        for event in output.events:
            sink = self._sinks.get(event.id)
            if sink is None:
                self._settings.on_dropped_event()
            else:
                sink.deliver(self.worker_id, event)

    def _see(self, load: WorkerLoad) -> None:
        ref = self.info.worker
        if (load.worker_id, load.generation) != (ref.worker_id, ref.generation):
            raise StreamBroken(f"{ref.worker_id}: another worker or generation answers at its address")
        changed = self.load is None or (self.load.role, self.load.draining) != (load.role, load.draining)
        self.load = load
        self._unseen.load_arrived()
        self._on_view(self.worker_id)
        if changed:
            self._settings.on_change()

    def _lose(self, why: str) -> None:
        was_connected, self.connected, self.load = self.connected, False, None
        sinks, self._sinks = self._sinks, {}
        self._unseen.clear()
        self._on_view(self.worker_id)
        for sink in sinks.values():
            sink.worker_lost(self.worker_id, why)
        if was_connected:
            LOG.warning("worker %s: %s; %d requests lost it", self.worker_id, why, len(sinks))
            self._settings.on_change()

    def _translate(self, error: grpc.aio.AioRpcError, deadline_was_ours: bool) -> PdserveError:
        """The worker's refusal, or its silence, in our words."""
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and deadline_was_ours:
            return DeadlineExceeded("the deadline passed")
        return as_told(self.worker_id, error_from_call(error, f"worker {self.worker_id}"))
