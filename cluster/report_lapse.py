"""The time-lapse of a simulation: one still figure that is readable on paper, and the data that a page plays.

Each worker is a strip whose colour is as strong as the worker is full, so that a thousand of them still make a picture.
Needs matplotlib; opens no display. Knows nothing of the script that plays the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pdserve.cluster.planner.timelapse import Lapse, Track
from pdserve.cluster.report_svg import PALETTE, WIDTH_IN, Plot, drawing, plot_of, short

NUM_COLUMNS = 480
MAX_NAMES = 24
MAX_LETTERS = 14
STRIP_IN = 0.2
MAX_STRIPS_IN = 3.2
ROUTER_IN = 1.15
GAP_IN = 0.52
LEFT, RIGHT = 0.135, 0.885
"""Where the axis of time begins and ends, as shares of the figure's width. The page's cursor needs them too."""

MAX_PLAYED_WORKERS = 48
MAX_PLAYED_NUMBERS = 120_000
# Strong enough on white and on black; the strength of a colour is its opacity.
TINTS = {"pool": "#2a86c2", "running": "#159a74", "waiting": "#dd6a1f"}
ABSENT = (0.5, 0.5, 0.5, 0.25)

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Strips:
    """One figure of all workers over time; not a number where a worker was absent."""

    title: str
    values: FloatArray
    top: float
    tint: str
    unit: str


def lapse_plot(lapse: Lapse) -> Plot | None:
    """Queues and pools over virtual time."""
    if not lapse.at_s or not lapse.tracks:
        return None
    all_strips = _all_strips(lapse)
    strips_in = min(MAX_STRIPS_IN, max(0.4, STRIP_IN * len(lapse.tracks)))
    height_in = 0.35 + ROUTER_IN + 3 * (strips_in + GAP_IN) + 0.5
    with drawing():
        figure = Figure(figsize=(WIDTH_IN, height_in))
        top_in = height_in - 0.3
        router = _panel(figure, top_in, ROUTER_IN)
        _draw_router(router, lapse)
        top_in -= ROUTER_IN + GAP_IN
        for strips in all_strips:
            axes = _panel(figure, top_in, strips_in)
            _draw_strips(axes, strips, lapse)
            _draw_scale(figure, axes, strips)
            axes.sharex(router)
            top_in -= strips_in + GAP_IN
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("virtual time, s")
        return plot_of(
            figure,
            "lapse",
            "Queues and pools over time",
            "Each strip is one worker; the stronger its colour, the fuller. Grey: the worker was not there.",
            " ".join(_in_words(lapse, strips) for strips in all_strips),
        )


def _in_words(lapse: Lapse, strips: _Strips) -> str:
    highest = np.nanmax(strips.values, axis=1, initial=0.0)
    shown = list(zip(lapse.tracks, highest, strict=True))[:MAX_NAMES]
    peaks = ", ".join(f"{track.worker_id} {_figure(value, strips)}" for track, value in shown)
    return f"Highest {strips.title}: {peaks}."


def _figure(value: float, strips: _Strips) -> str:
    return f"{value:.0%}" if strips.unit == "%" else f"{value:,.0f}"


def _columns(lapse: Lapse) -> NDArray[np.intp]:
    """The sample that holds at each of the strip's columns."""
    start_s, end_s = _span_s(lapse)
    middles_s = start_s + (np.arange(NUM_COLUMNS) + 0.5) * (end_s - start_s) / NUM_COLUMNS
    return np.maximum(0, np.searchsorted(np.array(lapse.at_s), middles_s, side="right") - 1)


def _span_s(lapse: Lapse) -> tuple[float, float]:
    return lapse.at_s[0], max(lapse.at_s[-1], lapse.at_s[0] + lapse.interval_s)


def _all_strips(lapse: Lapse) -> tuple[_Strips, ...]:
    columns = _columns(lapse)

    def rows(name: str) -> FloatArray:
        return np.array([getattr(track, name) for track in lapse.tracks], dtype=np.float64)[:, columns]

    pool = rows("used_blocks") / np.maximum(rows("total_blocks"), 1.0)
    running, waiting = rows("num_running"), rows("num_waiting")
    return (
        _Strips("share of KV blocks in use", pool, 1.0, TINTS["pool"], "%"),
        _Strips("sequences running", running, _top(running), TINTS["running"], ""),
        _Strips("sequences waiting", waiting, _top(waiting), TINTS["waiting"], ""),
    )


def _top(values: FloatArray) -> float:
    return max(1.0, float(np.nanmax(values, initial=0.0)))


def _panel(figure: Figure, top_in: float, panel_in: float) -> Axes:
    height_in = figure.get_size_inches()[1]
    return figure.add_axes((LEFT, (top_in - panel_in) / height_in, RIGHT - LEFT, panel_in / height_in))


def _draw_router(axes: Axes, lapse: Lapse) -> None:
    for name, values, ink, dash in (
        ("in flight", lapse.router_inflight, "split", "-"),
        ("queued at the router", lapse.router_queued, "colocated", (0, (5, 2))),
    ):
        axes.step(lapse.at_s, values, where="post", color=PALETTE[ink], linestyle=dash, linewidth=1.3, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlim(*_span_s(lapse))
    axes.tick_params(labelbottom=False)
    axes.set_title("requests", pad=5)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, borderaxespad=0)


def _draw_strips(axes: Axes, strips: _Strips, lapse: Lapse) -> None:
    num_tracks = len(lapse.tracks)
    pixels = np.empty((*strips.values.shape, 4))
    pixels[..., :3] = _rgb(strips.tint)
    pixels[..., 3] = np.clip(strips.values / strips.top, 0.0, 1.0)
    pixels[np.isnan(strips.values)] = ABSENT
    extent = (*_span_s(lapse), num_tracks - 0.5, -0.5)
    axes.imshow(pixels, aspect="auto", interpolation="none", extent=extent)
    axes.set_title(strips.title, pad=4)
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(labelbottom=False)
    every = -(-num_tracks // MAX_NAMES)
    ticks = range(0, num_tracks, every)
    axes.set_yticks(ticks, [short(_name(lapse.tracks[at], lapse), MAX_LETTERS) for at in ticks])
    if num_tracks <= MAX_NAMES:
        for between in range(1, num_tracks):
            axes.axhline(between - 0.5, color=PALETTE["line"], linewidth=0.6)


def _name(track: Track, lapse: Lapse) -> str:
    """With its role where one worker had several."""
    is_once = sum(other.worker_id == track.worker_id for other in lapse.tracks) == 1
    return track.worker_id if is_once else f"{track.worker_id} ({track.role})"


def _draw_scale(figure: Figure, beside: Axes, strips: _Strips) -> None:
    box = beside.get_position()
    height = min(box.height, 0.8 / figure.get_size_inches()[1])
    axes = figure.add_axes((RIGHT + 0.02, box.y1 - height, 0.014, height))
    pixels = np.empty((64, 1, 4))
    pixels[..., :3] = _rgb(strips.tint)
    pixels[..., 3] = np.linspace(0.0, 1.0, 64)[:, None]
    axes.imshow(pixels, aspect="auto", interpolation="none", origin="lower", extent=(0, 1, 0, strips.top))
    axes.yaxis.tick_right()
    axes.set_xticks([])
    axes.set_yticks([0, strips.top], ["0", _figure(strips.top, strips)])
    axes.grid(visible=False)


def _rgb(tint: str) -> tuple[float, float, float]:
    red, green, blue = (int(tint[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return red, green, blue


def played(lapse: Lapse) -> dict[str, Any]:
    """What the page plays: workers up to a number that a screen holds, samples up to what a page can carry."""
    tracks = lapse.tracks[:MAX_PLAYED_WORKERS]
    every = -(-len(lapse.at_s) * max(1, 4 * len(tracks)) // MAX_PLAYED_NUMBERS) or 1
    return {
        "at": [round(at_s, 3) for at_s in lapse.at_s[::every]],
        "queued": lapse.router_queued[::every],
        "inflight": lapse.router_inflight[::every],
        "left": LEFT,
        "right": RIGHT,
        "end": _span_s(lapse)[1] if lapse.at_s else 0.0,
        "workers": [
            {
                "id": track.worker_id,
                "role": str(track.role),
                "waiting": track.num_waiting[::every],
                "running": track.num_running[::every],
                "used": track.used_blocks[::every],
                "total": track.total_blocks[::every],
            }
            for track in tracks
        ],
        "left_out": len(lapse.tracks) - len(tracks),
    }
