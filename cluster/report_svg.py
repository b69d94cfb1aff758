"""matplotlib figures as SVG to be put into HTML: no external reference, text as text, colours left to the page's style.

Drawn in the light palette; on the way out every colour of it becomes a CSS variable of the same name, so that a page
can be light, dark or printed with one drawing. Ids get the figure's name in front: one page holds several figures.
Knows nothing of what is drawn.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

# Okabe and Ito's colours, which people with any kind of colour vision can tell apart; all values are different.
PALETTE = {
    "page": "#ffffff",
    "ink": "#1b1f24",
    "soft": "#59636e",
    "line": "#d3d9df",
    "split": "#0072b2",
    "colocated": "#d55e00",
    "third": "#009e73",
    "fourth": "#b0548c",
}
MARKERS = ("o", "s", "^", "D")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)))
WIDTH_IN = 7.6

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": PALETTE["soft"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": PALETTE["soft"],
    "axes.labelsize": 9.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlecolor": PALETTE["ink"],
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "grid.color": PALETTE["line"],
    "grid.linewidth": 0.7,
    "legend.fontsize": 9.0,
    "legend.frameon": False,
    "legend.labelcolor": PALETTE["ink"],
    "lines.linewidth": 1.8,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "pdserve",
    "text.color": PALETTE["ink"],
    # Names come from users: a dollar sign is a dollar sign.
    "text.parse_math": False,
    "xtick.color": PALETTE["soft"],
    "ytick.color": PALETTE["soft"],
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
}


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure as it goes into a page: an id, a heading, an `<svg>` element, and how to read it."""

    name: str
    title: str
    svg: str
    caption: str


@contextmanager
def drawing() -> Iterator[None]:
    """Figures are made and written in here: some settings are read at the one moment, some at the other."""
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        # The browser has fonts for names that matplotlib has none for.
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def new_figure(height_in: float) -> Figure:
    return Figure(figsize=(WIDTH_IN, height_in), layout="constrained")


def plot_of(figure: Figure, name: str, title: str, caption: str, description: str) -> Plot:
    """The finished figure; `description` tells it to those who do not see it."""
    return Plot(name, title, _svg_of(figure, name, title, f"{caption} {description}"), caption)


def _svg_of(figure: Figure, name: str, title: str, description: str) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r"<style[^>]*>.*?</style>", "", drawn, flags=re.DOTALL)  # would be the whole page's
    drawn = re.sub(r"<!--.*?-->", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', drawn)
    drawn = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', drawn)
    drawn = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", drawn)
    for ink, value in PALETTE.items():
        drawn = drawn.replace(value, f"var(--{ink})")
    width, height = (72 * float(inches) for inches in figure.get_size_inches())
    head = (
        f'<svg class="plot" role="img" aria-labelledby="{name}-title {name}-desc" viewBox="0 0 {width:g} {height:g}" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    )
    return head + drawn[drawn.index(">") + 1 :]


def short(text: str, limit: int = 24) -> str:
    """A name that leaves room for the figure."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def share_axis(axes: Axes) -> None:
    """The y axis from 0 to 100 %."""
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))


def log_axis(axes: Axes, low: float, high: float) -> None:
    """The x axis in powers of ten, with plain figures at round numbers."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    decades = math.log10(high / low)
    fine = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    subs = fine if decades < 1 else (1.0, 2.0, 5.0) if decades < 2.2 else (1.0, 3.0) if decades < 3.2 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def mark_target(axes: Axes, share: float) -> None:
    """A line across at a share that is asked for."""
    axes.axhline(share, color=PALETTE["ink"], linewidth=1.1, linestyle=(0, (1, 1.5)))
    axes.annotate(
        f"target {100 * share:.4g} %",
        (1.0, share),
        (0, -3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="top",
        size=8.5,
    )


def legend_above(axes: Axes, num_columns: int = 2, *, backwards: bool = False) -> None:
    """Outside of the plot, where it hides nothing. `backwards` if what matters most was drawn last, on top."""
    handles, names = axes.get_legend_handles_labels()
    step = -1 if backwards else 1
    axes.legend(
        handles[::step],
        names[::step],
        loc="lower left",
        bbox_to_anchor=(0, 1.01),
        ncols=num_columns,
        borderaxespad=0.2,
        handlelength=2.6,
    )
