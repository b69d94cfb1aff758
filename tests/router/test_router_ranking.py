"""A ranking is what sorting would give, and equal ones take turns."""

from __future__ import annotations

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from pdserve.router.ranking import Ranking

CHANGES = st.lists(st.tuples(st.integers(0, 9), st.one_of(st.none(), st.integers(0, 4))), max_size=60)


@given(CHANGES, st.integers(0, 50))
def test_it_is_what_sorting_would_give(changes: list[tuple[int, int | None]], turn: int) -> None:
    ranking, numbers = Ranking(), dict[int, int]()
    for slot, number in changes:
        if number is None:
            ranking.remove(slot)
            numbers.pop(slot, None)
        else:
            ranking.put(slot, number)
            numbers[slot] = number
    found = list(ranking.ascending(turn))
    assert dict(found) == numbers
    assert len(found) == len(numbers) == len(ranking)
    assert [number for _, number in found] == sorted(numbers.values())
    if numbers:
        assert ranking.highest() == max(numbers.values())


def test_equal_ones_take_turns() -> None:
    ranking = Ranking()
    for slot in range(3):
        ranking.put(slot, 7)
    ranking.put(3, 9)
    orders = [[slot for slot, _ in ranking.ascending(turn)] for turn in range(4)]
    assert orders == [[0, 1, 2, 3], [1, 2, 0, 3], [2, 0, 1, 3], [0, 1, 2, 3]]
    assert list(islice(ranking.ascending(1), 1)) == [(1, 7)]
