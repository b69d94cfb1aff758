"""Ctrl-C while something runs on the loop."""

from __future__ import annotations

import asyncio
import signal

import pytest

from pdserve.cluster.interruptible import run_interruptible


def test_the_result_comes_through_and_the_handler_is_put_back() -> None:
    async def work() -> int:
        return 7

    with asyncio.Runner() as runner:
        assert run_interruptible(runner, work()) == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_comes_through() -> None:
    async def work() -> None:
        raise ZeroDivisionError

    with asyncio.Runner() as runner, pytest.raises(ZeroDivisionError):
        run_interruptible(runner, work())


def test_ctrl_c_cancels_waits_for_the_clean_up_and_leaves_the_loop_usable() -> None:
    steps: list[str] = []

    async def work() -> None:
        try:
            asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            steps.append("cleaned up")

    with asyncio.Runner() as runner:
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                run_interruptible(runner, work())
    assert steps == ["cleaned up"] * 3


def test_a_cancellation_from_inside_is_not_taken_for_ctrl_c() -> None:
    async def work() -> None:
        raise asyncio.CancelledError

    with asyncio.Runner() as runner, pytest.raises(asyncio.CancelledError):
        run_interruptible(runner, work())
