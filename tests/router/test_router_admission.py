"""Admission: bounded, first come first served, and honest about when to come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.proto.errors import DuplicateRequest, Overloaded
from pdserve.router.admission import Admission, Verdict

FAR = 1e9


def test_requests_run_up_to_the_bound_then_wait_then_are_turned_away() -> None:
    admission = Admission(max_inflight=1, max_queued=1)
    assert admission.arrive("a", 0.0, FAR) is Verdict.ADMITTED
    assert admission.arrive("b", 0.0, FAR) is Verdict.QUEUED
    with pytest.raises(Overloaded) as raised:
        admission.arrive("c", 0.0, FAR)
    assert raised.value.retry_after_s > 0
    assert admission.leave("a", 1.0) == "b"
    assert admission.arrive("c", 1.0, FAR) is Verdict.QUEUED


@pytest.mark.parametrize("first", ["running", "queued"])
def test_an_id_in_flight_is_refused_until_it_has_left(first: str) -> None:
    admission = Admission(max_inflight=1, max_queued=5)
    if first == "queued":
        admission.arrive("other", 0.0, FAR)
    admission.arrive("a", 0.0, FAR)
    with pytest.raises(DuplicateRequest):
        admission.arrive("a", 0.0, FAR)
    admission.leave("a", 0.0)
    admission.arrive("a", 0.0, FAR)


def test_a_queue_longer_than_the_deadline_is_said_so_at_once() -> None:
    admission = Admission(max_inflight=1, max_queued=100)
    for number in range(10):
        admission.arrive(f"warm{number}", number * 2.0, FAR)
        admission.leave(f"warm{number}", number * 2.0)
    admission.arrive("running", 20.0, FAR)
    assert admission.arrive("patient", 20.0, 30.0) is Verdict.QUEUED
    with pytest.raises(Overloaded, match="deadline_unmeetable"):
        admission.arrive("hasty", 20.0, 23.0)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=200))
def test_nobody_is_lost_and_the_bounds_hold_whatever_comes_and_goes(steps: list[tuple[bool, int]]) -> None:
    admission = Admission(max_inflight=2, max_queued=3)
    running: set[str] = set()
    queue: list[str] = []
    for arriving, number in steps:
        name = str(number)
        if arriving and name not in running and name not in queue:
            if len(running) == 2 and len(queue) == 3:
                with pytest.raises(Overloaded):
                    admission.arrive(name, 0.0, FAR)
            elif admission.arrive(name, 0.0, FAR) is Verdict.ADMITTED:
                running.add(name)
            else:
                queue.append(name)
        elif not arriving and name in queue:
            queue.remove(name)
            assert admission.leave(name, 0.0) is None
        elif not arriving and name in running:
            running.remove(name)
            successor = admission.leave(name, 0.0)
            assert successor == (queue[0] if queue else None)
            if successor is not None:
                running.add(queue.pop(0))
        assert (admission.num_inflight, admission.num_queued) == (len(running), len(queue))
