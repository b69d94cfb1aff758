"""Which order of set-ups is one: pairs that are apart, tied on one side or both, and swapped."""

from __future__ import annotations

import pytest

from pdserve.cluster.validation import Comparison, Figure, Point
from pdserve.cluster.validation_order import Order, orders


def at(setup: str, real: int, simulated: int, rate: float = 1.0) -> Comparison:
    """A point with these attainments in %."""
    figure = Figure("attainment", real / 100, simulated / 100, (simulated - real) / 100, 0.03)
    return Comparison(Point(setup, "short", rate), (figure,), 100, 0, None, 0.0, {})


def order_of(**attainments: tuple[int, int]) -> Order:
    (order,) = orders([at(name.strip("_"), *both) for name, both in attainments.items()])
    return order


@pytest.mark.parametrize(
    ("one", "other", "real", "simulated", "verdict"),
    [
        ((90, 88), (70, 75), "1M > 1P1D", "1M > 1P1D", "the same order"),
        ((70, 75), (90, 88), "1P1D > 1M", "1P1D > 1M", "the same order"),
        ((0, 44), (0, 100), "1M = 1P1D", "1P1D > 1M", "real cannot tell 1M and 1P1D apart, simulated 1P1D > 1M"),
        ((90, 80), (80, 82), "1M > 1P1D", "1M = 1P1D", "simulated cannot tell 1M and 1P1D apart, real 1M > 1P1D"),
        ((90, 60), (70, 90), "1M > 1P1D", "1P1D > 1M", "1M and 1P1D swapped: real 1M > 1P1D, simulated 1P1D > 1M"),
        ((90, 88), (88, 90), "1M = 1P1D", "1M = 1P1D", "no order: all within 3 points"),
        ((53, 53), (50, 50), "1M > 1P1D", "1M > 1P1D", "the same order"),
        ((31, 31), (33, 33), "1M = 1P1D", "1M = 1P1D", "no order: all within 3 points"),
    ],
    ids=["same", "same-back", "real-tied", "simulated-tied", "swapped", "tied", "three-points", "two-points"],
)
def test_a_pair_is_told_as_what_it_is(
    one: tuple[int, int], other: tuple[int, int], real: str, simulated: str, verdict: str
) -> None:
    order = order_of(_1M=one, _1P1D=other)
    assert (order.real, order.simulated, order.verdict) == (real, simulated, verdict)
    assert bool(order.swapped) == ("swapped" in verdict)


def test_more_than_two_are_compared_pair_by_pair() -> None:
    order = order_of(_2M=(90, 90), _1P1D=(70, 50), _1M=(50, 70))
    assert (order.real, order.simulated) == ("2M > 1P1D > 1M", "2M > 1M > 1P1D")
    assert order.verdict == "1P1D and 1M swapped: real 1P1D > 1M, simulated 1M > 1P1D; 2 of 3 pairs alike"
    assert [pair.kind for pair in order.pairs] == ["same", "same", "swapped"]


def test_one_pair_apart_and_the_others_tied_alike_is_the_same_order() -> None:
    order = order_of(_2M=(90, 90), _1P1D=(70, 70), _1M=(71, 71))
    assert order.real == "2M > 1P1D = 1M"
    assert order.verdict == "the same order"


def test_ties_do_not_carry_over() -> None:
    order = order_of(_2M=(50, 50), _1P1D=(48, 48), _1M=(46, 48))
    assert order.real == "2M = 1P1D = 1M (but 2M > 1M)"
    assert order.simulated == "2M = 1P1D = 1M"
    assert order.verdict == "simulated cannot tell 2M and 1M apart, real 2M > 1M; 2 of 3 pairs alike"


def test_each_workload_and_rate_has_an_order_where_two_set_ups_were_measured() -> None:
    found = orders([at("2M", 90, 90, rate=1.0), at("2M", 80, 80, rate=2.0), at("1P1D", 50, 50, rate=2.0)])
    assert [order.rate for order in found] == [2.0]
