"""Ctrl-C as a cancellation that is never lost.

`asyncio.run` reacts to Ctrl-C in a Python signal handler, which a signal that comes just before the loop goes to
sleep does not wake; and in blocking code the exception may land inside a lock. A handler of the loop itself
(with its wake-up pipe) has neither gap. Knows nothing of the work.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_interruptible(runner: asyncio.Runner, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end; Ctrl-C cancels it and waits for its clean-up. Main thread only.

    Raises:
        KeyboardInterrupt: Ctrl-C came, even if the work ended all the same.
    """
    num_interrupts = 0

    async def main() -> list[T]:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def on_interrupt() -> None:
            nonlocal num_interrupts
            num_interrupts += 1
            assert task is not None
            task.cancel()

        loop.add_signal_handler(signal.SIGINT, on_interrupt)
        try:
            return [await work]
        except asyncio.CancelledError:
            if num_interrupts == 0:
                raise
            return []
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    results = runner.run(main())
    if num_interrupts:
        raise KeyboardInterrupt
    return results[0]


def end_as_if_interrupted() -> None:
    """SIGTERM and SIGHUP mean what Ctrl-C does: whatever was started ends too."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
