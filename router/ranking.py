"""Workers in order of one number, kept in order while the numbers change: a look costs the same for any number of them.

Equal ones take turns. A change costs one binary search in the distinct numbers and one among equals. Knows nothing of
what the number means.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator


class Ranking:
    """`slot`s are small numbers, one for each worker, that last as long as it does."""

    def __init__(self) -> None:
        self._number: dict[int, int] = {}
        self._slots: dict[int, list[int]] = {}  # by number, ascending
        self._numbers: list[int] = []  # distinct, ascending

    def __len__(self) -> int:
        return len(self._number)

    def put(self, slot: int, number: int) -> None:
        """The slot's number from now on."""
        if self._number.get(slot) == number:
            return
        self.remove(slot)
        self._number[slot] = number
        equals = self._slots.get(number)
        if equals is None:
            self._slots[number] = [slot]
            insort(self._numbers, number)
        else:
            insort(equals, slot)

    def remove(self, slot: int) -> None:
        number = self._number.pop(slot, None)
        if number is None:
            return
        equals = self._slots[number]
        if len(equals) > 1:
            del equals[bisect_left(equals, slot)]
            return
        del self._slots[number]
        del self._numbers[bisect_left(self._numbers, number)]

    def highest(self) -> int:
        """The greatest number, of at least one slot."""
        return self._numbers[-1]

    def ascending(self, turn: int) -> Iterator[tuple[int, int]]:
        """Slots and their numbers, lowest first. Equal ones begin with another at each `turn`."""
        for number in self._numbers:
            equals = self._slots[number]
            first = turn % len(equals)
            for place in range(first, first + len(equals)):
                yield equals[place - len(equals) if place >= len(equals) else place], number
