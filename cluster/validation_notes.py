"""What must be known of a validation before its figures are believed, in lines. Pure.

Says which simulated steps nobody had measured, which requests were cut, and what is missing from a validation that
ended early. Knows neither how runs are made nor where the lines are shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pdserve.cluster.validation import Point

FIGURES = re.compile(r"\d[\d.,]*(e[+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class Beyond:
    """What of one simulation lies beyond what was measured: the share of its steps, and a line for each figure."""

    share: float
    lines: tuple[str, ...]


def beyond_lines(runs: Iterable[tuple[Point, Beyond]]) -> Iterator[str]:
    """Each kind of line once for a set-up and workload: that of the run that was most beyond, with its rate."""
    told: set[tuple[str, str, str]] = set()
    for point, beyond in sorted(runs, key=lambda run: -run[1].share):
        for line in beyond.lines:
            key = (point.setup, point.workload, FIGURES.sub("#", line))
            if key not in told:
                told.add(key)
                yield f"{point.words}: {line}"


def clipped_lines(runs: Iterable[tuple[Point, int]]) -> Iterator[str]:
    """Requests that the load generator cut, as the served model holds less than the profiled one; once for each set-up
    and workload."""
    most: dict[tuple[str, str], int] = {}
    for point, num_clipped in runs:
        key = (point.setup, point.workload)
        most[key] = max(most.get(key, 0), num_clipped)
    for (setup, workload), num_clipped in most.items():
        if num_clipped:
            yield (
                f"{setup}, {workload}: {num_clipped:,} requests of a run were cut to the context of the served model, "
                "which is shorter than the profile's; they were simulated whole"
            )


def missing_lines(num_done: int, num_asked: int) -> Iterator[str]:
    if num_done < num_asked:
        yield f"it ended early: only {num_done:,} of {num_asked:,} runs were measured"
