"""What one run of `pdserve tune` says of a rate, with the real simulator; and jobs on several processes."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from planner_setups import make_profile

from pdserve.cluster import tune_pool
from pdserve.cluster.planner.findings import Setup, Target
from pdserve.cluster.planner.fleets import fleets_of, parse_split
from pdserve.cluster.planner.picture import AFTER_FIRST_TOKEN
from pdserve.cluster.planner.setup_config import deadline_s
from pdserve.cluster.planner.setups import Choices, start
from pdserve.cluster.planner.trials import Found, Hunt, Probe, View
from pdserve.cluster.planner.workload import parse_workload
from pdserve.cluster.tune_jobs import Problem, perform
from pdserve.cluster.tune_pool import evaluator

LOOSE = (Target("all", 5_000.0, 200.0, 0.9),)
SHORT = "synthetic?prompt=64&output=8&rate=1"
LONG_TAIL = "synthetic?prompt=64/128&output=20/400&rate=1"


def problem(workload: str, targets: tuple[Target, ...] = LOOSE, least_timeout_s: float = 0.0) -> Problem:
    profile = make_profile()
    return Problem({profile.name: profile}, parse_workload(workload), targets, least_timeout_s)


def setup(text: str) -> Setup:
    (fleet,) = fleets_of([make_profile()], {})
    return start(fleet, parse_split(text), Choices())


def view(workload: str, rate: float, num_requests: int, **changes: Any) -> View:
    found = perform(Probe(setup("2M"), rate, 1, num_requests), problem(workload, **changes))
    assert isinstance(found, View)
    return found


@pytest.mark.parametrize("num_requests", [200, 600])
@pytest.mark.parametrize("rate", [2_000.0, 1e6])
def test_a_run_that_comes_far_faster_than_it_is_served_never_holds_the_targets(rate: float, num_requests: int) -> None:
    """All of it is in time: 600 of these requests take two workers about three seconds."""
    assert view(SHORT, rate, num_requests).stretch > 1


@pytest.mark.parametrize("num_requests", [300, 1_000])
def test_that_the_last_answers_take_long_says_nothing_of_the_rate(num_requests: int) -> None:
    """One in a hundred answers is twenty times as long as the median: a run goes on long after its arrivals."""
    found = view(LONG_TAIL, 20.0, num_requests)
    assert found.stretch < 0.5
    assert found.needed_s == 0.0


def test_a_run_that_ends_before_its_answers_do_is_too_short_and_says_how_long_it_must_be() -> None:
    found = view("synthetic?prompt=64&output=600&rate=1", 40.0, 60)
    assert found.stretch > 1
    assert found.needed_s > 60 / 40.0


def test_energy_is_for_what_workers_did_while_requests_came() -> None:
    """However long the last answers take: who always has one is busy all the time, who has none idles."""
    busy = view(LONG_TAIL, 30.0, 400).picture.busy
    assert set(busy) == {"mixed-0", "mixed-1"}
    assert all(share > 0.95 for share in busy.values())
    assert all(share < 0.2 for share in view("synthetic?prompt=16&output=2&rate=1", 2.0, 100).picture.busy.values())


def test_where_answers_are_of_one_token_decode_workers_idle_and_nothing_is_handed_on() -> None:
    found = perform(Probe(setup("1P1D"), 20.0, 1, 300), problem("synthetic?prompt=200&output=1&rate=1"))
    assert isinstance(found, View)
    assert found.picture.busy["prefill-0"] > 0.1
    assert found.picture.busy["decode-0"] == 0.0
    after = [phase for phase in found.picture.phases if phase.name in AFTER_FIRST_TOKEN]
    assert [(phase.mean_ms, phase.share_of_misses) for phase in after] == [(0.0, 0.0)] * 3


def test_latencies_are_of_the_requests_that_the_attainment_is_of() -> None:
    """Answers take long and the system fills for as long: how much of the run that is is one rule for both."""
    for rate, tpot_ms in ((6.0, 18.0), (6.0, 22.0), (7.0, 22.0), (7.0, 26.0)):
        targets = (Target("all", 500.0, tpot_ms, 0.9),)
        found = view("synthetic?prompt=64&output=400&rate=1", rate, 300, targets=targets)
        share = np.mean([value <= tpot_ms for value in found.picture.tpot_ms[:99]])
        assert share == pytest.approx(found.attainment.tpot, abs=0.02)


def test_a_hunt_says_how_long_its_runs_were() -> None:
    tight = (Target("all", 500.0, 8.0, 0.9),)
    found = perform(Hunt(setup("2M"), 100.0, 1, 0.15, 12_000), problem("synthetic?prompt=32&output=32&rate=1", tight))
    assert isinstance(found, Found)
    assert 100 <= found.run_requests < found.num_requests


def test_a_deadline_does_not_decide_what_a_set_up_can_do() -> None:
    """Answers of 5,000 tokens at up to 50 ms are in time after four minutes; a router gives up after two by default."""
    targets = (Target("all", 500.0, 50.0, 0.9),)
    workload = "synthetic?prompt=16&output=5000&rate=1"
    slow = make_profile(decode=tuple(one.model_copy(update={"fixed_s": 0.03}) for one in make_profile().decode))
    outcomes = {}
    for name, least_s in (("default", 0.0), ("as needed", deadline_s(targets, 5_000))):
        asked = Problem({slow.name: slow}, parse_workload(workload), targets, least_s)
        outcomes[name] = perform(Probe(setup("1M"), 0.02, 1, 30), asked)
    given_up, done = outcomes["default"], outcomes["as needed"]
    assert isinstance(given_up, View)
    assert isinstance(done, View)
    assert (given_up.failing, done.failing) == ("completion", "")
    assert given_up.failure.startswith("100% of the requests fail: ")
    assert done.stretch <= 1


def test_what_is_beyond_all_measurements_is_told_of_runs_at_the_goodput_not_of_other_ones() -> None:
    domain = make_profile().domain
    narrow = domain.decode_batch.model_copy(update={"largest": 24.0})
    profile = make_profile(domain=domain.model_copy(update={"decode_batch": narrow}))
    tight = (Target("all", 500.0, 8.0, 0.9),)
    asked = Problem({profile.name: profile}, parse_workload("synthetic?prompt=32&output=32&rate=1"), tight)
    found = perform(Hunt(setup("1M"), 500.0, 1, 0.15, 12_000), asked)
    assert isinstance(found, Found)
    assert 0 < found.goodput.rate < 300.0
    assert found.extrapolated == (), "the guess was far above: its steps were large, those at the goodput are not"


class _Result:
    def __init__(self, num_requests: int) -> None:
        self.num_requests = num_requests


def test_what_is_done_is_told_before_the_rest_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long job at the front does not hold the bar."""
    first, second = Future[Any](), Future[Any]()

    class Pool:
        """Instead of processes."""

        def __init__(self, *_: object) -> None:
            return

        def submit(self, _: object, job: Probe) -> Future[Any]:
            return first if job.rate == 1.0 else second

        def shutdown(self, **_: object) -> None:
            return

    def tell(_: str, num: int) -> None:
        told.append(num)
        if num == 2:
            first.set_result(_Result(1))

    monkeypatch.setattr(tune_pool, "ProcessPoolExecutor", Pool)
    told: list[int] = []
    second.set_result(_Result(2))
    with evaluator(problem(SHORT), 2, tell) as evaluate:
        found = evaluate("a stage", [Probe(setup("2M"), 1.0, 1, 10), Probe(setup("2M"), 2.0, 1, 10)])
    assert told == [2, 1]
    assert [one.num_requests for one in found] == [1, 2], "in the order of the jobs"
