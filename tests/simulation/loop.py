"""An asyncio event loop whose time is virtual, and the processes that live on it.

Time jumps to the next timer; equal moments run in the order of their scheduling. There are no threads: what is given to
an executor runs on the loop, at a moment drawn from the seed. Each callback belongs to the process whose context it was
scheduled in. A process has its own clock (`time()` is that clock, which may drift), can be frozen (its callbacks wait,
in order) and can die (they never run, and nothing of it is cleaned up). Outside any process the clock is the true time.

Knows nothing of networks or of what the processes do.
"""

from __future__ import annotations

import asyncio
import heapq
import traceback
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar, copy_context
from random import Random
from typing import Any, TypeVar, TypeVarTuple, Unpack

MAX_CALLBACKS_AT_ONCE = 200_000
Args = TypeVarTuple("Args")
Result = TypeVar("Result")


class Process:
    """One life of one process. `clock_rate` is how fast its clock runs; executors take `slowness` times as long."""

    def __init__(self, name: str, clock_offset_s: float = 0.0, clock_rate: float = 1.0) -> None:
        self.name = name
        self.clock_offset_s = clock_offset_s
        self.clock_rate = clock_rate
        self.slowness = 1.0
        self.is_dead = False
        self.num_freezes = 0
        self.held: list[Handle] = []
        self.context = copy_context()
        self.context.run(_PROCESS.set, self)

    @property
    def is_frozen(self) -> bool:
        return self.num_freezes > 0

    def clock_s(self, true_s: float) -> float:
        return self.clock_offset_s + self.clock_rate * true_s

    def true_s(self, clock_s: float) -> float:
        return (clock_s - self.clock_offset_s) / self.clock_rate


_PROCESS: ContextVar[Process | None] = ContextVar("simulated_process", default=None)


def current_process() -> Process | None:
    """The process whose code runs now."""
    return _PROCESS.get()


class Handle:
    """A callback to run, as asyncio's own handles are."""

    __slots__ = ("args", "callback", "context", "is_cancelled", "process", "when_s")

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], context: Context, when_s: float = 0.0
    ) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.process = context.get(_PROCESS)
        self.when_s = when_s
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def cancelled(self) -> bool:
        return self.is_cancelled

    def when(self) -> float:
        """On the clock of its process."""
        return self.when_s if self.process is None else self.process.clock_s(self.when_s)


class SimLoop(asyncio.BaseEventLoop):
    """One seed, one loop. `now_s` is the true time."""

    def __init__(self, random: Random, on_error: Callable[[str], None]) -> None:
        # The base's own construction is for real time and real sockets; none of it is used.
        self.now_s = 0.0
        # All of them, alive or dead: none may be finalised in the middle.
        self._tasks: list[tuple[Process | None, asyncio.Task[Any]]] = []
        self._random = random
        self._on_error = on_error
        self._ready: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Handle]] = []
        self._num_timers = 0
        self._is_over = False
        self.laziness = 0.0  # of threads: how often they take long

    # What asyncio asks of a loop.

    def time(self) -> float:
        process = _PROCESS.get()
        return self.now_s if process is None else process.clock_s(self.now_s)

    def call_soon(
        self, callback: Callable[[Unpack[Args]], object], *args: *Args, context: Context | None = None
    ) -> Any:
        handle = Handle(callback, args, copy_context() if context is None else context)
        if not self._is_over:
            self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self,
        delay: float,
        callback: Callable[[Unpack[Args]], object],
        *args: *Args,
        context: Context | None = None,
    ) -> Any:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Args]], object],
        *args: *Args,
        context: Context | None = None,
    ) -> Any:
        process = _PROCESS.get()
        true_s = when if process is None else process.true_s(when)
        handle = Handle(callback, args, copy_context() if context is None else context, true_s)
        self._put(handle)
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: object = None, context: Context | None = None) -> asyncio.Task[Any]:
        name = str(name or coro.__qualname__)
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context)
        self._tasks.append((_PROCESS.get() if context is None else context.get(_PROCESS), task))
        return task

    def run_in_executor(
        self, executor: Any, func: Callable[[Unpack[Args]], Result], *args: *Args
    ) -> asyncio.Future[Result]:
        """`func` runs somewhen between now and the moment at which its result is known."""
        future = self.create_future()
        process, random = _PROCESS.get(), self._random
        slowness = 1.0 if process is None else process.slowness
        nap_s = random.uniform(0.02, 1.5) if random.random() < self.laziness else 0.0

        def run() -> None:
            try:
                report: tuple[Callable[[Any], None], Any] = future.set_result, func(*args)
            except Exception as error:
                report = future.set_exception, error
            self.call_later(slowness * random.uniform(0.0, 0.002), _report, future, *report)

        self.call_later(nap_s + slowness * random.uniform(0.0001, 0.004), run)
        return future

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return not self._is_over

    def is_closed(self) -> bool:
        return self._is_over

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._is_over:
            self._on_error(f"{context.get('message')}: {context.get('exception')!r}")

    # What the simulation asks of it.

    def at(self, true_s: float, process: Process | None, callback: Callable[..., object], *args: Any) -> Handle:
        """Run `callback` in a process at a true moment."""
        context = copy_context() if process is None else process.context
        handle = Handle(callback, args, context, max(true_s, self.now_s))
        self._put(handle)
        return handle

    def soon(self, process: Process | None, callback: Callable[..., object], *args: Any) -> None:
        """Run `callback` in a process, now, after what is due already."""
        if not self._is_over:
            self._ready.append(Handle(callback, args, copy_context() if process is None else process.context))

    def spawn(self, process: Process, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """A task of that process, which may not be the one that runs now."""
        context: Context = process.context.copy()
        return self.create_task(work, name=name, context=context)

    def freeze(self, process: Process) -> None:
        process.num_freezes += 1

    def thaw(self, process: Process) -> None:
        """What came while it was frozen runs first, in order."""
        process.num_freezes -= 1
        if not process.is_frozen:
            self._ready.extendleft(reversed(process.held))
            process.held = []

    def kill(self, process: Process) -> None:
        """Nothing of it runs any more; its tasks stay as they are."""
        process.is_dead = True
        process.held = []

    def tasks_of_the_living(self) -> Iterator[tuple[Process, asyncio.Task[Any]]]:
        """Every task that was started, of processes that have not died."""
        for process, task in self._tasks:
            if process is not None and not process.is_dead:
                yield process, task

    def run_until(self, true_s: float) -> None:
        """Run what is due up to a moment; the time is that moment then."""
        with self._running():
            self._run_ready()
            while self._timers and self._timers[0][0] <= true_s:
                self.now_s = self._timers[0][0]
                while self._timers and self._timers[0][0] <= self.now_s:
                    self._ready.append(heapq.heappop(self._timers)[2])
                self._run_ready()
            self.now_s = true_s

    def finish(self) -> None:
        """The end of the world: unfinished work of every process is dropped without running any of it to its end."""
        with self._running():
            self._is_over = True
            self._ready.clear()
            self._timers.clear()
            for _, task in self._tasks:
                if not task.done():
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
                    _drop(task.get_coro())
                else:
                    task._log_traceback = False
            self._tasks.clear()

    @contextmanager
    def _running(self) -> Iterator[None]:
        events._set_running_loop(self)
        try:
            yield
        finally:
            events._set_running_loop(None)

    def _put(self, handle: Handle) -> None:
        if not self._is_over:
            self._num_timers += 1
            heapq.heappush(self._timers, (handle.when_s, self._num_timers, handle))

    def _run_ready(self) -> None:
        ready = self._ready
        num_run = 0
        while ready:
            handle = ready.popleft()
            process = handle.process
            if handle.is_cancelled or (process is not None and process.is_dead):
                continue
            if process is not None and process.num_freezes:
                process.held.append(handle)
                continue
            num_run += 1
            if num_run > MAX_CALLBACKS_AT_ONCE:
                raise AssertionError(f"time stands still at {self.now_s}: {handle.callback!r}")
            try:
                handle.context.run(handle.callback, *handle.args)
            except Exception as error:
                where = "nowhere" if process is None else process.name
                self._on_error(f"a callback of {where} raised {error!r}\n{''.join(traceback.format_exception(error))}")


def _report(future: asyncio.Future[Any], how: Callable[[Any], None], what: Any) -> None:
    if not future.done():
        how(what)


def _drop(coroutine: Any) -> None:
    """Close a coroutine; what it does on the way out has no effect any more. Task groups complain of GeneratorExit."""
    with suppress(BaseException):
        coroutine.close()
