"""What the cluster adds to the engine: TTFT and TPOT through router, workers and hand-off against the engine alone.

    python bench/overhead.py [--json] [--rounds N]

Both sides run the same checkpoint, the same prompts and one torch thread pinned to one core. The engine alone lives in
a process of its own; the two take turns, request by request and batch by batch, on the same core, and each pair is
compared by itself: a shared machine changes its speed by a third within a minute. Rows: see `rows`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from _cluster import VOCAB_SIZE, Row, cluster, row, save_60m_model, stream

from pdserve.client import AsyncClient
from pdserve.engine.config import EngineConfig
from pdserve.engine.engine import Engine, build_engine
from pdserve.engine.host_memory import keep_freed_memory
from pdserve.engine.sequence import Sequence
from pdserve.proto.types import HandoffId, SamplingParams, WorkerRequest

PROMPT_TOKENS = 64
NUM_STREAMS = 8
OUTPUT_TOKENS = 64
DEMO_MODEL = Path(__file__).parent.parent / "deploy" / "models" / "demo"

NUM_PAIRS = 24
Times = list[tuple[float, float]]  # (TTFT, TPOT) of each request, in ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of crowded batches")
    parser.add_argument("--direct", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.direct is not None:
        serve_engine(arguments.direct)
        return
    for found in rows(arguments.rounds):
        text = f"{found['name']:>22} {found['value']:>10} {found['unit']:<9} {found['note']}"
        print(json.dumps(found) if arguments.json else text)


def rows(rounds: int) -> Iterator[Row]:
    """Measure everything; one row each."""
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        model = Path(folder) / "llama-60m"
        save_60m_model(model)
        with cluster("bench-60m", model) as up, engine_alone(model) as alone:
            lone, crowd = asyncio.run(measure_pairs(up.endpoint, alone, rounds))
    ttft_cluster, ttft_alone = (statistics.median(side) for side in zip(*lone, strict=True))
    added_ms = statistics.median(ours - theirs for ours, theirs in lone)
    note = f"cluster {ttft_cluster:.1f} ms, engine alone {ttft_alone:.1f} ms; {PROMPT_TOKENS}-token prompts, in pairs"
    yield row("ttft_added_ms_p50", added_ms, "ms", 10.0, added_ms <= 10.0, note)
    tpot_cluster, tpot_alone = (statistics.median(side) for side in zip(*crowd, strict=True))
    ratio = statistics.median(ours / theirs for ours, theirs in crowd)
    note = f"cluster {tpot_cluster:.1f} ms, engine alone {tpot_alone:.1f} ms; {NUM_STREAMS} streams, in pairs"
    yield row("tpot_ratio_c8", ratio, "ratio", 1.10, ratio <= 1.10, note)
    with cluster("bench-demo", DEMO_MODEL) as up:
        rate = asyncio.run(measure_throughput(up.endpoint))
    yield row("stream_tokens_per_s", rate, "tokens/s", None, None, "demo model, 32 streams of 128 tokens, 1P1D")


def prompts(count: int, seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(3, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


async def measure_pairs(endpoint: str, alone: EngineAlone, rounds: int) -> tuple[Times, Times]:
    """(cluster, alone) in ms: TTFT of lone requests, and the median TPOT of crowded batches."""
    first_core, last_core = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    async with AsyncClient(endpoint) as client:
        await one_stream(client, prompts(1, 99)[0], 4)  # connections, first-use costs
        alone.run(prompts(1, 99), 4, first_core)
        lone = []
        for prompt in prompts(NUM_PAIRS, 1):
            ours, _ = await one_stream(client, prompt, 4)
            lone.append((ours, alone.run([prompt], 4, first_core)[0][0]))
        crowd = []
        for seed in range(rounds):
            batch = prompts(NUM_STREAMS, 2 + seed)
            streams = await asyncio.gather(*(one_stream(client, prompt, OUTPUT_TOKENS) for prompt in batch))
            theirs = alone.run(batch, OUTPUT_TOKENS, last_core)
            crowd.append((median_tpot(streams), median_tpot(theirs)))
    return lone, crowd


def median_tpot(times: Times) -> float:
    return statistics.median(tpot for _, tpot in times)


async def one_stream(client: AsyncClient, prompt: list[int], max_tokens: int) -> tuple[float, float]:
    """TTFT and TPOT of one request, in ms, as its client sees them."""
    seen = await stream(client, prompt, max_tokens)
    return seen.ttft_ms, sum(seen.gaps_ms) / (max_tokens - 1)


async def measure_throughput(endpoint: str) -> float:
    """Output tokens per second over 32 streams."""
    async with AsyncClient(endpoint) as client:
        await client.generate([5, 6, 7], max_tokens=8, ignore_eos=True)
        generator = random.Random(3)
        work = [[generator.randrange(10, 4000) for _ in range(32)] for _ in range(32)]
        started_s = time.perf_counter()
        await asyncio.gather(
            *(client.generate(prompt, max_tokens=128, temperature=0.0, ignore_eos=True) for prompt in work)
        )
        return 32 * 128 / (time.perf_counter() - started_s)


class EngineAlone:
    """The engine in a process of its own, fed one batch a line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, batch: list[list[int]], max_tokens: int, core: int) -> Times:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([batch, max_tokens, core]) + "\n")
        self._process.stdin.flush()
        return [(ttft, tpot) for ttft, tpot in json.loads(self._process.stdout.readline())]


@contextmanager
def engine_alone(model: Path) -> Iterator[EngineAlone]:
    command = [sys.executable, __file__, "--direct", str(model)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield EngineAlone(process)
        assert process.stdin is not None
        process.stdin.close()


def serve_engine(model: Path) -> None:
    """Answer batches from stdin until it ends."""
    torch.set_num_threads(1)
    keep_freed_memory()
    engine = build_engine(model, EngineConfig(kv_cache_memory_bytes=128 << 20))
    for line in sys.stdin:
        batch, max_tokens, core = json.loads(line)
        os.sched_setaffinity(0, {core})
        print(json.dumps(run_batch(engine, batch, max_tokens)), flush=True)


def run_batch(engine: Engine, batch: list[list[int]], max_tokens: int) -> Times:
    started_s = time.perf_counter()
    sequences = [Sequence(request(prompt, max_tokens), started_s) for prompt in batch]
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        engine.step(time.perf_counter)
    times = []
    for sequence in sequences:
        assert sequence.first_token_s is not None
        assert sequence.last_token_s is not None
        spread_s = sequence.last_token_s - sequence.first_token_s
        times.append(((sequence.first_token_s - started_s) * 1e3, spread_s * 1e3 / (max_tokens - 1)))
    return times


def request(prompt: list[int], max_tokens: int) -> WorkerRequest:
    handoff = HandoffId(f"bench-{random.getrandbits(64):x}", 0, 1)
    return WorkerRequest(handoff, tuple(prompt), SamplingParams(max_tokens=max_tokens, temperature=0.0), 600.0)


if __name__ == "__main__":
    main()
