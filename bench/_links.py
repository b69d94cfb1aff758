"""Links measured against what the machine does without them: pairs of (limit, link), taken in turns.

The source's side is a process of its own, `python bench/_links.py`: it is told what to do on its standard input, a line
each. What one thread does is timed in CPU seconds of that thread, which others on the machine do not stretch; what two
processes do together, by the wall clock. Knows nothing of rows or targets.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from pdserve.kv_transfer.digest import Digester
from pdserve.kv_transfer.gloo import GlooSink, GlooSource
from pdserve.kv_transfer.link import Landing, PartCheck, Transfer
from pdserve.kv_transfer.shared_pool import SharedPool, map_pool
from pdserve.kv_transfer.shm import ShmSink
from pdserve.proto.types import HandoffId

BLOCK_BYTES = 2 * 12 * 8 * 64 * 16 * 4  # keys and values, 12 layers, 8 heads of 64, 16 tokens, fp32: 768 KiB
NUM_BLOCKS = 192
NUM_BYTES = NUM_BLOCKS * BLOCK_BYTES
RAW_MESSAGE_BYTES = 16 << 20
MAX_MESSAGE_BYTES = 64 << 20  # the default of kv_transfer.max_message_bytes
HOST = "127.0.0.1"
TIMEOUT_S = 120.0
ID = HandoffId("bench", 0, 1)
TRANSFER = Transfer(ID, 0, NUM_BLOCKS, BLOCK_BYTES, 1, 1)

_SCATTERED = random.Random(1)
SOURCE_IDS = tuple(_SCATTERED.sample(range(NUM_BLOCKS), NUM_BLOCKS))
TARGET_IDS = tuple(_SCATTERED.sample(range(NUM_BLOCKS), NUM_BLOCKS))

Clock = Callable[[], float]
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Measured:
    """`ratio`: the median over all turns of the limit's time over the link's; `limit_gbps`: 10^9 bytes/s, median."""

    ratio: float
    limit_gbps: float


def measure(limit: Call, calls: Sequence[Call], turns: int, clock: Clock) -> list[Measured]:
    """One for each of `calls`, each of which is compared with the limit just before and just after it."""

    def timed(call: Call) -> float:
        started = clock()
        call()
        return clock() - started

    for call in (limit, *calls):
        call()  # first-use costs
    limits, ratios = [timed(limit)], [[] for _ in calls]  # type: list[float], list[list[float]]
    for _ in range(turns):
        for call, found in zip(calls, ratios, strict=True):
            took = timed(call)
            limits.append(timed(limit))
            found.append((limits[-2] + limits[-1]) / 2 / took)
    limit_gbps = NUM_BYTES / statistics.median(limits) / 1e9
    return [Measured(statistics.median(found), limit_gbps) for found in ratios]


def accept(first: int, pool: torch.Tensor, block_ids: Sequence[int]) -> None:
    """Digests off."""


def vouched(pool: torch.Tensor) -> PartCheck:
    digester = Digester("xxh3")
    digests = digester.digests(ID, TRANSFER.layout_hash, 0, pool, SOURCE_IDS)
    return digester.checker(ID, TRANSFER.layout_hash, 0, digests, NUM_BLOCKS)


def blocks(memory: SharedPool) -> torch.Tensor:
    """Content that both processes know."""
    generator = torch.Generator().manual_seed(1)
    memory.tensor.copy_(torch.randint(0, 256, (NUM_BYTES,), dtype=torch.uint8, generator=generator))
    return memory.tensor.view(NUM_BLOCKS, BLOCK_BYTES)


def measure_digest(turns: int) -> Measured:
    """XXH3 digests of a pool against the sum of its 64-bit words."""
    memory = SharedPool(NUM_BYTES)
    pool = blocks(memory)
    digester, words = Digester("xxh3"), pool.view(torch.int64)
    found = measure(words.sum, [lambda: digester.digests(ID, 1, 0, pool, SOURCE_IDS)], turns, time.thread_time)
    memory.close()
    return found[0]


def measure_shm(turns: int) -> list[Measured]:
    """`ShmSink.receive` without and with digests against one memcpy, from another process's pool into ours."""
    memory = SharedPool(NUM_BYTES)
    with source_process() as source:
        address = source.ask("shm")
        sink, check = ShmSink(address, 1, 1), vouched(blocks(memory))
        landing = Landing(memory.tensor.view(NUM_BLOCKS, BLOCK_BYTES), TARGET_IDS)
        theirs, ours = map_pool(address), memory.tensor.data_ptr()

        def receive(check: PartCheck) -> None:
            sink.receive(TRANSFER, SOURCE_IDS, landing, check, TIMEOUT_S)

        def copy() -> None:
            ctypes.memmove(ours, theirs.ctypes.data, NUM_BYTES)

        found = measure(copy, [lambda: receive(accept), lambda: receive(check)], turns, time.thread_time)
        sink.close()
    memory.close()
    return found


def measure_gloo(turns: int) -> list[Measured]:
    """`GlooSink.receive` without and with digests against `torch.distributed.recv` of as many bytes."""
    memory = SharedPool(NUM_BYTES)
    check = vouched(blocks(memory))
    landing = Landing(memory.tensor.view(NUM_BLOCKS, BLOCK_BYTES), TARGET_IDS)
    sink = GlooSink(1, 1, HOST, MAX_MESSAGE_BYTES)
    with tempfile.TemporaryDirectory() as folder, source_process() as source:
        source.tell("gloo", sink.address, str(Path(folder) / "store"))
        join(0, str(Path(folder) / "store"))

        def raw() -> None:
            source.tell("raw")
            for message in raw_messages(landing.pool):
                dist.recv(message, 1)

        def receive(check: PartCheck) -> None:
            source.tell("send")
            sink.receive(TRANSFER, SOURCE_IDS, landing, check, TIMEOUT_S)

        found = measure(raw, [lambda: receive(accept), lambda: receive(check)], turns, time.perf_counter)
        sink.close()
        dist.destroy_process_group()
    memory.close()
    return found


def join(rank: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


def raw_messages(pool: torch.Tensor) -> Sequence[torch.Tensor]:
    return torch.split(pool.flatten(), RAW_MESSAGE_BYTES)


class SourceProcess:
    """The other end of a link, fed one command a line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def tell(self, *words: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()

    def ask(self, *words: str) -> str:
        self.tell(*words)
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def source_process() -> Iterator[SourceProcess]:
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield SourceProcess(process)
            assert process.stdin is not None
            process.stdin.close()
            process.wait(TIMEOUT_S)
        finally:
            process.kill()


def serve() -> None:
    """Do what standard input says until it ends."""
    torch.set_num_threads(1)
    memory = SharedPool(NUM_BYTES)
    pool = blocks(memory)
    source: GlooSource | None = None
    for line in sys.stdin:
        match json.loads(line):
            case ["shm"]:
                print(memory.address, flush=True)
            case ["gloo", address, store]:
                join(1, store)
                source = GlooSource(address, pool, 1, 1, HOST, MAX_MESSAGE_BYTES)
            case ["raw"]:
                for message in raw_messages(pool):
                    dist.send(message, 0)
            case ["send"] if source is not None:
                source.send(TRANSFER, SOURCE_IDS, TIMEOUT_S)
    if source is not None:
        source.close()
        dist.destroy_process_group()


if __name__ == "__main__":
    serve()
