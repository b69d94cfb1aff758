"""The figures of `pdserve tune` that lay set-ups side by side: attainment, goodput and cost.

Each takes the answer and gives a figure with its words, or `None` if there is nothing to show. Latencies of single
set-ups are drawn in `report_latency`. Needs matplotlib; opens no display.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pdserve.cluster.planner.findings import Answer, Finding, Target
from pdserve.cluster.planner.goodput import Goodput
from pdserve.cluster.report_series import Series, best_ones, common_share, falling, labels, of_interest, splits
from pdserve.cluster.report_svg import (
    DASHES,
    MARKERS,
    PALETTE,
    Plot,
    drawing,
    legend_above,
    mark_target,
    new_figure,
    plot_of,
    share_axis,
    short,
)

LONG = 40
MAX_COSTS = 14
MANY_SPLITS = 10
MAX_TICKS = 32
BAR_STEP = 0.02
BEYOND = 1.45
"""The axis of rates ends at so many times the highest goodput."""


def attainment_plot(answer: Answer) -> Plot | None:
    """Share of requests that meet both targets, against the rate."""
    shown = [series for series in of_interest(answer) if series.finding.goodput.probes]
    if not shown:
        return None
    targets = answer.question.targets
    share = common_share(targets)
    with drawing():
        figure = new_figure(3.9)
        axes = figure.subplots()
        _limit_rates(axes, shown)
        for series in reversed(shown):
            _draw_curve(axes, series, min(target.share for target in targets))
        if share is not None:
            mark_target(axes, share)
        share_axis(axes)
        axes.set_xlabel("arrival rate, requests/s")
        axes.set_ylabel("requests that meet both targets")
        legend_above(axes, backwards=True)
        return plot_of(
            figure,
            "attainment",
            "Attainment against rate",
            "Each mark is one rate that was simulated, with its 95 % interval; the line is the falling curve that fits "
            "them best. Bars at the target, or just below it, are the intervals of the goodputs."
            + _of_classes(targets),
            f"Curves fall from left to right, one each for {', '.join(series.label for series in shown)}.",
        )


def _of_classes(targets: Sequence[Target]) -> str:
    if len(targets) == 1:
        return ""
    shares = ", ".join(f"{target.name} {target.share:.4g}" for target in targets)
    return (
        " Curves are of all classes together; a goodput is where the first class falls to its own share "
        f"({shares}), which may be before the curve is down there."
    )


def _limit_rates(axes: Axes, shown: list[Series]) -> None:
    highest = max(_finite_high(series.finding.goodput) for series in shown)
    rates = [rate for series in shown for rate, _ in series.finding.goodput.probes]
    right = min(BEYOND * highest, 1.02 * max(rates)) if highest > 0 else 1.02 * max(rates)
    # A curve that begins far from nothing need not be squeezed to show nothing.
    axes.set_xlim(0.85 * min(rates) if min(rates) > 0.3 * right else 0, right)


def _finite_high(goodput: Goodput) -> float:
    return goodput.high if math.isfinite(goodput.high) else goodput.rate


def _draw_curve(axes: Axes, series: Series, target: float) -> None:
    goodput, color = series.finding.goodput, PALETTE[series.ink]
    rates = [rate for rate, _ in goodput.probes]
    seen = [attainment for _, attainment in goodput.probes]
    axes.vlines(rates, [at.low for at in seen], [at.high for at in seen], color=color, linewidth=1.1, alpha=0.4)
    axes.plot(rates, [at.value for at in seen], linestyle="", color=color, marker=MARKERS[series.order], markersize=3.8)
    axes.plot(
        rates,
        falling(seen),
        color=color,
        linestyle=DASHES[series.order],
        marker=MARKERS[series.order],
        markersize=3.8,
        markevery=[],
        linewidth=1.6,
        label=short(series.label, LONG),
    )
    if goodput.rate > 0:
        ends = [goodput.low, _finite_high(goodput)]
        level = target - series.order * BAR_STEP
        axes.plot(ends, [level, level], color=color, linewidth=4, alpha=0.6, zorder=4)


def goodput_plot(answer: Answer) -> Plot | None:
    """Goodput of every static split, in order, with colocation as a band behind."""
    shown = splits(answer)
    if not shown:
        return None
    with drawing():
        figure = new_figure(3.9)
        axes = figure.subplots()
        colocated = [one for one in best_ones(answer) if one.ink == "colocated" and one.finding.goodput.rate > 0]
        _shade_plateau(axes, [finding.setup.name in answer.plateau for finding in shown])
        for series in colocated:
            _draw_band(axes, series)
        _draw_splits(axes, shown)
        _name_splits(axes, _names(shown))
        goodputs = [finding.goodput for finding in shown] + [series.finding.goodput for series in colocated]
        axes.set_ylim(0, 1.06 * max(map(_finite_high, goodputs)) or 1.0)
        axes.set_ylabel("goodput, requests/s")
        axes.set_xlabel("split, from decode-heavy to prefill-heavy")
        legend_above(axes, num_columns=3)
        best = ", ".join(f"{finding.setup.name} {finding.goodput.rate:.3g}" for finding in shown)
        return plot_of(
            figure,
            "goodput",
            "Goodput against the P:D ratio",
            "Every static split, with 95 % intervals; chunk and batch limits are those that suit the best one. "
            "On the plateau the set-ups cannot be told from the best one: pick any of them. Hollow: the search stopped "
            "early because others are better. A cross: no rate that meets the targets was found.",
            f"Goodput in requests per second: {best}.",
        )


def _shade_plateau(axes: Axes, is_on: list[bool]) -> None:
    """Neighbours on the plateau share one patch."""
    edges = [position for position, (left, right) in enumerate(pairwise([False, *is_on, False])) if left != right]
    for number, (first, end) in enumerate(zip(edges[::2], edges[1::2], strict=True)):
        label = "plateau" if number == 0 else None
        axes.axvspan(first - 0.5, end - 0.5, color=PALETTE["third"], alpha=0.16, linewidth=0, label=label)


def _draw_band(axes: Axes, series: Series) -> None:
    goodput, color = series.finding.goodput, PALETTE[series.ink]
    axes.axhspan(goodput.low, _finite_high(goodput), color=color, alpha=0.2, linewidth=0)
    axes.axhline(goodput.rate, color=color, linestyle=DASHES[series.order], label=short(series.label, LONG))


def _draw_splits(axes: Axes, shown: list[Finding]) -> None:
    color = PALETTE["split"]
    able = [(at, one) for at, one in enumerate(shown) if one.goodput.rate > 0]
    axes.plot([at for at, _ in able], [one.goodput.rate for _, one in able], color=color, linewidth=1.0, alpha=0.6)
    for label, is_refined in (("split", True), ("split, search stopped early", False)):
        some = [(at, one.goodput) for at, one in able if one.is_refined == is_refined]
        if some:
            axes.errorbar(
                [at for at, _ in some],
                [goodput.rate for _, goodput in some],
                yerr=(
                    [max(0.0, goodput.rate - goodput.low) for _, goodput in some],
                    [max(0.0, _finite_high(goodput) - goodput.rate) for _, goodput in some],
                ),
                color=color,
                fmt="o",
                markersize=5,
                markerfacecolor=color if is_refined else "none",
                capsize=3,
                elinewidth=1.2,
                label=label,
            )
    unable = [at for at, one in enumerate(shown) if one.goodput.rate <= 0]
    if unable:
        axes.plot(unable, [0] * len(unable), "x", color=PALETTE["ink"], clip_on=False, label="infeasible", zorder=5)


def _names(shown: list[Finding]) -> list[str]:
    """With the tensor-parallel degree where it is not the same for all."""
    degrees = {finding.setup.tensor_parallel_size for finding in shown}
    return [
        finding.setup.name + (f" TP{finding.setup.tensor_parallel_size}" if len(degrees) > 1 else "")
        for finding in shown
    ]


def _name_splits(axes: Axes, names: list[str]) -> None:
    every = math.ceil(len(names) / MAX_TICKS)
    ticks = range(0, len(names), every)
    many = len(names) > MANY_SPLITS
    axes.set_xticks(ticks, [names[at] for at in ticks], rotation=60 if many else 0, ha="right" if many else "center")
    if many:
        for text in axes.get_xticklabels():
            text.set_rotation_mode("anchor")
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.grid(visible=False, axis="x")


def cost_plot(answer: Answer) -> Plot | None:
    """What a million tokens cost, by set-up."""
    names = labels(answer)
    priced = [(names[at], one, one.cost) for at, one in enumerate(answer.findings) if one.cost is not None][:MAX_COSTS]
    if not priced:
        return None
    inks = [PALETTE["split" if one.setup.is_split else "colocated"] for _, one, _ in priced]
    with drawing():
        figure = new_figure(1.3 + 0.28 * len(priced))
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_costs(left, "million input tokens", [cost.per_million_input_tokens for *_, cost in priced], inks)
        _draw_costs(right, "million output tokens", [cost.per_million_output_tokens for *_, cost in priced], inks)
        left.set_yticks(range(len(priced)), [short(name) for name, *_ in priced])
        left.invert_yaxis()
        words = "; ".join(
            f"{name} {cost.per_million_input_tokens:.3g} and {cost.per_million_output_tokens:.3g}"
            for name, _, cost in priced
        )
        return plot_of(
            figure,
            "cost",
            "Cost by set-up",
            "At the goodput, in the currency of the profile's price. Where tokens of both kinds share a GPU, its price "
            "is shared by the time that each kind took. Plain bars: split; hatched: colocated.",
            f"Cost per million input tokens and per million output tokens: {words}.",
        )


def _draw_costs(axes: Axes, what: str, costs: list[float], inks: list[str]) -> None:
    hatches = ["////" if ink == PALETTE["colocated"] else "" for ink in inks]
    axes.barh(range(len(costs)), costs, color=inks, height=0.62, hatch=hatches, edgecolor=PALETTE["page"], linewidth=0)
    highest = max((cost for cost in costs if math.isfinite(cost)), default=0.0)
    for at, cost in enumerate(costs):
        axes.annotate(
            f"{cost:,.3g}", (min(cost, highest), at), (4, 0), textcoords="offset points", va="center", size=8.5
        )
    axes.set_xlim(0, 1.22 * highest or 1.0)
    axes.set_title(f"per {what}")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(lambda cost, _: f"{cost:,.6g}")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
