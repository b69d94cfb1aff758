"""Last looks of a search: as long as what found the goodputs, as far as requests are left, and told as they are."""

from __future__ import annotations

import math

from pdserve.cluster.planner.attainment import Attainment
from pdserve.cluster.planner.findings import Picture
from pdserve.cluster.planner.goodput import Goodput
from pdserve.cluster.planner.looks import MIN_LOOK, as_seen, shared_out
from pdserve.cluster.planner.trials import View


def attained(value: float, num_requests: int = 1_000) -> Attainment:
    return Attainment(value, value, value, num_requests, 20, 0, 0, value, 1.0, True, "")


def goodput(rate: float) -> Goodput:
    return Goodput(rate, 0.9 * rate, 1.1 * rate, attained(0.68), 1_000, 4, ((rate, attained(0.68)),), "")


def view(one: Attainment) -> View:
    return View(one, 1.0, Picture(1.0, (), (), (), {}, 1.0, 1.0), (), (), one.num_requests)


def test_each_gets_what_it_wants_while_there_is_enough() -> None:
    assert shared_out({0: 5_000, 1: 2_000}, 7_000) == {0: 5_000, 1: 2_000}


def test_what_is_short_is_shared_and_who_wants_little_leaves_the_rest_to_others() -> None:
    assert shared_out({0: 50_000, 1: 1_000, 2: 50_000}, 21_000) == {0: 10_000, 1: 1_000, 2: 10_000}


def test_a_look_that_would_say_nothing_is_not_taken() -> None:
    assert shared_out({0: 5_000, 1: 5_000}, 2 * MIN_LOOK - 1) == {1: MIN_LOOK}
    assert shared_out({0: 5_000}, 0) == {}
    assert shared_out({}, 1_000) == {}


def test_beside_a_goodput_stands_the_attainment_of_the_run_that_is_shown() -> None:
    """Latencies that are all in time never stand beside an attainment of two thirds."""
    seen = as_seen(goodput(10.0), view(attained(0.93)))
    assert seen.attainment_at_rate.value == 0.93
    assert seen.probes == goodput(10.0).probes


def test_where_nothing_was_seen_at_the_rate_the_runs_that_found_it_are_told() -> None:
    unknown = attained(math.nan, num_requests=0)
    for rate, one in ((10.0, None), (10.0, view(unknown)), (0.0, view(attained(0.93)))):
        assert as_seen(goodput(rate), one) == goodput(rate)
