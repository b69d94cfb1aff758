"""What every proof on a GPU is: a function that returns what it proved, raises `Skipped`, or fails.

Each runs in a process of its own, because CUDA does not recover from an error in the process that had it.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable

PROVED, FAILED, SKIPPED = 0, 1, 77


class Skipped(Exception):
    """It cannot be proved here; the message says why."""


def need(*modules: str) -> None:
    """Raises `Skipped` if one is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"not installed: {', '.join(missing)}")


def conclude(prove: Callable[[], str]) -> None:
    """Run it, print its one line last, and exit."""
    try:
        text, status = prove(), PROVED
    except Skipped as reason:
        text, status = str(reason), SKIPPED
    except BaseException as error:
        traceback.print_exc()
        text, status = f"{type(error).__name__}: {error}".partition("\n")[0], FAILED
    print(text)
    sys.exit(status)
