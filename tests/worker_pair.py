"""A prefill and a decode worker in the test's own process: real engines, real gRPC, real links; no Ray, no router.

`Routerless` plays the router's part towards them. Knows nothing of what the tests assert.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from pdserve.cluster.worker import Worker
from pdserve.cluster.worker_spec import WorkerSpec
from pdserve.engine.config import EngineConfig
from pdserve.kv_transfer.config import KVTransferConfig
from pdserve.proto import wire
from pdserve.proto import worker_pb2 as pb
from pdserve.proto import worker_pb2_grpc as pb_grpc
from pdserve.proto.types import HandoffId, Role, SamplingParams, SequenceEvent, WorkerRequest

EPOCH = 7
WAIT_S = 20.0


class Routerless:
    """One worker as a router sees it: its stub, and the events of its output stream by hand-off."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.channel = grpc.aio.insecure_channel(worker.requests.info.worker.address)
        self.stub: Any = pb_grpc.WorkerStub(self.channel)
        self.events: dict[HandoffId, list[SequenceEvent]] = {}
        self._news = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    async def open(self) -> None:
        opened = asyncio.Event()
        self._reader = asyncio.create_task(self._read(opened))
        await asyncio.wait_for(opened.wait(), WAIT_S)

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
            self._reader = None

    async def _read(self, opened: asyncio.Event) -> None:
        async for message in self.stub.Outputs(pb.OutputsRequest(epoch=EPOCH)):
            opened.set()
            for event in wire.output_from_wire(message).events:
                self.events.setdefault(event.id, []).append(event)
            self._news.set()

    def tokens(self, handoff: HandoffId) -> dict[int, int]:
        """Token by index, of everything said about one hand-off; a repeated index fails."""
        found: dict[int, int] = {}
        for event in self.events.get(handoff, []):
            for offset, token in enumerate(event.tokens):
                assert event.index + offset not in found, "an index came twice"
                found[event.index + offset] = token.token_id
        return found

    async def wait_for(self, condition: Any, what: str) -> None:
        """Until `condition()` holds, looking again after every message."""
        try:
            async with asyncio.timeout(WAIT_S):
                while not condition():
                    await self._news.wait()
                    self._news.clear()
        except TimeoutError as error:
            raise AssertionError(f"not within {WAIT_S} s: {what}; events {self.events}") from error

    async def ended(self, handoff: HandoffId) -> SequenceEvent:
        """The event that ended it here."""

        def last() -> SequenceEvent | None:
            events = self.events.get(handoff, [])
            return next((event for event in events if event.finish_reason or event.error), None)

        await self.wait_for(last, f"the end of {handoff} at {self.worker.requests.info.worker.worker_id}")
        event = last()
        assert event is not None
        return event


async def drained(*sides: Routerless) -> None:
    """Every block of every worker is free; fails when that does not come about."""
    try:
        async with asyncio.timeout(WAIT_S):
            for side in sides:
                while True:
                    load = await side.stub.Load(pb.LoadRequest(), timeout=WAIT_S)
                    busy = load.num_running or load.num_waiting or load.reserved_blocks
                    if load.free_blocks == load.total_blocks and not busy:
                        break
                    await asyncio.sleep(0.02)
    except TimeoutError as error:
        loads = [str(await side.stub.Load(pb.LoadRequest(), timeout=WAIT_S)) for side in sides]
        raise AssertionError(f"blocks are not free: {loads}") from error


def spec(role: Role, model: Path, transfer: KVTransferConfig, num_blocks: int = 64) -> WorkerSpec:
    engine = EngineConfig(num_blocks=num_blocks, max_num_seqs=8, max_num_batched_tokens=64)
    return WorkerSpec(f"{role}-0", role, str(model), engine, transfer, (0,), "127.0.0.1", "", "127.0.0.1:1")


@asynccontextmanager
async def worker(
    role: Role, model: Path, transfer: KVTransferConfig, num_blocks: int = 64
) -> AsyncIterator[Routerless]:
    started = Worker.load(spec(role, model, transfer, num_blocks))
    await started.serve()
    side = Routerless(started)
    try:
        await side.open()
        yield side
    finally:
        await side.close()
        await side.channel.close()
        await started.stop()


@asynccontextmanager
async def worker_pair(
    model: Path, transfer: KVTransferConfig | None = None, num_blocks: int = 64
) -> AsyncIterator[tuple[Routerless, Routerless]]:
    """(prefill, decode)."""
    config = transfer or KVTransferConfig(lease_s=6.0, renew_s=1.0)
    async with (
        worker(Role.PREFILL, model, config, num_blocks) as prefill,
        worker(Role.DECODE, model, config, num_blocks) as decode,
    ):
        yield prefill, decode


def make_request(name: str, prompt: tuple[int, ...], max_tokens: int = 24, timeout_s: float = 60.0) -> WorkerRequest:
    return WorkerRequest(
        HandoffId(name, 0, EPOCH), prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0), timeout_s
    )


async def start(prefill: Routerless, decode: Routerless, request: WorkerRequest) -> HandoffId:
    """Both legs, destination first."""
    message = wire.request_to_wire(request)
    source, target = (wire.ref_to_wire(side.worker.requests.info.worker) for side in (prefill, decode))
    await decode.stub.Expect(pb.ExpectRequest(request=message, source=source), timeout=WAIT_S)
    await prefill.stub.Prefill(pb.PrefillRequest(request=message, hand_off_to=target), timeout=WAIT_S)
    return request.id


async def abort(*sides: Routerless, id: HandoffId) -> None:
    """What the router does when a request ends."""
    for side in sides:
        await side.stub.Abort(pb.AbortRequest(id=wire.handoff_to_wire(id), reason="cancelled"), timeout=WAIT_S)
