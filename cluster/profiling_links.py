"""Hand-offs of several sizes to the cost of a link and the fixed part beside it. Pure.

    from the end of the step that computed the prompt to the first step with it elsewhere
      = handoff_s + latency_s + bytes / bandwidth

The whole is told by the step records of both workers, the last two by the decode worker's own clock. Knows nothing of
how hand-offs are provoked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pdserve.cluster.planner.profile import LinkCost
from pdserve.proto.errors import ConfigError

FASTEST_BYTES_PER_S = 1e12
"""What is answered where more bytes took no longer."""


@dataclass(frozen=True, slots=True)
class Handoff:
    """One hand-off of a prompt that was computed in one step, to an idle worker."""

    num_bytes: int
    total_s: float
    transfer_s: float


@dataclass(frozen=True, slots=True)
class HandoffCost:
    """`link` moves the bytes; `fixed_s` comes on top of it once."""

    link: LinkCost
    fixed_s: float


def fit_handoffs(handoffs: Sequence[Handoff]) -> HandoffCost:
    """Straight lines through the lower quartiles of each size: what disturbs a hand-off only adds to it.

    Raises:
        ConfigError: fewer than two sizes.
    """
    by_bytes: dict[int, list[Handoff]] = defaultdict(list)
    for one in handoffs:
        by_bytes[one.num_bytes].append(one)
    if len(by_bytes) < 2:
        raise ConfigError(f"hand-offs of {len(by_bytes)} sizes give no bandwidth; raise --budget-s")
    sizes = np.array(sorted(by_bytes), dtype=np.float64)
    totals_s = np.array([np.percentile([one.total_s for one in by_bytes[int(size)]], 25) for size in sizes])
    moves_s = np.array([np.percentile([one.transfer_s for one in by_bytes[int(size)]], 25) for size in sizes])
    slope, total_s = _line(sizes, totals_s)
    _, move_s = _line(sizes, moves_s)
    latency_s = min(max(0.0, move_s), max(0.0, total_s))
    bandwidth = min(FASTEST_BYTES_PER_S, 1.0 / slope) if slope > 0 else FASTEST_BYTES_PER_S
    return HandoffCost(
        link=LinkCost(latency_s=latency_s, bandwidth_bytes_per_s=bandwidth), fixed_s=max(0.0, total_s - latency_s)
    )


def thin_links(costs: Mapping[str, HandoffCost]) -> tuple[str, ...]:
    """A warning for each kind of link whose hand-offs tell no bandwidth."""
    return tuple(
        f"thin: {kind} links: more bytes took no longer, so that their bandwidth is not known, and left at "
        f"{FASTEST_BYTES_PER_S:.0e} bytes/s; raise --budget-s"
        for kind, cost in costs.items()
        if cost.link.bandwidth_bytes_per_s >= FASTEST_BYTES_PER_S
    )


def _line(xs: np.ndarray, ys: np.ndarray) -> tuple[float, float]:
    """Slope and intercept with the least absolute errors: of all lines through two points."""
    best = (float("inf"), 0.0, float(np.median(ys)))
    for first in range(len(xs)):
        for second in range(first + 1, len(xs)):
            slope = float((ys[second] - ys[first]) / (xs[second] - xs[first]))
            intercept = float(ys[first] - slope * xs[first])
            best = min(best, (float(np.abs(ys - slope * xs - intercept).sum()), slope, intercept))
    return best[1], best[2]
