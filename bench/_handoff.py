"""The hand-off as users feel it: what it adds beside the bytes, what overlaps with prefill, what the digests cost.

One prefill and one decode worker, a core each, a model of 60 million parameters. Rows:

    handoff_fixed_ms_p50      gap between the first two tokens of a one-block prompt, less a normal decode step
    digest_ttft_share         time to digest a 512-token prompt's KV on both ends, over its TTFT
    overlap_tail_chunks       KV still to move when a 2,048-token prompt is computed in chunks of 256, in chunks
    overlap_gap_ratio         its gap between first and second token, over 1.5 decode steps and one chunk's transfer
    handoff_blocks_left       blocks that are not free on either worker after all of it
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import torch
from _cluster import VOCAB_SIZE, Row, Stream, cluster, row, save_60m_model, stream
from prometheus_client.parser import text_string_to_metric_families

from pdserve.client import AsyncClient
from pdserve.cluster.state import ClusterState
from pdserve.cluster.status_command import take
from pdserve.kv_transfer.digest import Digester
from pdserve.proto.types import HandoffId, KVLayout

CHUNK_TOKENS = 256
BLOCK_SIZE = 16
LAYOUT = KVLayout("bench", "float32", num_layers=9, num_kv_heads=5, head_dim=64, block_size=BLOCK_SIZE)
SETTLE_S = 5.0
NUM_LONG = 16


def handoff_rows() -> Iterator[Row]:
    """Measure everything; one row each."""
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        model = Path(folder) / "llama-60m"
        save_60m_model(model)
        settings = (f"engine.max_num_batched_tokens={CHUNK_TOKENS}", "engine.kv_cache_memory_bytes=536870912")
        with cluster("bench-handoff", model, *settings, "engine.prefix_caching=false") as up:
            yield asyncio.run(fixed_row(up.endpoint))
            yield asyncio.run(digest_row(up.endpoint))
            yield from asyncio.run(overlap_rows(up))
            yield left_row(up)


def random_prompt(num_tokens: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, VOCAB_SIZE) for _ in range(num_tokens)]


async def fixed_row(endpoint: str) -> Row:
    async with AsyncClient(endpoint) as client:
        await stream(client, random_prompt(BLOCK_SIZE, 0), 4)  # connections, first-use costs
        streams = [await stream(client, random_prompt(BLOCK_SIZE - 1, seed), 12) for seed in range(1, 61)]
    added = [seen.gaps_ms[0] - statistics.median(seen.gaps_ms[1:]) for seen in streams]
    step_ms = statistics.median(gap for seen in streams for gap in seen.gaps_ms[1:])
    value = statistics.median(added)
    note = f"one block of {LAYOUT.block_bytes >> 10} KiB; a decode step takes {step_ms:.1f} ms; 60 requests"
    return row("handoff_fixed_ms_p50", value, "ms", 2.0, value <= 2.0, note)


async def digest_row(endpoint: str) -> Row:
    num_blocks = LAYOUT.num_blocks(512)
    blocks = torch.randint(0, 256, (num_blocks, LAYOUT.block_bytes), dtype=torch.uint8)
    digester, id, ids = Digester("xxh3"), HandoffId("bench", 0, 1), range(num_blocks)
    async with AsyncClient(endpoint) as client:
        shares = []
        for seed in range(8):
            seen = await stream(client, random_prompt(512, 100 + seed), 2)
            started_s = time.perf_counter()
            expected = digester.digests(id, LAYOUT.hash64(), 0, blocks, ids)
            digester.checker(id, LAYOUT.hash64(), 0, expected)(0, blocks, ids)
            shares.append((time.perf_counter() - started_s) * 1e3 / seen.ttft_ms)
    value = statistics.median(shares)
    note = f"both ends' digests of {num_blocks} blocks of {LAYOUT.block_bytes >> 10} KiB, none of it before the token"
    return row("digest_ttft_share", value, "ratio", 0.03, value <= 0.03, note)


async def overlap_rows(up: ClusterState) -> list[Row]:
    chunk_bytes = CHUNK_TOKENS // BLOCK_SIZE * LAYOUT.block_bytes
    tails, ratios, gaps = [], [], []
    async with AsyncClient(up.endpoint) as client:
        for seed in range(NUM_LONG):
            before = sums(up)
            seen = await stream(client, random_prompt(2048, 200 + seed), 12)
            after = sums(up)
            moved = {name: after[name] - before.get(name, 0.0) for name in after}
            part_ms = moved["pdserve_handoff_seconds_sum"] / moved["pdserve_handoff_seconds_count"] * 1e3
            tails.append(moved["pdserve_handoff_tail_bytes_sum"] / chunk_bytes)
            gaps.append(seen.gaps_ms[0])
            ratios.append(gap_ratio(seen, part_ms))
    tail, ratio = max(tails), statistics.median(ratios)
    return [
        row("overlap_tail_chunks", tail, "chunks", 1.0, tail <= 1.0, f"largest of {NUM_LONG} prompts of 2,048 tokens"),
        row(
            "overlap_gap_ratio",
            ratio,
            "ratio",
            1.0,
            ratio <= 1.0,
            f"first to second token {statistics.median(gaps):.1f} ms at the client",
        ),
    ]


def gap_ratio(seen: Stream, part_ms: float) -> float:
    normal_ms: float = statistics.median(seen.gaps_ms[1:])
    return seen.gaps_ms[0] / (1.5 * normal_ms + part_ms)


def sums(up: ClusterState) -> dict[str, float]:
    """The hand-off metrics of the decode worker: sums and counts, over all labels."""
    workers = [worker.member.info for worker in take(up).workers if worker.member.info.role == "decode"]
    found: dict[str, float] = {}
    with urlopen(f"http://{workers[0].metrics_address}/metrics", timeout=5.0) as reply:
        for family in text_string_to_metric_families(reply.read().decode()):
            for sample in family.samples:
                if sample.name.startswith("pdserve_handoff") and sample.name.endswith(("_sum", "_count", "_total")):
                    found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def left_row(up: ClusterState) -> Row:
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        loads = [worker.load for worker in take(up).workers]
        left = sum(load.total_blocks - load.free_blocks for load in loads)
        if left == 0 or time.monotonic() > deadline_s:
            return row("handoff_blocks_left", left, "blocks", 0, left == 0, "both workers, after all of the above")
        time.sleep(0.1)
