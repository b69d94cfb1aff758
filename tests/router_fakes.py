"""Workers and a controller that speak the real protocol over real sockets and do what a test tells them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc.aio
from prometheus_client import CollectorRegistry

from pdserve.proto import inference_pb2 as pb
from pdserve.proto import inference_pb2_grpc as rpc
from pdserve.proto import wire
from pdserve.proto import worker_pb2 as wpb
from pdserve.proto import worker_pb2_grpc as wrpc
from pdserve.proto.channels import SERVER_OPTIONS
from pdserve.proto.errors import PdserveError, StaleReference
from pdserve.proto.status import answer
from pdserve.proto.types import (
    EventError,
    FinishReason,
    HandoffId,
    KVLayout,
    Phases,
    Role,
    SequenceEvent,
    StepOutput,
    TokenInfo,
    WorkerInfo,
    WorkerLoad,
    WorkerRef,
    WorkerRequest,
)
from pdserve.router.app import Router
from pdserve.router.config import RouterConfig, RouterProcessConfig

LAYOUT = KVLayout("model", "float32", 2, 2, 8, 16)
PREFILL_PHASES = Phases(prefill_queue_s=0.25, prefill_s=0.5)
DECODE_PHASES = Phases(transfer_wait_s=0.125, transfer_s=0.0625, decode_queue_s=1.0, decode_s=2.0, transferred_tokens=3)


def make_load(worker_id: str, role: Role, **changes: Any) -> WorkerLoad:
    load = WorkerLoad(worker_id, 1, role, 0, 0, 0, 1000, 1000, 0, 0, 0, 0, 0, 0.01, False, 0, 0)
    return replace(load, **changes)


def tokens(*ids: int) -> tuple[TokenInfo, ...]:
    return tuple(TokenInfo(token_id) for token_id in ids)


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """The fakes live in the test's own loop: let it turn until they have seen what they must."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


class FakeWorker(wrpc.WorkerServicer):
    """Records what it is asked; answers as `refusals` says; sends what `emit` is given.

    What was aborted is refused from then on, as a real worker does.
    """

    def __init__(self, worker_id: str, role: Role, **load: Any) -> None:
        self.worker_id = worker_id
        self.role = role
        self.load = make_load(worker_id, role, **load)
        self.expects: list[WorkerRequest] = []
        self.prefills: list[tuple[WorkerRequest, str]] = []
        self.aborts: list[HandoffId] = []
        self.log: list[str] = []
        self.refusals: dict[str, PdserveError] = {}
        self.on_prefill: Callable[[WorkerRequest], None] = lambda request: None
        self.held: dict[str, asyncio.Event] = {}
        self.streams: dict[int, asyncio.Queue[StepOutput | None]] = {}
        self.max_model_len = 4096
        self.info: WorkerInfo | None = None
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        wrpc.add_WorkerServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        ref = WorkerRef(self.worker_id, self.load.generation, f"127.0.0.1:{port}")
        self.info = WorkerInfo(ref, self.role, LAYOUT, self.load.total_blocks, self.max_model_len, 400, "host")

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)

    def emit(self, *events: SequenceEvent) -> None:
        """One step's output, on the stream of the router that minted the first event's id."""
        self.streams[events[0].id.epoch].put_nowait(StepOutput(events, self.load))

    def report(self, **changes: Any) -> None:
        """A step without events: a new load to every router."""
        self.load = replace(self.load, **changes)
        for queue in self.streams.values():
            queue.put_nowait(StepOutput((), self.load))

    def break_streams(self) -> None:
        for queue in self.streams.values():
            queue.put_nowait(None)

    @property
    def aborted(self) -> list[str]:
        return [id.request_id for id in self.aborts]

    async def Load(self, request: wpb.LoadRequest, context: Any) -> wpb.WorkerLoad:
        return wire.load_to_wire(self.load)

    async def Outputs(self, request: wpb.OutputsRequest, context: Any) -> AsyncIterator[wpb.StepOutput]:
        queue: asyncio.Queue[StepOutput | None] = asyncio.Queue()
        self.streams[request.epoch] = queue
        yield wire.output_to_wire(StepOutput((), self.load))
        while (output := await queue.get()) is not None:
            yield wire.output_to_wire(output)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "broken by the test")

    async def Expect(self, request: wpb.ExpectRequest, context: Any) -> wpb.Ack:
        async def handle(message: wpb.ExpectRequest) -> wpb.Ack:
            self.log.append("Expect")
            self.expects.append(wire.request_from_wire(message.request))
            self._require_new(self.expects[-1].id)
            return await self._reply("Expect")

        return await answer(context, handle, request)

    async def Prefill(self, request: wpb.PrefillRequest, context: Any) -> wpb.Ack:
        async def handle(message: wpb.PrefillRequest) -> wpb.Ack:
            self.log.append("Prefill")
            prefill = wire.request_from_wire(message.request)
            self.prefills.append((prefill, message.hand_off_to.worker_id))
            self._require_new(prefill.id)
            ack = await self._reply("Prefill")
            self.on_prefill(prefill)
            return ack

        return await answer(context, handle, request)

    async def Abort(self, request: wpb.AbortRequest, context: Any) -> wpb.Ack:
        self.log.append("Abort")
        self.aborts.append(wire.handoff_from_wire(request.id))
        return wpb.Ack()

    def _require_new(self, id: HandoffId) -> None:
        if id in self.aborts:
            raise StaleReference(f"{id} was aborted")

    async def _reply(self, name: str) -> wpb.Ack:
        if name in self.held:
            await self.held[name].wait()
        if name in self.refusals:
            raise self.refusals[name]
        return wpb.Ack()


class FakeController(wrpc.ControllerServicer):
    """Sends the fleet it is told to whoever watches."""

    def __init__(self) -> None:
        self.address = ""
        self.fleet = wpb.Fleet()
        self.num_watchers = 0
        self._changed = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    async def start(self, address: str = "127.0.0.1:0") -> None:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        wrpc.add_ControllerServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(address)
        await self._server.start()
        self.address = f"127.0.0.1:{port}"

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)

    def announce(self, workers: Sequence[FakeWorker], dead: Sequence[FakeWorker] = ()) -> None:
        states = [(worker, "ready") for worker in workers] + [(worker, "dead") for worker in dead]
        members = [
            wpb.FleetMember(info=wire.info_to_wire(worker.info), state=state)
            for worker, state in states
            if worker.info is not None
        ]
        self.fleet = wpb.Fleet(version=self.fleet.version + 1, members=members)
        self._changed.set()
        self._changed = asyncio.Event()

    async def Watch(self, request: wpb.WatchRequest, context: Any) -> AsyncIterator[wpb.Fleet]:
        self.num_watchers += 1
        try:
            while True:
                changed = self._changed
                yield self.fleet
                await changed.wait()
        finally:
            self.num_watchers -= 1


@dataclass
class Scene:
    """A running router, its fleet of fakes, and a channel to it."""

    router: Router
    model_dir: Path
    registry: CollectorRegistry
    controller: FakeController
    workers: list[FakeWorker]
    channel: grpc.aio.Channel
    address: str
    metrics_address: str
    stop: asyncio.Event
    task: asyncio.Task[None]
    stub: Any = field(init=False)

    def __post_init__(self) -> None:
        self.stub = rpc.InferenceStub(self.channel)

    def worker(self, worker_id: str) -> FakeWorker:
        return next(worker for worker in self.workers if worker.worker_id == worker_id)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


@asynccontextmanager
async def running_router(
    model_dir: Path, controller: FakeController, workers: list[FakeWorker], **settings: Any
) -> AsyncIterator[Scene]:
    """A router in this loop, up to the moment it can use every worker."""
    section = RouterConfig(**{"reconnect_s": 0.02, "max_reconnect_s": 0.1, "drain_grace_s": 0.1, **settings})
    config = RouterProcessConfig(controller_address=controller.address, model_dir=str(model_dir), router=section)
    registry = CollectorRegistry()
    router = Router(config, registry)
    stop, addresses = asyncio.Event(), asyncio.get_running_loop().create_future()
    task = asyncio.create_task(router.run(stop, lambda *pair: addresses.set_result(pair)))
    try:
        address, metrics_address = await asyncio.wait_for(addresses, 10)
        async with grpc.aio.insecure_channel(address) as channel:
            scene = Scene(
                router, model_dir, registry, controller, workers, channel, address, metrics_address, stop, task
            )
            await until(lambda: len(router.fleet.views()) == len(workers))
            yield scene
    finally:
        stop.set()
        await asyncio.wait_for(task, 20)


@asynccontextmanager
async def scene_of(model_dir: Path, workers: list[FakeWorker], **settings: Any) -> AsyncIterator[Scene]:
    """Starts the fakes, a controller that announces them, and a router."""
    controller = FakeController()
    for worker in workers:
        await worker.start()
    await controller.start()
    controller.announce(workers)
    try:
        async with running_router(model_dir, controller, workers, **settings) as scene:
            yield scene
    finally:
        await controller.stop()
        for worker in workers:
            await worker.stop()


def split_pair() -> list[FakeWorker]:
    return [FakeWorker("p0", Role.PREFILL), FakeWorker("d0", Role.DECODE)]


def serve_automatically(workers: Sequence[FakeWorker], answer_of: Callable[[WorkerRequest], Sequence[int]]) -> None:
    """Prefill workers send the first token and their decode worker the rest, one token in each step."""
    by_id = {worker.worker_id: worker for worker in workers}

    def play(worker: FakeWorker, request: WorkerRequest) -> None:
        target = by_id.get(worker.prefills[-1][1], worker)
        ids = list(answer_of(request))[: request.sampling.max_tokens]
        last = len(ids) - 1
        done = FinishReason.LENGTH
        worker.emit(SequenceEvent(request.id, 0, tokens(ids[0]), done if last == 0 else None, phases=PREFILL_PHASES))
        for index in range(1, len(ids)):
            end = index == last
            phases = DECODE_PHASES if end else None
            target.emit(SequenceEvent(request.id, index, tokens(ids[index]), done if end else None, phases=phases))

    for worker in workers:
        worker.on_prefill = lambda request, worker=worker: play(worker, request)  # type: ignore[misc]


def failure(id: HandoffId, index: int, kind: str, message: str = "for a reason") -> SequenceEvent:
    return SequenceEvent(id, index, error=EventError(kind, message))


def ask(ids: Sequence[int] = (1, 2, 3), max_tokens: int = 4, **changes: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids), stopping=pb.StoppingOptions(max_tokens=max_tokens), **changes
    )


@dataclass
class Reply:
    """A whole answer, and whether its indices were exact."""

    token_ids: list[int]
    text: str
    finished: pb.Finished


async def responses(call: Any) -> AsyncIterator[pb.GenerateResponse]:
    """The rest of a stream of which some may have been read."""
    while (response := await call.read()) is not grpc.aio.EOF:
        yield response


async def collect(call: Any) -> Reply:
    """Reads to the end; asserts gapless indices and exactly one terminal message, the last."""
    ids: list[int] = []
    text = ""
    finished = None
    async for response in responses(call):
        assert finished is None
        if response.WhichOneof("event") == "output":
            assert response.output.index == len(ids)
            ids.extend(token.token_id for token in response.output.tokens)
            text += response.output.text
        else:
            finished = response.finished
    assert finished is not None
    return Reply(ids, text, finished)


async def error_of(call: Any) -> grpc.aio.AioRpcError:
    """The status that ends the call."""
    try:
        if hasattr(call, "read"):
            async for _ in responses(call):
                continue
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call ended well")


async def cancel(call: Any) -> None:
    call.cancel()
    with suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
        await call.read()


async def started(scene: Scene, **changes: Any) -> tuple[Any, HandoffId]:
    """A call whose prefill has been ordered; nothing has been produced yet."""
    p0 = scene.worker("p0")
    num_before = len(p0.prefills)
    call = scene.stub.Generate(ask(**changes))
    await until(lambda: len(p0.prefills) > num_before)
    return call, p0.prefills[-1][0].id
