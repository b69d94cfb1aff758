"""The engine's own thread: run commands, take a step, publish, sleep until there is something to do.

Everything the engine owns (scheduler, block pool, sequences) is touched in this thread only, but for blocks that others
take at once (`ask`). Others hand in commands; what happened is published through one callback, once per turn of the
loop. Knows nothing of asyncio, gRPC or hand-offs: the callback and the commands bring those.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from pdserve.engine.engine import Engine
from pdserve.engine.turn import Turn, turn_of

Command = Callable[[Engine], object]
T = TypeVar("T")


class EngineLoop:
    """Owns the thread. `post` from anywhere; `on_turn` and `on_crash` are called in the engine thread."""

    def __init__(self, engine: Engine, on_turn: Callable[[Turn], None], on_crash: Callable[[Exception], None]):
        self._engine = engine
        self._on_turn = on_turn
        self._on_crash = on_crash
        self._commands: deque[Command] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._num_steps = 0
        self._num_preemptions = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Ask the thread to end after its current turn; whether it did in time."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def post(self, command: Command) -> None:
        """Run `command` in the engine thread before its next step; in order of posting."""
        self._commands.append(command)
        self._wake.set()

    def ask(self, question: Callable[[Engine], T]) -> T:
        """The answer at once, in the calling thread: a step that computes is not waited for.

        It may look at the pool, take blocks that nobody has, claim blocks of known content and let go of those
        claims. All else that gives blocks back or touches sequences is for `post`: the step may be using them.
        """
        with self._engine.books:
            return question(self._engine)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.wait()
                self._wake.clear()
                while not self._stopping and self._turn():
                    pass
        except Exception as error:
            self._on_crash(error)  # the owner logs it and ends the worker

    def _turn(self) -> bool:
        """One turn; whether another may achieve something without waiting for a command.

        A step that could run nothing waits for blocks that are held outside: they come back by a command.
        """
        commanded = bool(self._commands)
        with self._engine.books:
            while self._commands:
                self._commands.popleft()(self._engine)
        step = self._engine.step(time.monotonic) if self._engine.has_work else None
        if step is not None:
            self._num_steps += 1
            self._num_preemptions += len(step.preempted)
        if step is not None or commanded:
            engine = self._engine
            with engine.books:
                turn = turn_of(step, engine.pool, engine.scheduler, self._num_steps, self._num_preemptions)
            self._on_turn(turn)
        return step is not None and (step.num_tokens > 0 or bool(step.preempted))
