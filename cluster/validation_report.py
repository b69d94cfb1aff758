"""The error table of a validation, for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from pdserve.cluster.validation import (
    ATTAINMENT_LIMIT,
    P50_LIMIT,
    P99_LIMIT,
    Comparison,
    Figure,
)
from pdserve.cluster.validation_order import Order

LARGE_LAG_MS = 20.0

HEADINGS = {
    "ttft_p50_ms": "TTFT p50",
    "ttft_p99_ms": "TTFT p99",
    "tpot_p50_ms": "TPOT p50",
    "tpot_p99_ms": "TPOT p99",
    "attainment": "attained",
}


def render(comparisons: Sequence[Comparison], ranked: Sequence[Order], notes: Sequence[str]) -> Iterator[Table | str]:
    """Tables, then lines."""
    yield _errors(comparisons)
    yield _phases(comparisons)
    for order in ranked:
        sides = f"real {order.real}; simulated {order.simulated}"
        yield f"{order.workload} at {order.rate:g}/s: {sides}: {order.verdict}"
    yield from notes
    lag_ms = max((one.send_lag_ms for one in comparisons), default=0.0)
    if lag_ms > LARGE_LAG_MS:
        yield f"the load generator was up to {lag_ms:,.0f} ms late: its core is not its own, and TTFT not to be trusted"
    num_within = sum(figure.is_within for one in comparisons for figure in one.figures)
    num_figures = sum(len(one.figures) for one in comparisons)
    num_failed = sum(one.num_failed for one in comparisons)
    yield (
        f"{num_within} of {num_figures} figures within their limits (p50 {P50_LIMIT:.0%}, p99 {P99_LIMIT:.0%}, "
        f"attainment {ATTAINMENT_LIMIT * 100:g} points); {num_failed} requests failed in the real clusters"
    )


def _errors(comparisons: Sequence[Comparison]) -> Table:
    table = Table(title="Real > simulated, error (! beyond its limit); steps: the profile on the steps really taken")
    for heading in ("set-up", "workload", "rate"):
        table.add_column(heading, overflow="fold")
    for heading in (*HEADINGS.values(), "steps"):
        table.add_column(heading, justify="right")
    for one in comparisons:
        step = "" if one.step_error is None else f"{one.step_error:+.1%}"
        cells = (_cell(figure) for figure in one.figures)
        table.add_row(one.point.setup, one.point.workload, f"{one.point.rate:g}", *cells, step)
    return table


def _cell(figure: Figure) -> str:
    if figure.real is None and figure.simulated is None:
        return "-"
    mark = "" if figure.is_within else " !"
    if figure.name == "attainment":
        assert figure.real is not None
        assert figure.simulated is not None
        assert figure.error is not None
        return f"{figure.real:.1%} > {figure.simulated:.1%} {figure.error * 100:+.1f}{mark}"
    sides = " > ".join("-" if value is None else f"{value:,.1f}" for value in (figure.real, figure.simulated))
    return f"{sides} {'' if figure.error is None else f'{figure.error:+.0%}'}{mark}"


def _phases(comparisons: Sequence[Comparison]) -> Table:
    table = Table(title="Mean phases of a request, real > simulated (ms)")
    names = list(dict.fromkeys(name for one in comparisons for name in one.phases))
    for heading in ("set-up", "workload", "rate", *names):
        table.add_column(heading, overflow="fold")
    for one in comparisons:
        cells = (
            f"{one.phases[name][0]:,.1f} > {one.phases[name][1]:,.1f}" if name in one.phases else "" for name in names
        )
        table.add_row(one.point.setup, one.point.workload, f"{one.point.rate:g}", *cells)
    return table
