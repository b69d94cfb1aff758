"""What the control plane does for a cell of N workers, timed call by call: router, controller and planner.

Everything here is the production code, fed with made-up workers and called in one process: no sockets, no gRPC. A time
is the median of several rounds of processor time. `_scale_router` measures a whole router process.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from _cluster import PDSERVE, Row, row
from _scale_cells import CellRun, large_model_profile, num_prefill, run_cell

from pdserve.cluster.fleet_watch import Peerage
from pdserve.cluster.pair_links import pair_links
from pdserve.cluster.planner import profile as profiles
from pdserve.cluster.planner.findings import Target
from pdserve.cluster.planner.fleets import Limit, fleets_of
from pdserve.cluster.planner.search import EFFORTS
from pdserve.cluster.planner.setups import Choices
from pdserve.cluster.planner.tuning import Request, candidates
from pdserve.proto import wire
from pdserve.proto import worker_pb2 as pb
from pdserve.proto.types import (
    HandoffId,
    KVLayout,
    Role,
    SequenceEvent,
    StepOutput,
    TokenInfo,
    WorkerInfo,
    WorkerLoad,
    WorkerRef,
)
from pdserve.router.candidates import Candidates
from pdserve.router.completion import Completion
from pdserve.router.config import RouterConfig
from pdserve.router.fleet import Fleet
from pdserve.router.model import Model
from pdserve.router.pipeline import Pipeline
from pdserve.router.policy import least_loaded
from pdserve.router.server import InferenceServicer
from pdserve.router.view import WorkerView

SIZES = (8, 64, 256, 1024, 10_000)
BATCHES = (1, 16, 64, 128)
CHANGES = 5
"""Views that change between two placements: in a cell of this model, three steps end and two workers were placed on."""

ROUNDS = 5
LAYOUT = KVLayout("70b-fp8-" + "0" * 56, "float16", 80, 8, 128, 16)
LINKS = ("shm", "cuda_ipc", "nccl", "gloo")
MOST_PAIRED = 1024
SPEED_RATE, SPEED_REQUESTS, SPEED_S = 4.0, 4_000, 5.0


def made_up_info(number: int, size: int) -> WorkerInfo:
    """A worker of a host with eight GPUs."""
    role = Role.PREFILL if number < num_prefill(size) else Role.DECODE
    host = f"10.{number >> 19}.{number >> 11 & 255}.{number >> 3 & 255}"
    worker = WorkerRef(f"{role}-{number}", 1, f"{host}:{20_000 + number % 8}")
    links = {"cuda_ipc": f"gpu{number % 8}", "nccl": f"{host}:{30_000 + number % 8}"}
    cores = tuple(range(4 * (number % 8), 4 * (number % 8) + 4))
    return WorkerInfo(
        worker, role, LAYOUT, 22_500, 32_768, 128_256, f"host-{number // 8}", links, f"{host}:9400", cores
    )


def made_up_load(info: WorkerInfo, random: random.Random) -> WorkerLoad:
    used = random.randrange(info.num_blocks)
    counts = (random.randrange(8), random.randrange(120), random.randrange(8_000), info.num_blocks)
    blocks = (info.num_blocks - used, used, 0, 0, 0, random.randrange(500))
    return WorkerLoad(info.worker.worker_id, 1, info.role, *counts, *blocks, 0.03, False, random.randrange(1 << 30), 0)


def cpu_s(call: Callable[[], object], times: int = 1) -> float:
    """Of one call: the median of some rounds of so many calls."""
    rounds = []
    for _ in range(ROUNDS):
        started_s = time.process_time()
        for _ in range(times):
            call()
        rounds.append((time.process_time() - started_s) / times)
    return statistics.median(rounds)


def yardstick_rows() -> Iterator[Row]:
    """So that another machine's figures can be held against these."""
    took_s = cpu_s(lambda: sum(number * number for number in range(1_000_000)))
    yield row("yardstick_ms", took_s * 1e3, "ms", None, None, "a million turns of a Python loop, on this machine now")


def router_rows() -> Iterator[Row]:
    for size in SIZES:
        yield placement_row(size)
        yield limits_row(size)
    for batch in BATCHES:
        yield output_row(batch)


def placement_row(size: int) -> Row:
    """Put the workers that have changed, then choose: what `Fleet.candidates` and `place` do for a request."""
    numbers = random.Random(0)
    infos = [made_up_info(number, size) for number in range(size)]
    known = Candidates(WorkerView(made_up_load(info, numbers), LAYOUT) for info in infos)
    news = [[made_up_load(numbers.choice(infos), numbers) for _ in range(CHANGES)] for _ in range(500)]
    turns = iter(range(1 << 62))

    def place_some() -> None:
        for loads in news:
            for load in loads:
                known.put(WorkerView(load, LAYOUT))
            least_loaded(known, 1000, next(turns))

    took_s = cpu_s(place_some) / len(news)
    return row(f"placement_us_{size}w", took_s * 1e6, "us", None, None, f"{CHANGES} workers changed, one chosen pair")


def limits_row(size: int) -> Row:
    """What every request is checked against: the least of all workers' limits."""
    infos = [made_up_info(number, size) for number in range(size)]
    model = Model("70b", "llama", 128_256, 32_768, (), None)
    fleet, pipeline = SimpleNamespace(infos=lambda: list(infos)), SimpleNamespace()
    servicer = InferenceServicer(model, RouterConfig(), cast(Fleet, fleet), cast(Pipeline, pipeline))
    took_s = cpu_s(servicer._limits, 20)
    servicer.close()
    return row(f"request_limits_us_{size}w", took_s * 1e6, "us", None, None, "for every request, over all workers")


def output_row(batch: int) -> Row:
    """Bytes of a decode step to tokens in the completions: parse, translate, look up, accept."""
    ids = [HandoffId(f"{number:024x}", number, 1 << 40) for number in range(batch)]
    load = made_up_load(made_up_info(7, 8), random.Random(0))
    steps = [
        wire.output_to_wire(StepOutput(tuple(SequenceEvent(id, step, (TokenInfo(7),)) for id in ids), load))
        for step in range(1, 101)
    ]
    messages = [step.SerializeToString() for step in steps]

    def receive() -> None:
        sinks = {id: Completion("prefill-0", "decode-7", 1024) for id in ids}
        for data in messages:
            output = wire.output_from_wire(pb.StepOutput.FromString(data))
            for event in output.events:
                sinks[event.id].accept("decode-7", event)

    took_s = cpu_s(receive) / len(messages)
    note = f"{len(messages[0]):,} bytes; {took_s / batch * 1e6:.1f} us a token"
    return row(f"step_output_us_{batch}seq", took_s * 1e6, "us", None, None, note)


def controller_rows() -> Iterator[Row]:
    for size in SIZES:
        yield from fleet_rows(size)
    for size in SIZES:
        if size <= MOST_PAIRED:
            yield pair_row(size)


def fleet_rows(size: int) -> Iterator[Row]:
    """One message of `Watch`: what the controller does for each watcher, and each watcher with it."""
    infos = [made_up_info(number, size) for number in range(size)]

    def build() -> bytes:
        members = [pb.FleetMember(info=wire.info_to_wire(info), state="ready") for info in infos]
        return pb.Fleet(version=1, members=members).SerializeToString()

    data, peers = build(), Peerage()
    encode_s, peer_s = cpu_s(build), cpu_s(lambda: peers.gone(pb.Fleet.FromString(data)))
    router_s = cpu_s(lambda: [wire.info_from_wire(member.info) for member in pb.Fleet.FromString(data).members])
    total_bytes, total_s = (size + 1) * len(data), (size + 1) * encode_s
    note = f"a change is {total_bytes / 1e6:,.2f} MB to {size + 1:,} watchers, {total_s:,.3f} s of the controller"
    yield row(f"fleet_message_kb_{size}w", len(data) / 1e3, "kB", None, None, note)
    note = f"for each watcher; it then takes a worker {peer_s * 1e3:.2f} ms and a router {router_s * 1e3:.2f} ms"
    yield row(f"fleet_encode_ms_{size}w", encode_s * 1e3, "ms", None, None, note)


def pair_row(size: int) -> Row:
    """`pair_links` for every pair, which the end of a launch and each `pdserve status` ask for."""
    infos = [made_up_info(number, size) for number in range(size)]
    num_pairs = num_prefill(size) * (size - num_prefill(size))
    one = pair_links(LINKS, infos[:1] + infos[-1:])[0]
    num_bytes = pb.StatusResponse(links=[pb.PairLink(source=one.source, target=one.target, kind=one.kind)]).ByteSize()
    started_s = time.process_time()
    pair_links(LINKS, infos)
    took_s = time.process_time() - started_s
    note = f"{num_pairs:,} pairs, at least {num_pairs * num_bytes / 1e6:,.2f} MB of a status"
    return row(f"pair_links_s_{size}w", took_s, "s", None, None, note)


def planner_rows() -> Iterator[Row]:
    """The set-ups that a search has to choose from, before anything is simulated."""
    profile = large_model_profile()
    fleets = fleets_of([profile], {})
    targets = (Target("all", 1000.0, 40.0, 0.9),)
    for num_gpus in (8, 64, 256):
        request = Request(
            fleets, Limit(num_gpus, None, None), Choices(), targets, "azure-conv", 1155.0, 211.0, EFFORTS["normal"], 0
        )
        started_s = time.process_time()
        found = candidates(request)
        took_s = time.process_time() - started_s
        note = f"{len(found):,} set-ups to choose from"
        yield row(f"tune_candidates_s_{num_gpus}gpu", took_s, "s", None, None, note)
        yield tune_row(num_gpus)


def tune_row(num_gpus: int) -> Row:
    """Processor time of the command, whose effort bounds how many requests it simulates."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        path.write_text(profiles.dump(large_model_profile()))
        command = [*PDSERVE, "tune", "--profile", str(path), "--gpus", str(num_gpus), "--effort", "quick", "--json"]
        before, started_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run([*command, "--ttft-ms", "1000", "--tpot-ms", "40"], check=True, stdout=subprocess.PIPE)
        after, took_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started_s
    answer, busy_s = json.loads(done.stdout), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    tried = f"{len(answer['findings'])} set-ups tried with {answer['num_requests']:,} requests"
    note = f"of all its processes, {took_s:.0f} s by the clock; {tried}: {answer['verdict']}"
    return row(f"tune_quick_cpu_s_{num_gpus}gpu", busy_s, "s", None, None, note)


def speed_rows(trace: Path | None) -> Iterator[Row]:
    """How fast the planner simulates cells of each size, on one core."""
    for size in (8, 64, 256, 1024):
        rate = SPEED_RATE * size
        run = CellRun(size, SPEED_RATE, max(SPEED_REQUESTS / rate, SPEED_S), 0, trace)
        started_s = time.process_time()
        run_cell(run)
        took_s = time.process_time() - started_s
        value = rate * run.seconds / took_s
        note = f"{rate * run.seconds:,.0f} requests; a simulated second takes {took_s / run.seconds:.2f} s"
        yield row(f"simulated_requests_per_s_{size}w", value, "requests/s", None, None, note)
