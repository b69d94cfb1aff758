"""The time that deadlines and durations are measured on: the running event loop's.

A production loop runs on the monotonic clock; a simulation's loop runs on its own. Seconds since an arbitrary moment,
never compared across processes.
"""

from __future__ import annotations

import asyncio


def now() -> float:
    """Seconds. Only from code that an event loop runs."""
    return asyncio.get_running_loop().time()
