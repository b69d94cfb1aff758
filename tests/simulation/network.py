"""The simulated network: messages that are late, lost, doubled or overtaken, and cables that are cut in one direction.

Places are names of hosts ("p0", "router0"), which outlive the processes that run there. A message is a callback that is
run when it arrives: never, once or twice. What meets a cut cable is lost or waits until it is mended, as the seed says;
streams learn of a cut from missing keepalives. Knows nothing of what the messages say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

from simulation.loop import Process, SimLoop
from simulation.trace import Trace

KEEPALIVE_S = (5.0, 10.0)  # after this much silence an end of a connection gives it up; see proto.channels


@dataclass(slots=True)
class Weather:
    """What happens to messages while the faults last. Probabilities, and seconds."""

    latency_s: float = 0.001
    loss: float = 0.0
    duplication: float = 0.0
    straggling: float = 0.0
    straggle_s: float = 0.0
    cut_messages_wait: bool = False

    def calm(self) -> None:
        self.loss = self.duplication = self.straggling = 0.0


class Connection(Protocol):
    """What lives between two processes and dies with a cut."""

    @property
    def hosts(self) -> tuple[str, str]: ...

    @property
    def ends(self) -> tuple[Process, ...]:
        """The processes at those hosts, as far as they have accepted."""

    @property
    def is_open(self) -> bool: ...

    def mended(self) -> None:
        """The cable works again: what waited goes on."""

    def end_died(self, process: Process, silent: bool) -> None:
        """One of its processes is gone."""

    def give_up(self, end: Process, why: str) -> None:
        """This end closes the connection; the other one may not hear of it."""


class Network:
    """Owner of the cables and of the connections."""

    def __init__(self, loop: SimLoop, random: Random, trace: Trace, weather: Weather) -> None:
        self.loop = loop
        self.random = random
        self.trace = trace
        self.weather = weather
        self.connections: dict[int, Connection] = {}
        self._cuts: dict[tuple[str, str], int] = {}
        self._waiting: list[tuple[str, str, Callable[[], None]]] = []
        self._num_connections = 0

    def is_cut(self, source: str, target: str) -> bool:
        return self._cuts.get((source, target), 0) > 0

    def latency_s(self) -> float:
        weather, random = self.weather, self.random
        latency_s = weather.latency_s * (0.5 + random.random())
        if weather.straggling and random.random() < weather.straggling:
            self.trace.count("messages late")
            latency_s += random.uniform(0.02, weather.straggle_s)
        return latency_s

    def send(self, source: str, target: str, what: str, arrive: Callable[[], None]) -> None:
        """A message on its own: nothing keeps it in order."""
        weather, random = self.weather, self.random
        if weather.loss and random.random() < weather.loss:
            self.trace.count("messages lost")
            self.trace.add("network", f"loses {what} from {source} to {target}")
            return
        num_copies = 1
        if weather.duplication and random.random() < weather.duplication:
            self.trace.count("messages doubled")
            self.trace.add("network", f"doubles {what} from {source} to {target}")
            num_copies = 2
        for _ in range(num_copies):
            self.loop.at(self.loop.now_s + self.latency_s(), None, self._arrive, source, target, what, arrive)

    def cut(self, source: str, target: str) -> None:
        """Nothing gets from one place to the other any more, until mended as often as it was cut."""
        self._cuts[source, target] = self._cuts.get((source, target), 0) + 1
        if self._cuts[source, target] == 1:
            self.trace.add("network", f"the cable from {source} to {target} is cut")
            for connection in self._between(source, target):
                self.watch(connection, lambda: self.is_cut(source, target), f"no keepalive on {source} -> {target}")

    def mend(self, source: str, target: str) -> None:
        self._cuts[source, target] -= 1
        if self.is_cut(source, target):
            return
        self.trace.add("network", f"the cable from {source} to {target} is mended")
        waiting, self._waiting = self._waiting, []
        for entry in waiting:
            if entry[:2] == (source, target):
                self.loop.at(self.loop.now_s + self.latency_s(), None, self._arrive, *entry[:2], "", entry[2])
            else:
                self._waiting.append(entry)
        for connection in self._between(source, target):
            connection.mended()

    def connect(self, connection: Connection) -> int:
        self._num_connections += 1
        self.connections[self._num_connections] = connection
        return self._num_connections

    def disconnect(self, number: int) -> None:
        self.connections.pop(number, None)

    def of(self, process: Process) -> list[Connection]:
        return [connection for connection in self.connections.values() if process in connection.ends]

    def watch(self, connection: Connection, is_silent: Callable[[], bool], why: str) -> None:
        """Each end gives up on its own once it has heard nothing for long enough; looked at once."""
        for end in connection.ends:
            self.loop.at(
                self.loop.now_s + self.random.uniform(*KEEPALIVE_S), None, _expire, connection, end, is_silent, why
            )

    def _between(self, source: str, target: str) -> list[Connection]:
        return [one for one in self.connections.values() if set(one.hosts) == {source, target}]

    def _arrive(self, source: str, target: str, what: str, arrive: Callable[[], None]) -> None:
        if not self.is_cut(source, target):
            arrive()
        elif self.weather.cut_messages_wait:
            self.trace.count("messages held by a cut")
            self._waiting.append((source, target, arrive))
        else:
            self.trace.count("messages lost in a cut")
            self.trace.add("network", f"loses {what} from {source} to {target} in the cut")


def _expire(connection: Connection, end: Process, is_silent: Callable[[], bool], why: str) -> None:
    if connection.is_open and is_silent():
        connection.give_up(end, why)
