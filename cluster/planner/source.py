"""Where a simulation gets its requests: one protocol for open loops and for conversations that wait for answers.

    while (at_s := source.next_arrival_s()) < math.inf or requests are running:
        take arrival = source.pop() when the clock reaches at_s
        call source.ended(arrival, now_s) when its answer has ended, or was refused

An open loop ignores `ended`. A closed one schedules the next turn by it, so `next_arrival_s` may fall after it, though
never below `now_s`; before popping, tell it of everything that ended earlier. What a request holds depends on the seed
alone, never on the order in which others end.

Knows neither how arrivals are made nor what a simulation does with them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

from pdserve.cluster.arrivals import Arrival

SESSION_BITS = 40
"""A session's number is its own below these bits and that of its source in a `Merged` above them."""


class Source(Protocol):
    """Requests in order of time. Memory is that of the sessions that live."""

    def next_arrival_s(self) -> float:
        """When the next request comes; infinity: none does, unless a running one ends first."""
        ...

    def pop(self) -> Arrival:
        """That request. Only while `next_arrival_s` is finite."""
        ...

    def ended(self, arrival: Arrival, now_s: float) -> None:
        """A popped request has ended, well or not. Once for each, in order of time."""
        ...


class OpenLoop:
    """Requests that come whatever became of the earlier ones. Iterating takes what is left."""

    def __init__(self, arrivals: Iterator[Arrival]) -> None:
        self._arrivals = arrivals
        self._next = next(arrivals, None)

    def __iter__(self) -> Iterator[Arrival]:
        while self._next is not None:
            yield self.pop()

    def next_arrival_s(self) -> float:
        return math.inf if self._next is None else self._next.at_s

    def pop(self) -> Arrival:
        arrival = self._next
        assert arrival is not None, "popped an exhausted source"
        self._next = next(self._arrivals, None)
        return arrival

    def ended(self, arrival: Arrival, now_s: float) -> None:
        """Nobody waits for it."""

    def first(self, num_requests: int) -> OpenLoop:
        """The next so many of it; this one must not be used any more."""
        return OpenLoop(itertools.islice(self, num_requests))


class Limited:
    """The first `num_requests` requests of a source, whichever they turn out to be."""

    def __init__(self, source: Source, num_requests: int) -> None:
        self._source = source
        self._num_left = num_requests

    def next_arrival_s(self) -> float:
        return self._source.next_arrival_s() if self._num_left > 0 else math.inf

    def pop(self) -> Arrival:
        assert self._num_left > 0, "popped an exhausted source"
        self._num_left -= 1
        return self._source.pop()

    def ended(self, arrival: Arrival, now_s: float) -> None:
        self._source.ended(arrival, now_s)


class Merged:
    """Several sources at once. Sessions of source `i` carry the number `i` above `SESSION_BITS`."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources

    def next_arrival_s(self) -> float:
        return min(source.next_arrival_s() for source in self._sources)

    def pop(self) -> Arrival:
        return min(self._sources, key=lambda source: source.next_arrival_s()).pop()

    def ended(self, arrival: Arrival, now_s: float) -> None:
        if arrival.session is not None:
            self._sources[arrival.session >> SESSION_BITS].ended(arrival, now_s)


def limited(source: Source, num_requests: int | None) -> Source:
    """The first so many requests of a source, or all."""
    if num_requests is None:
        return source
    return source.first(num_requests) if isinstance(source, OpenLoop) else Limited(source, num_requests)


def drain(source: Source) -> Iterator[Arrival]:
    """All requests of a source, each answered the moment it comes."""
    while source.next_arrival_s() < math.inf:
        arrival = source.pop()
        yield arrival
        source.ended(arrival, arrival.at_s)
