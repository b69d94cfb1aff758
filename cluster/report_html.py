"""The reports of `pdserve tune` and `pdserve simulate`: one HTML file each that needs nothing else.

Loads what makes the page only when a page is asked for, so that the commands run without those packages. Knows nothing
of what is on a page.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from pdserve.cluster.planner.findings import Answer
from pdserve.cluster.planner.timelapse import SimulationStory
from pdserve.cluster.whole_files import require_writable, write_whole
from pdserve.proto.errors import ConfigError


def write_report(answer: Answer, path: Path) -> None:
    """What `pdserve tune` found out.

    Raises:
        ConfigError: the packages for it are missing, or the file cannot be written.
    """
    write_whole("--html", path, _pages().tune_page(answer))


def write_simulation(report: SimulationStory, path: Path) -> None:
    """What `pdserve simulate` saw.

    Raises:
        ConfigError: the packages for it are missing, or the file cannot be written.
    """
    write_whole("--html", path, _pages().simulation_page(report))


def require_report(path: Path) -> None:
    """For before the work: that a report could be made and written there.

    Raises:
        ConfigError: as for writing one.
    """
    _pages()
    require_writable("--html", path)


def _pages() -> ModuleType:
    try:
        return importlib.import_module("pdserve.cluster.report_pages")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("pdserve"):
            raise
        raise ConfigError(f"--html: {error.name} is not installed; run: pip install 'pdserve[report]'") from error
