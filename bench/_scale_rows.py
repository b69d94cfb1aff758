"""The simulated rows of `bench/scale.py`: cells of four sizes, all the cells of one size, and lost workers.

Knows nothing of how a cell is simulated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from _cluster import Row, row
from _scale_cells import NUM_GPUS, CellRun, num_prefill, run_all, seeds, together

SIZES = {8: 6, 64: 2, 250: 2, 1000: 1}
"""Sizes of cells, and how many of each are simulated."""

RATES = (3.0, 3.4, 3.8, 4.0, 4.2, 4.3, 4.4)
"""Requests per second and GPU."""

TARGET_SHARE = 0.99
WHOLE_SIZE, WHOLE_RATE = 250, 4.2
LOSS_RATE = 4.0
MOST_TIMES = 6.0

FAILURES, FAILURE_DAYS, FAILURE_GPUS = 419, 54, 16_384
"""Unexpected interruptions of one training run on H100s (The Llama 3 Herd of Models, 2024, section 3.3.4)."""


def seconds_of(size: int, seconds: float) -> float:
    """Small cells run for longer: they see fewer requests, and swing more slowly for their size."""
    return seconds * min(MOST_TIMES, math.sqrt(max(SIZES) / size))


def cell_rows(trace: Path | None, seconds: float) -> Iterator[Row]:
    """Attainment by size and rate, and for each size the rate at which it falls to the target."""
    shares: dict[int, list[float]] = {size: [] for size in SIZES}
    cells = [
        seeds(CellRun(size, rate, seconds_of(size, seconds), 0, trace), num)
        for size, num in SIZES.items()
        for rate in RATES
    ]
    found = run_all([run for some in cells for run in some])
    for some in cells:
        run, seen = some[0], together([next(found) for _ in some])
        shares[run.size].append(seen.attainment)
        note = f"{len(some)} cells of {run.size}; {seen.describe()}"
        yield row(f"cell{run.size}_attainment_at_{run.rate_per_gpu:g}", seen.attainment, "share", None, None, note)
    for size, found_shares in shares.items():
        goodput = crossing(found_shares)
        note = f"where {TARGET_SHARE:.0%} meet both targets; {NUM_GPUS * goodput:,.0f} requests/s in all"
        yield row(f"cell{size}_goodput_per_gpu", goodput, "requests/s", None, None, note)


def crossing(shares: list[float]) -> float:
    """The rate at which attainment falls to the target, between the rates that were run; 0 below all of them."""
    if shares[0] < TARGET_SHARE:
        return 0.0
    pairs = list(zip(RATES, shares, strict=True))
    for (low, above), (high, below) in pairwise(pairs):
        if below < TARGET_SHARE:
            return low + (high - low) * (above - TARGET_SHARE) / (above - below)
    return RATES[-1]


def whole_rows(trace: Path | None, seconds: float) -> Iterator[Row]:
    """Every cell of one size: 10,000 GPUs."""
    runs = seeds(CellRun(WHOLE_SIZE, WHOLE_RATE, seconds, 0, trace), NUM_GPUS // WHOLE_SIZE)
    found = list(run_all(runs))
    whole, shares = together(found), sorted(one.attainment for one in found)
    note = (
        f"{len(runs)} cells of {WHOLE_SIZE}, {WHOLE_RATE * NUM_GPUS:,.0f} requests/s for {seconds:g} s, latter half "
        f"counted; worst cell {shares[0]:.3f}, best {shares[-1]:.3f}; {whole.describe()}; {whole.num_failed} failed"
    )
    yield row("all_cells_attainment", whole.attainment, "share", None, None, note)


def split_rows(trace: Path | None, seconds: float) -> Iterator[Row]:
    """By turns instead of at random."""
    sizes = [size for size in SIZES if size < max(SIZES)]
    cells = [
        seeds(CellRun(size, WHOLE_RATE, seconds_of(size, seconds), 0, trace, "turns"), SIZES[size]) for size in sizes
    ]
    found = run_all([run for some in cells for run in some])
    for some in cells:
        seen = together([next(found) for _ in some])
        name, note = f"cell{some[0].size}_by_turns_at_{WHOLE_RATE:g}", seen.describe()
        yield row(name, seen.attainment, "share", None, None, note)


def loss_rows(trace: Path | None, seconds: float) -> Iterator[Row]:
    """A worker dies and stays away, in cells of each size; and how often that happens."""
    cells = [
        seeds(CellRun(size, LOSS_RATE, seconds_of(size, seconds), 0, trace, lost=lost), num)
        for size, num in SIZES.items()
        if size < max(SIZES)
        for lost in ((), ("prefill-0",), ("decode-0",))
    ]
    found = run_all([run for some in cells for run in some])
    for some in cells:
        run, seen = some[0], together([next(found) for _ in some])
        who, num = run.lost[0].split("-")[0] if run.lost else "no", num_prefill(run.size)
        note = f"{num} prefill and {run.size - num} decode workers; {seen.num_failed} lost; then {seen.describe()}"
        yield row(f"cell{run.size}_attainment_{who}_loss", seen.attainment, "share", None, None, note)
    per_day = FAILURES / FAILURE_DAYS / FAILURE_GPUS * NUM_GPUS
    note = f"{FAILURES} in {FAILURE_DAYS} days on {FAILURE_GPUS:,} GPUs (Llama 3 training), for {NUM_GPUS:,} GPUs"
    yield row("failures_per_day", per_day, "1/day", None, None, note)
