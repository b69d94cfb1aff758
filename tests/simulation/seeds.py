"""Runs many seeds: in a pool of processes, or again in one that hashes strings differently.

Knows nothing of what is asked of the seeds.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from simulation.run import Report, run

NUM_PROCESSES = 2
SEEDS_AT_ONCE = 10


def seeds_of(text: str) -> range:
    """`2000` is the first 2000 seeds, `17-19` those three."""
    first, dash, last = text.partition("-")
    return range(int(first), int(last) + 1) if dash else range(int(first))


def try_run(seed: int, keep_lines: bool = False) -> Report:
    """A simulator that raises has failed too."""
    try:
        return run(seed, keep_lines)
    except Exception:
        failure = f"the simulator raised: {traceback.format_exc()}"
        return Report(seed, f"seed {seed}", "", (failure,), Counter(), 0, 0.0)


def run_some(seeds: list[int]) -> list[Report]:
    """In a process of the pool."""
    torch.set_num_threads(1)
    return [try_run(seed) for seed in seeds]


def run_all(seeds: range) -> Iterator[Report]:
    """Every seed's report, in order, from as many processes as are worth it."""
    chunks = [list(seeds[first : first + SEEDS_AT_ONCE]) for first in range(0, len(seeds), SEEDS_AT_ONCE)]
    if len(chunks) == 1:
        yield from run_some(chunks[0])
        return
    with ProcessPoolExecutor(NUM_PROCESSES, multiprocessing.get_context("spawn")) as pool:
        for reports in pool.map(run_some, chunks):
            yield from reports


def digests_elsewhere(seeds: Iterable[int], hash_seed: int) -> dict[int, str]:
    """The same seeds' traces in a new process whose strings hash differently."""
    command = [sys.executable, "-m", "simulation", "--digests", ",".join(map(str, seeds))]
    folder = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": folder}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return {int(seed): digest for seed, digest in (line.split() for line in output.splitlines())}
