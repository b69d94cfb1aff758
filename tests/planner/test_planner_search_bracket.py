"""One set-up's edge from short runs: where it lies, which runs do not count, and when no rate will do."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from planner_setups import make_profile

from pdserve.cluster.planner.attainment import Attainment
from pdserve.cluster.planner.bracket import Bracket
from pdserve.cluster.planner.findings import Phase, Picture
from pdserve.cluster.planner.fleets import fleets_of, parse_split
from pdserve.cluster.planner.setups import Choices, start
from pdserve.cluster.planner.trials import View

MOST = 8_000


def bracket(guess: float = 10.0) -> Bracket:
    (fleet,) = fleets_of([make_profile()], {})
    return Bracket(start(fleet, parse_split("2M"), Choices()), guess)


def view(stretch: float, num_requests: int = 1_000) -> View:
    share = 0.95 if stretch <= 1 else 0.5
    attained = Attainment(share, share - 0.02, share + 0.02, num_requests, 20, 0, 0, share, 1.0, True, "")
    picture = Picture(1.0, (), (), (Phase("decode", 1000.0, 1000.0, 1000.0, 0.0),), {}, 1.0, 1.0)
    return View(attained, stretch, picture, (), (), num_requests, failing="" if stretch <= 1 else "TTFT")


def find(one: Bracket, edge: float, length: int = 1_000) -> None:
    """As a search does, of a set-up whose stretch is the rate over the edge."""
    for _ in range(30):
        if one.is_done():
            return
        rate = one.next_rate()
        one.add(rate, view(rate / edge, max(length, one.at_least(rate))), MOST)


@pytest.mark.parametrize("edge", [0.7, 9.0, 55.0, 400.0])
def test_the_edge_is_found_from_a_wrong_guess(edge: float) -> None:
    one = bracket()
    find(one, edge)
    assert one.estimate == pytest.approx(edge, rel=0.12)
    assert not one.is_infeasible


def test_far_below_the_edge_rates_go_up_twofold() -> None:
    """How far a rate is from too high is known, whatever the lengths of answers are."""
    one = bracket()
    one.add(10.0, view(0.05), MOST)
    assert one.next_rate() == 20.0


def test_a_run_that_was_too_short_to_tell_is_done_again_as_long_as_it_must_be() -> None:
    one = bracket()
    short = replace(view(1.5, 500), needed_s=100.0)
    one.add(10.0, short, MOST)
    assert one.views == {}
    assert one.next_rate() == 10.0
    assert one.at_least(10.0) == 1_100
    one.add(10.0, view(0.4, 1_100), MOST)
    assert one.below == 10.0
    assert one.goodput().num_requests == 1_600, "what was in vain is counted"


def test_where_a_run_cannot_be_long_enough_its_rate_counts_as_too_high_and_that_is_told() -> None:
    one = bracket()
    one.add(10.0, replace(view(1.5, 500), needed_s=10_000.0), MOST)
    assert one.above == 10.0
    assert one.needed_requests == 110_000
    one.add(5.0, view(0.5), MOST)
    one.add(7.0, view(1.2), MOST)
    assert one.needed_requests == 0, "it is another rate now that says where the edge is"


def test_a_miss_at_a_vanishing_rate_that_may_be_chance_is_looked_at_again_and_does_not_end_the_set_up() -> None:
    one = bracket()
    rates = []
    for _ in range(20):
        if one.is_done():
            break
        rates.append(one.next_rate())
        one.add(rates[-1], replace(view(1.05, max(500, one.at_least(rates[-1]))), is_sure=rates[-1] > 3.0), MOST)
    assert rates[-1] == rates[-2], "once more, longer"
    assert one.at_least(rates[-1]) == 2_000
    assert not one.is_infeasible
    assert one.estimate > 0, "the finish has the last word"
    assert one.goodput().failing == ""
    assert "found no rate" in one.goodput().reason


def test_a_sure_miss_at_a_vanishing_rate_is_the_end_and_names_what_fails() -> None:
    one = bracket()
    for _ in range(20):
        if one.is_done():
            break
        one.add(one.next_rate(), view(3.0), MOST)
    assert one.is_infeasible
    found = one.goodput()
    assert (found.rate, found.failing) == (0.0, "TTFT")
    assert math.isfinite(found.high)
