"""Ctrl-C before a command has begun: there is nothing to clean up yet, and nobody who could catch an exception.

Imports no more than it needs, as it is the first of our modules that is loaded. Knows nothing of commands.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

INTERRUPTED = 130


def end_at_once() -> None:
    """From now on Ctrl-C ends the process. Where it is ignored (`nohup`, a shell's background job) it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """From now on Ctrl-C is a KeyboardInterrupt again, for one who catches it."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    """No exception, which code that is being imported might swallow; no word, as processes of `tune` pass here too."""
    os._exit(INTERRUPTED)
