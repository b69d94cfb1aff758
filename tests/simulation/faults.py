"""The faults of one run: drawn ahead as a schedule, carried out by the loop, all over at the calm.

What happens to single messages and blocks is the weather's and the wires' own; here is what happens to processes,
cables and connections.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from simulation.streams import Stream
from simulation.world import World


class Faults:
    """Puts a world's faults on its loop."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._scenario = world.scenario
        self._random = Random(f"{world.scenario.seed}/faults")
        self._places = [*world.plans, *world.router_names]

    def schedule(self) -> None:
        """Each kind draws its own, whether it is on or not: kinds do not shift each other's moments."""
        for kind, plan in (
            ("crashes", self._crash),
            ("router crashes", self._router_crash),
            ("freezes", self._freeze),
            ("slowness", self._stutter),
            ("cuts", self._cut),
            ("resets", self._reset),
        ):
            self._random = Random(f"{self._scenario.seed}/faults/{kind}")
            if kind in self._scenario.kinds:
                for _ in range(self._random.randint(1, 4)):
                    plan()
        world = self._world
        world.loop.at(self._scenario.calm_s, None, self._calm)

    def _calm(self) -> None:
        world = self._world
        world.is_calm = True
        world.trace.add("faults", "it is calm from here on")
        self._scenario.weather.calm()
        self._scenario.wire_faults.calm()

    def _at(self, when_s: float, what: Callable[[], None]) -> None:
        self._world.loop.at(when_s, None, what)

    def _moment_s(self, needed_s: float = 0.0) -> float:
        return self._random.uniform(0.6, max(0.7, self._scenario.calm_s - needed_s))

    def _crash(self) -> None:
        random = self._random
        worker_id = random.choice(list(self._world.plans))
        silent = random.random() < 0.3
        restart_s = random.uniform(0.5, 5.0) if random.random() < 0.85 else None
        notice_s = random.uniform(0.05, 1.0) if random.random() < 0.7 else random.uniform(1.0, 8.0)
        self._at(self._moment_s(), lambda: self._world.crash_worker(worker_id, silent, restart_s, notice_s))

    def _router_crash(self) -> None:
        random = self._random
        name = random.choice(self._world.router_names)
        silent, restart_s = random.random() < 0.3, random.uniform(0.2, 2.0)
        self._at(self._moment_s(), lambda: self._world.crash_router(name, silent, restart_s))

    def _freeze(self) -> None:
        random = self._random
        worker_id = random.choice(list(self._world.plans))
        seconds = random.choice((random.uniform(0.2, 2.0), random.uniform(2.0, 12.0)))
        seconds = min(seconds, self._scenario.calm_s - 1.0)
        self._at(self._moment_s(seconds), lambda: self._world.freeze(worker_id, seconds))

    def _stutter(self) -> None:
        """Slow: runs for a moment, stands still for a longer one."""
        random = self._random
        worker_id = random.choice(list(self._world.plans))
        start_s = self._moment_s(3.0)
        for number in range(10):
            self._at(start_s + 0.3 * number, lambda: self._world.freeze(worker_id, 0.25))

    def _cut(self) -> None:
        random, world = self._random, self._world
        places = random.sample([*self._places, "controller"], 2)
        seconds = random.choice((random.uniform(0.1, 1.5), random.uniform(1.0, 14.0)))
        seconds = min(seconds, self._scenario.calm_s - 1.0)
        start_s = self._moment_s(seconds)
        ways = [(places[0], places[1])]
        if random.random() < 0.6:
            ways.append((places[1], places[0]))

        def cut() -> None:
            world.disturbed.update(places)
            world.trace.count("cuts")
            for source, target in ways:
                world.network.cut(source, target)

        def mend() -> None:
            for source, target in ways:
                world.network.mend(source, target)

        self._at(start_s, cut)
        self._at(start_s + seconds, mend)

    def _reset(self) -> None:
        chosen = self._random.random()

        def reset() -> None:
            streams = [one for one in self._world.network.connections.values() if isinstance(one, Stream)]
            if streams:
                self._world.trace.count("resets")
                stream = streams[int(chosen * len(streams))]
                self._world.disturbed.update(stream.hosts)
                stream.reset("connection reset")

        self._at(self._moment_s(), reset)
