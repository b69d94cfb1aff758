"""What is kept of a trace: gaps, lengths and prefix ids of blocks of consecutive requests, in bounded memory.

A trace is read once, a line at a time. All of it is kept while it fits; a longer one keeps every second block, then
every fourth, and so on, so that what is kept always covers its whole length evenly and holds runs of `BLOCK_REQUESTS`
consecutive requests with their own gaps, lengths and ids.

Knows nothing of rates to be had or of seeds: courses through a sample are `trace_rows`.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

from pdserve.cluster.arrivals import Arrival
from pdserve.cluster.planner.lengths import JointLengths
from pdserve.cluster.trace import Trace, TraceOptions
from pdserve.proto.errors import ConfigError

BLOCK_REQUESTS = 128
MIN_BLOCKS = 32
MAX_CELLS = 1 << 20
"""Numbers kept, of 8 bytes each: five for a request and one for a prefix id; 8 MiB hold 200,000 requests."""


class Columns:
    """Requests side by side. `ids_end[i]` is where the ids of request `i` end."""

    def __init__(self) -> None:
        self.gaps_s = array("d")
        self.prompts = array("q")
        self.outputs = array("q")
        self.ids = array("q")
        self.ids_end = array("q")

    def __len__(self) -> int:
        return len(self.gaps_s)

    @property
    def num_cells(self) -> int:
        return 5 * len(self.gaps_s) + len(self.ids)

    def append(self, gap_s: float, prompt: int, output: int, prefix_ids: tuple[int, ...]) -> None:
        self.gaps_s.append(gap_s)
        self.prompts.append(prompt)
        self.outputs.append(output)
        self.ids.extend(prefix_ids)
        self.ids_end.append(len(self.ids))

    def prefix_ids(self, position: int, mask: int = 0) -> tuple[int, ...]:
        start = self.ids_end[position - 1] if position else 0
        kept = self.ids[start : self.ids_end[position]]
        return tuple(map(mask.__xor__, kept)) if mask else tuple(kept)

    def every_second_block(self) -> Columns:
        half = Columns()
        for start in range(0, len(self), 2 * BLOCK_REQUESTS):
            for position in range(start, min(start + BLOCK_REQUESTS, len(self))):
                ids = self.prefix_ids(position)
                half.append(self.gaps_s[position], self.prompts[position], self.outputs[position], ids)
        return half


class TraceSample:
    """A trace, or blocks spread over it. Counts, duration and rate are those of the whole trace.

    Raises:
        ConfigError: the trace has no rate: fewer than two requests, or all at one moment.
    """

    def __init__(self, trace: Iterable[Arrival], name: str, max_cells: int = MAX_CELLS) -> None:
        self.trace = trace
        self.num_requests = 0
        self.duration_s = 0.0
        self._stride = 1
        self.columns = self._read(max_cells)
        if self.num_requests < 2 or self.duration_s <= 0:
            raise ConfigError(
                f"{name}: {self.num_requests} requests within {self.duration_s:g} s have no rate; "
                "use a longer trace or a wider window"
            )
        # Nothing comes before the first request; a mean gap makes laps follow each other at the trace's rate.
        self.columns.gaps_s[0] = self.mean_gap_s
        self.kept_gap_s = math.fsum(self.columns.gaps_s) / len(self.columns)
        self.times_s = array("d", accumulate(self.columns.gaps_s))
        self.block = max(1, min(BLOCK_REQUESTS, len(self.columns) // MIN_BLOCKS)) if self.is_whole else BLOCK_REQUESTS

    def _read(self, max_cells: int) -> Columns:
        columns = Columns()
        first_s = latest_s = math.nan
        for number, arrival in enumerate(self.trace):
            if number == 0:
                first_s = latest_s = arrival.at_s
            if number // BLOCK_REQUESTS % self._stride == 0:
                gap_s = arrival.at_s - latest_s
                columns.append(gap_s, arrival.num_prompt_tokens, arrival.max_tokens, arrival.prefix_ids)
                if columns.num_cells > max_cells and len(columns) > BLOCK_REQUESTS:
                    columns = columns.every_second_block()
                    self._stride *= 2
            latest_s = arrival.at_s
            self.num_requests = number + 1
            self.duration_s = latest_s - first_s
        return columns

    @property
    def is_whole(self) -> bool:
        return self._stride == 1

    @property
    def has_prefixes(self) -> bool:
        return len(self.columns.ids) > 0

    @property
    def mean_gap_s(self) -> float:
        return self.duration_s / (self.num_requests - 1)

    @property
    def num_blocks(self) -> int:
        return max(1, len(self.columns) // self.block)

    def block_bounds(self, number: int) -> tuple[int, int]:
        """Positions of a block; the last one takes what does not fill another."""
        start = number * self.block
        return start, len(self.columns) if number == self.num_blocks - 1 else start + self.block


def load_sample(path: Path, options: TraceOptions) -> TraceSample:
    """The sample of a file. The latest few are kept: a search asks for hundreds of courses through one trace.

    Raises:
        ConfigError: the file cannot be read, a line of it is bad, or it has no rate.
    """
    return _load_sample(path, options, Trace(path, options).version())


def load_lengths(path: Path, options: TraceOptions) -> JointLengths:
    """The pairs of lengths in a file, kept alike."""
    return _load_lengths(path, options, Trace(path, options).version())


@lru_cache(maxsize=4)
def _load_sample(path: Path, options: TraceOptions, version: tuple[int, int]) -> TraceSample:
    return TraceSample(Trace(path, options), str(path))


@lru_cache(maxsize=4)
def _load_lengths(path: Path, options: TraceOptions, version: tuple[int, int]) -> JointLengths:
    return JointLengths(Trace(path, options))
