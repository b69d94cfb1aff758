"""Ctrl-C from the first moment of a command on: while its imports run, and where its own seam takes over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.cluster import early_interrupt
from pdserve.cluster.errors_seam import one_line_errors

# As a user's shell runs it, whatever the console script is declared to be; and as a module.
SCRIPT = "from importlib.metadata import entry_points as find; find(group='console_scripts')['pdserve'].load()()"
ENTRIES = {"script": ("-c", SCRIPT), "module": ("-m", "pdserve.cluster.cli")}

# Python runs a file of this name before anything else: a Ctrl-C at the import of one module, without waiting for it.
SITECUSTOMIZE = """
import signal, sys

class InterruptAt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
        return None

sys.meta_path.insert(0, InterruptAt())
"""


def interrupted_at(module: str, folder: Path, entry: str) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE.format(module=module))
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, *ENTRIES[entry], "--help"]
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """What Ctrl-C does here is Python's own, also where the tests run with it ignored, and is put back."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("module", ["pdserve.cluster.commands", "numpy", "pdserve.cluster.validate_command"])
def test_ctrl_c_during_the_imports_ends_without_a_traceback(module: str, entry: str, tmp_path: Path) -> None:
    done = interrupted_at(module, tmp_path, entry)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_command_that_nobody_interrupts_runs(tmp_path: Path) -> None:
    done = interrupted_at("no.such.module", tmp_path, "script")
    assert done.returncode == 0
    assert "tune" in done.stdout


def test_a_command_has_its_ctrl_c_as_an_exception_again() -> None:
    handlers = []
    early_interrupt.end_at_once()
    handlers.append(signal.getsignal(signal.SIGINT))
    one_line_errors(lambda: handlers.append(signal.getsignal(signal.SIGINT)))()
    assert handlers[0] is not signal.default_int_handler
    assert handlers[1] is signal.default_int_handler


def test_where_ctrl_c_is_ignored_it_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    early_interrupt.end_at_once()
    early_interrupt.raise_again()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
