"""The reports of `pdserve tune` and `pdserve simulate`: one HTML file each that needs nothing else.

Loads what makes the page only when a page is asked for, so that the commands run without those packages. A file is
written whole or not at all. Knows nothing of what is on a page.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from pathlib import Path
from types import ModuleType

from pdserve.cluster.planner.findings import Answer
from pdserve.cluster.planner.timelapse import SimulationStory
from pdserve.proto.errors import ConfigError


def write_report(answer: Answer, path: Path) -> None:
    """What `pdserve tune` found out.

    Raises:
        ConfigError: the packages for it are missing, or the file cannot be written.
    """
    _write(path, _pages().tune_page(answer))


def write_simulation(report: SimulationStory, path: Path) -> None:
    """What `pdserve simulate` saw.

    Raises:
        ConfigError: the packages for it are missing, or the file cannot be written.
    """
    _write(path, _pages().simulation_page(report))


def require_report(path: Path) -> None:
    """For before the work: that a report could be made and written there.

    Raises:
        ConfigError: as for writing one.
    """
    _pages()
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--html: {path}: cannot be written; name a file in a folder that exists and is yours")


def _pages() -> ModuleType:
    try:
        return importlib.import_module("pdserve.cluster.report_pages")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("pdserve"):
            raise
        raise ConfigError(f"--html: {error.name} is not installed; run: pip install 'pdserve[report]'") from error


def _write(path: Path, page: str) -> None:
    """Into a file beside it first: nobody sees half a report, and a full disk leaves the old one."""
    try:
        handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(page)
            os.chmod(beside, 0o666 & ~_umask())
            os.replace(beside, path)
        except OSError:
            os.unlink(beside)
            raise
    except OSError as error:
        raise ConfigError(f"--html: {path}: cannot be written: {error.strerror or error}") from error


def _umask() -> int:
    """Reading it means setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
