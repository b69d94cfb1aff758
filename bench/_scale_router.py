"""One real router process in front of pretended workers: what a request and a token cost it, gRPC and all.

The workers are gRPC servers in this process that compute nothing: a prefill answers at once, and each decode worker
gives every sequence one token a step. Clients are here too. What counts is the router's own processor time, so that it
does not matter who else is busy. Everything is on one machine: what a network would add is not seen.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
from _cluster import Row, row
from _scale_costs import made_up_info

from pdserve.proto import inference_pb2 as api
from pdserve.proto import inference_pb2_grpc as api_rpc
from pdserve.proto import wire
from pdserve.proto import worker_pb2 as pb
from pdserve.proto import worker_pb2_grpc as rpc
from pdserve.proto.channels import SERVER_OPTIONS, open_channel
from pdserve.proto.types import HandoffId, WorkerInfo, WorkerRef

DEMO_MODEL = Path(__file__).parent.parent / "deploy" / "models" / "demo"
SIZES = (8, 64, 256)
NUM_REQUESTS, CONCURRENCY = 384, 96
PROMPT_TOKENS = 1_000
MANY_TOKENS = 101
STEP_S = 0.03
TICKING_S = 4.0
Answers = dict[HandoffId, tuple[int, int]]
"""Of each sequence: the next index, and the number of tokens it ends after."""


class PretendWorker(rpc.WorkerServicer):
    """One worker of which a router cannot tell that it computes nothing."""

    def __init__(self, info: WorkerInfo, others: dict[str, PretendWorker]) -> None:
        self.info = info
        self._others = others
        self._load = pb.WorkerLoad(
            worker_id=info.worker.worker_id, generation=1, role=info.role, total_blocks=10**6, free_blocks=10**6
        )
        self._answers: Answers = {}
        self._events: list[pb.SequenceEvent] = []
        self._due = asyncio.Event()
        self._is_ticking = False
        self.num_messages = 0

    def tick(self) -> None:
        """From now on there is a step at a time, with or without tokens."""
        self._is_ticking = True
        self._due.set()

    async def Load(self, request: pb.LoadRequest, context: Any) -> pb.WorkerLoad:
        return self._load

    async def Expect(self, request: pb.ExpectRequest, context: Any) -> pb.Ack:
        return pb.Ack()

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.Ack:
        self._answers.pop(wire.handoff_from_wire(request.id), None)
        return pb.Ack()

    async def Prefill(self, request: pb.PrefillRequest, context: Any) -> pb.Ack:
        id, num_tokens = request.request.id, request.request.sampling.max_tokens
        reason = "length" if num_tokens == 1 else ""
        self._events.append(pb.SequenceEvent(id=id, tokens=[pb.TokenInfo(token_id=7)], finish_reason=reason))
        self._due.set()
        if num_tokens > 1:
            self._others[request.hand_off_to.worker_id].decode(wire.handoff_from_wire(id), num_tokens)
        return pb.Ack()

    def decode(self, id: HandoffId, num_tokens: int) -> None:
        self._answers[id] = (1, num_tokens)
        self._due.set()

    async def Outputs(self, request: pb.OutputsRequest, context: Any) -> AsyncIterator[pb.StepOutput]:
        yield pb.StepOutput(load=self._load)
        while True:
            await self._due.wait()
            await asyncio.sleep(STEP_S)
            self._step()
            events, self._events = self._events, []
            if not self._answers and not self._is_ticking:
                self._due.clear()
            self.num_messages += 1
            yield pb.StepOutput(events=events, load=self._load)

    def _step(self) -> None:
        """A token for every sequence."""
        token = [pb.TokenInfo(token_id=7)]
        for id, (index, num_tokens) in list(self._answers.items()):
            is_last = index + 1 == num_tokens
            reason = "length" if is_last else ""
            event = pb.SequenceEvent(id=wire.handoff_to_wire(id), index=index, tokens=token, finish_reason=reason)
            self._events.append(event)
            self._answers[id] = (index + 1, num_tokens)
            if is_last:
                del self._answers[id]


class PretendController(rpc.ControllerServicer):
    """A fleet that never changes."""

    def __init__(self, infos: list[WorkerInfo]) -> None:
        members = [pb.FleetMember(info=wire.info_to_wire(info), state="ready") for info in infos]
        self._fleet = pb.Fleet(version=1, members=members)

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.Fleet]:
        yield self._fleet
        await asyncio.Event().wait()


@asynccontextmanager
async def pretended_cell(size: int) -> AsyncIterator[tuple[str, list[PretendWorker]]]:
    """So many workers, and the address of their controller."""
    servers, workers = [], dict[str, PretendWorker]()
    for number in range(size):
        info = replace(made_up_info(number, size), max_model_len=2048, vocab_size=4096)
        worker_id = info.worker.worker_id
        server = grpc.aio.server(options=SERVER_OPTIONS)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        worker = PretendWorker(replace(info, worker=WorkerRef(worker_id, 1, address)), workers)
        rpc.add_WorkerServicer_to_server(worker, server)
        workers[worker_id] = worker
        servers.append(server)
    controller = grpc.aio.server(options=SERVER_OPTIONS)
    rpc.add_ControllerServicer_to_server(PretendController([one.info for one in workers.values()]), controller)
    port = controller.add_insecure_port("127.0.0.1:0")
    servers.append(controller)
    await asyncio.gather(*(server.start() for server in servers))
    try:
        yield f"127.0.0.1:{port}", list(workers.values())
    finally:
        await asyncio.gather(*(server.stop(None) for server in servers))


@dataclass(frozen=True, slots=True)
class RouterProcess:
    address: str
    process: psutil.Process

    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)


@asynccontextmanager
async def router(controller: str) -> AsyncIterator[RouterProcess]:
    """`pdserve.router` as a cluster starts it."""
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        path = Path(folder) / "router.json"
        path.write_text(json.dumps({"controller_address": controller, "model_dir": str(DEMO_MODEL)}))
        command = (sys.executable, "-m", "pdserve.router", str(path), "--exit-with-parent")
        pipe = asyncio.subprocess.PIPE
        quiet = asyncio.subprocess.DEVNULL
        started = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=quiet)
        assert started.stdout is not None
        assert started.stdin is not None
        try:
            line = json.loads(await started.stdout.readline())
            yield RouterProcess(line["address"], psutil.Process(started.pid))
        finally:
            started.stdin.close()
            await started.wait()


async def ask(address: str, num_requests: int, num_tokens: int) -> None:
    """So many requests, some at a time, over connections of their own."""
    left = iter(range(num_requests))

    async def client() -> None:
        async with open_channel(address) as channel:
            stub = api_rpc.InferenceStub(channel)
            for _ in left:
                stopping = api.StoppingOptions(max_tokens=num_tokens, ignore_eos=True)
                prompt = api.TokenIds(ids=range(10, 10 + PROMPT_TOKENS))
                async for _ in stub.Generate(api.GenerateRequest(token_ids=prompt, stopping=stopping)):
                    pass

    await asyncio.gather(*(client() for _ in range(CONCURRENCY)))


@dataclass(frozen=True, slots=True)
class Cost:
    """Processor seconds of the router: for a request of one token, for one more token, for a message without any."""

    request_s: float
    token_s: float
    message_s: float


async def measure(size: int) -> Cost:
    async with pretended_cell(size) as (controller, workers), router(controller) as running:
        await wait_until_ready(running.address)
        await ask(running.address, CONCURRENCY, 4)
        marks = [running.cpu_s()]
        for num_tokens in (1, MANY_TOKENS):
            await ask(running.address, NUM_REQUESTS, num_tokens)
            marks.append(running.cpu_s())
        for worker in workers:
            worker.tick()
        await asyncio.sleep(TICKING_S / 4)
        before, before_s = sum(worker.num_messages for worker in workers), running.cpu_s()
        await asyncio.sleep(TICKING_S)
        num_messages = sum(worker.num_messages for worker in workers) - before
        message_s = (running.cpu_s() - before_s) / num_messages
    short_s, long_s = (later - sooner for sooner, later in pairwise(marks))
    return Cost(short_s / NUM_REQUESTS, (long_s - short_s) / NUM_REQUESTS / (MANY_TOKENS - 1), message_s)


async def wait_until_ready(address: str) -> None:
    """The first answer: the router has met workers of both roles."""
    for _ in range(100):
        try:
            await ask(address, 1, 2)
            return
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.1)
    raise TimeoutError("the router did not serve")


def process_rows(output_tokens: float) -> Iterator[Row]:
    """`output_tokens` of a request, in the mean."""
    for size in SIZES:
        cost = asyncio.run(measure(size))
        rate = 1 / (cost.request_s + output_tokens * cost.token_s)
        note = f"{PROMPT_TOKENS}-token prompt, one token out"
        yield row(f"router_request_us_{size}w", cost.request_s * 1e6, "us", None, None, note)
        note = f"{CONCURRENCY} streams; a core full of them is {1 / cost.token_s:,.0f} tokens/s"
        yield row(f"router_token_us_{size}w", cost.token_s * 1e6, "us", None, None, note)
        note = f"no tokens in it; a core full of them is {1 / cost.message_s:,.0f} steps/s"
        yield row(f"router_message_us_{size}w", cost.message_s * 1e6, "us", None, None, note)
        note = f"of {output_tokens:.0f} tokens each, on one core, steps of others not counted"
        yield row(f"router_requests_per_s_{size}w", rate, "requests/s", None, None, note)
