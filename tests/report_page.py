"""A report as a browser would take it apart: its words, tables, ids, addresses and scripts, and its figures as XML.

Refuses a page whose elements are not closed in their turn.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pdserve.cluster.planner.findings import Answer
from pdserve.cluster.planner.timelapse import SimulationStory
from pdserve.cluster.report_html import write_report, write_simulation

VOID = {"area", "br", "col", "hr", "img", "input", "link", "meta"}


class Page(HTMLParser):
    """A page that was written, taken apart. Every element must be closed in its turn."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.cells: list[list[str]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._see(tag, attrs)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._see(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] in ("script", "style"):
            return
        self.words.append(data)
        if self.open[-1] in ("td", "th"):
            self.cells[-1].append(data)

    def _see(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "tr":
            self.cells.append([])
        if tag == "script":
            self.scripts.append(values)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def row(self, name: str) -> list[str]:
        found = [row for row in self.cells if row and row[0] == name]
        assert len(found) == 1, f"rows that begin with {name}: {found}"
        return found[0]

    def plots(self) -> dict[str, ElementTree.Element]:
        """Every `<svg>`, read as XML."""
        drawn = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", self.source, re.DOTALL)]
        return {one.attrib["aria-labelledby"].partition("-title")[0]: one for one in drawn}


def report(answer: Answer, folder: Path) -> Page:
    """The report of `pdserve tune`, written to a file and read back."""
    write_report(answer, folder / "report.html")
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def simulation(story: SimulationStory, folder: Path) -> Page:
    """The report of `pdserve simulate`, written to a file and read back."""
    write_simulation(story, folder / "simulation.html")
    return Page((folder / "simulation.html").read_text(encoding="utf-8"))


def played(page: Page) -> dict[str, Any]:
    """The samples that the time-lapse plays."""
    (data,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page.source, re.DOTALL)
    read: dict[str, Any] = json.loads(data)
    return read
