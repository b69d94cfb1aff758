"""The figures of what requests went through in one set-up or two: latency distributions, and where the time went.

Draws `Picture`s, of `pdserve tune` and of `pdserve simulate` alike. Needs matplotlib; opens no display.
"""

from __future__ import annotations

import math
from itertools import pairwise

from matplotlib.axes import Axes

from pdserve.cluster.planner.findings import QUANTILES, at
from pdserve.cluster.report_series import Shown
from pdserve.cluster.report_svg import (
    DASHES,
    PALETTE,
    Plot,
    drawing,
    log_axis,
    new_figure,
    plot_of,
    share_axis,
    short,
)

SMALLEST_MS = 0.01
LONG = 80
SPREAD = 0.78
"""How much of a row its bars take."""

DWARFED = 4.0
CUT_AT = 1.8
"""A time axis is cut where one phase takes more than so many times all others, at so many times the others."""


def latency_plot(shown: list[Shown], targets: dict[str, tuple[float, float]], share: float | None) -> Plot | None:
    """TTFT and TPOT of all requests. `targets` are each SLO class's limits of both, in ms; `share` is asked for."""
    if not any(one.picture.ttft_ms or one.picture.tpot_ms for one in shown):
        return None
    with drawing():
        figure = new_figure(4.0)
        left, right = figure.subplots(1, 2, sharey=True)
        ttft = [(one, one.picture.ttft_ms) for one in shown]
        tpot = [(one, one.picture.tpot_ms) for one in shown]
        _draw_distribution(left, "TTFT, ms", ttft, [limits[0] for limits in targets.values()])
        _draw_distribution(right, "TPOT, ms", tpot, [limits[1] for limits in targets.values()])
        left.set_ylabel("requests at or below")
        for axes in (left, right):
            share_axis(axes)
            if share is not None:
                axes.axhline(share, color=PALETTE["ink"], linewidth=1.0, linestyle=(0, (1, 1.5)))
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=1, handlelength=2.6)
        return plot_of(
            figure,
            "latency",
            "Time to first token and time per output token",
            "The share of requests that took no longer than the value below. Dotted upright lines are the targets: "
            "whatever of a curve lies right of its line was too late. Curves end at 99.9 %.",
            "; ".join(_in_words(one) for one in shown) + ".",
        )


def _in_words(one: Shown) -> str:
    parts = [one.label]
    for name, values in (("TTFT", one.picture.ttft_ms), ("TPOT", one.picture.tpot_ms)):
        if values:
            parts.append(f"{name} {at(values, 0.5):.3g} ms at the median and {at(values, 0.99):.3g} ms at 99 %")
    return ", ".join(parts)


def _draw_distribution(
    axes: Axes, what: str, curves: list[tuple[Shown, tuple[float, ...]]], limits_ms: list[float]
) -> None:
    drawn = list(limits_ms)
    for one, values in curves:
        points = [(max(ms, SMALLEST_MS), share) for ms, share in zip(values, QUANTILES, strict=False) if ms < math.inf]
        drawn += [ms for ms, _ in points]
        axes.plot(
            [ms for ms, _ in points],
            [share for _, share in points],
            color=PALETTE[one.ink],
            linestyle=DASHES[one.order],
            label=short(one.label, LONG),
        )
    low, high = min(drawn, default=1.0), max(drawn, default=10.0)
    log_axis(axes, max(low, SMALLEST_MS) / 1.25, max(high, SMALLEST_MS) * 1.25)
    axes.set_xlabel(what)
    for limit_ms in sorted(set(limits_ms)):
        axes.axvline(limit_ms, color=PALETTE["ink"], linewidth=1.1, linestyle=(0, (1, 1.5)))
        axes.annotate(
            f"{limit_ms:,.6g} ms",
            (limit_ms, 0.0),
            (-3, 4),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="bottom",
            size=8.5,
        )


def waterfall_plot(shown: list[Shown]) -> Plot | None:
    """The phases of a mean request, one after the other, and which of them misses are put down to."""
    names = list(dict.fromkeys(phase.name for one in shown for phase in one.picture.phases))
    if not names:
        return None
    with drawing():
        figure = new_figure(1.5 + len(names) * (0.22 + 0.2 * len(shown)))
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.7, 1))
        left.set_yticks(range(len(names)), [short(name) for name in names])
        left.set_ylim(len(names) - 0.5, -0.5)
        left.set_xlim(0, _longest_ms(shown))
        left.set_title("mean time of a request, ms")
        left.xaxis.set_major_formatter(lambda ms, _: f"{ms:,.6g}")
        right.set_xlim(0, 1.19 * max(0.01, *(phase.share_of_misses for one in shown for phase in one.picture.phases)))
        right.set_title("misses put down to it")
        right.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        for axes in (left, right):
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
        for number, one in enumerate(shown):
            rows = [row + (number - (len(shown) - 1) / 2) * (SPREAD / len(shown)) for row in range(len(names))]
            _draw_phases(left, right, one, dict(zip(names, rows, strict=True)), 0.9 * SPREAD / len(shown))
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=1)
        return plot_of(
            figure,
            "waterfall",
            "Where the time goes",
            "Each phase begins where the one before ended. A miss is put down to the phase that took the most beyond "
            "its own median. An arrow: the bar goes on to the figure beside it.",
            "; ".join(f"{one.label}: {_phases_in_words(one)}" for one in shown) + ".",
        )


def _longest_ms(shown: list[Shown]) -> float:
    """What the axis of times must hold: all, but if one phase dwarfs the others, only so much that they can be seen."""
    times = [[phase.mean_ms for phase in one.picture.phases] for one in shown]
    longest_ms = max(sum(one) for one in times)
    others_ms = max(sum(one) - max(one, default=0.0) for one in times)
    is_cut = 0 < others_ms < longest_ms / DWARFED
    return CUT_AT * others_ms if is_cut else 1.2 * longest_ms or 1.0


def _phases_in_words(one: Shown) -> str:
    return ", ".join(
        f"{phase.name} {phase.mean_ms:.3g} ms and {phase.share_of_misses:.0%} of the misses"
        for phase in one.picture.phases
    )


def _draw_phases(left: Axes, right: Axes, one: Shown, rows: dict[str, float], height: float) -> None:
    color = PALETTE[one.ink]
    begin_ms = 0.0
    phases = [phase for phase in one.picture.phases if phase.mean_ms > 0 or phase.share_of_misses > 0]
    ends: list[tuple[float, float]] = []
    for number, phase in enumerate(phases):
        row = rows[phase.name]
        label = short(one.label, LONG) if number == 0 else None
        left.barh(row, phase.mean_ms, left=begin_ms, color=color, height=height, alpha=0.9, label=label)
        right.barh(row, phase.share_of_misses, color=color, height=height, alpha=0.9)
        begin_ms += phase.mean_ms
        ends.append((begin_ms, row))
        _write(left, f"{phase.mean_ms:,.3g}" if phase.mean_ms < 1000 else f"{phase.mean_ms:,.0f}", begin_ms, row)
        _write(right, f"{phase.share_of_misses:.0%}", phase.share_of_misses, row)
    for (end_ms, row), (_, next_row) in pairwise(ends):
        left.plot([end_ms, end_ms], [row, next_row], color=color, linewidth=0.8, alpha=0.7, zorder=0.9)


def _write(axes: Axes, text: str, end: float, row: float) -> None:
    """At the end of a bar; inside of it where it leaves the plot."""
    limit = axes.get_xlim()[1]
    if end <= limit:
        axes.annotate(text, (end, row), (4, 0), textcoords="offset points", va="center", size=8.5)
        return
    axes.annotate(
        f"{text} →",
        (limit, row),
        (-4, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        size=8.5,
        color=PALETTE["page"],
        weight="bold",
    )
