"""A page from an answer or a story: template, style, script and figures put together.

The page forbids itself every other source, and every script but its own; whatever users named is escaped, and
characters that would not show are replaced. Without JavaScript nothing is missing but sorting and playing. Needs
jinja2 and matplotlib; writes no file.
"""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pdserve.cluster.planner.findings import Answer, Finding
from pdserve.cluster.planner.timelapse import SimulationStory
from pdserve.cluster.report_figures import attainment_plot, cost_plot, goodput_plot
from pdserve.cluster.report_lapse import lapse_plot, played
from pdserve.cluster.report_latency import latency_plot, waterfall_plot
from pdserve.cluster.report_series import Shown, best_ones, common_share, pictures
from pdserve.cluster.report_svg import Plot
from pdserve.cluster.report_table import (
    busy_table,
    classes_table,
    figure,
    findings_table,
    interval,
    phases_table,
    share,
    spreads_table,
)

TEMPLATES = Path(__file__).parent / "report_templates"
UNSEEN = "\ufffd"


@dataclass(frozen=True, slots=True)
class Tile:
    """One of the large figures at the head of the page."""

    ink: str
    what: str
    name: str
    value: str
    detail: str


def tune_page(answer: Answer) -> str:
    """The report of `pdserve tune`."""
    shown = pictures(answer)
    targets = answer.question.targets
    plots = {
        "attainment": attainment_plot(answer),
        "goodput": goodput_plot(answer),
        "latency": latency_plot(
            shown,
            {target.name: (target.ttft_ms, target.tpot_ms) for target in targets},
            common_share(targets),
        ),
        "waterfall": waterfall_plot(shown),
        "cost": cost_plot(answer),
    }
    return _render(
        "tune.html.jinja",
        "sort.js",
        plots,
        answer=answer,
        question=answer.question,
        gpus=f"{answer.question.num_gpus:g}",
        tiles=_tiles(answer),
        findings=findings_table(answer),
        phases=phases_table(shown),
        busy=busy_table(shown),
    )


def simulation_page(story: SimulationStory) -> str:
    """The report of `pdserve simulate`."""
    shown = [] if story.picture is None else [Shown(story.picture, story.setup, "split", 0)]
    limits = {one.target.name: (one.target.ttft_ms, one.target.tpot_ms) for one in story.classes}
    plots = {
        "lapse": lapse_plot(story.lapse),
        "latency": latency_plot(shown, limits, None),
        "waterfall": waterfall_plot(shown),
    }
    return _render(
        "simulation.html.jinja",
        "lapse.js",
        plots,
        story=story,
        totals=_totals(story),
        played=played(story.lapse),
        spreads=spreads_table(story),
        classes=classes_table(story),
        phases=phases_table(shown),
        busy=busy_table(shown),
    )


def _render(template: str, script: str, plots: dict[str, Plot | None], **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    code = (TEMPLATES / script).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return environment.get_template(template).render(
        values,
        plots=plots,
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        script=Markup(code),
        script_hash=f"sha256-{digest}",
    )


def visible(value: Any) -> Any:
    """Text without characters that hide, reorder or break what stands beside them."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(
        char if char.isprintable() or char in "\n\t" or unicodedata.category(char) == "Zs" else UNSEEN for char in value
    )


def _tiles(answer: Answer) -> list[Tile]:
    return [
        Tile(
            one.ink,
            "best split" if one.ink == "split" else "best colocated",
            one.finding.setup.name,
            figure(one.finding.goodput.rate).text,
            _detail(one.finding),
        )
        for one in best_ones(answer)
    ]


def _detail(finding: Finding) -> str:
    if finding.goodput.failing:
        return finding.goodput.reason
    return f"95 % interval {interval(finding.goodput)}"


def _totals(story: SimulationStory) -> list[tuple[str, str, str, str]]:
    completed = f"{story.num_completed:,} of {story.num_requests:,} requests completed"
    return [
        ("goodput", figure(story.goodput_per_s).text, "requests/s", f"{share(story.attainment).text} met both targets"),
        ("throughput", figure(story.requests_per_s).text, "requests/s", completed),
        ("offered", figure(story.offered_rate).text, "requests/s", f"over {figure(story.duration_s).text} s"),
    ]
