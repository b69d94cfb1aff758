"""What a worker still accepts, once and only once."""

from __future__ import annotations

import pytest

from pdserve.cluster.live_requests import MAX_REMEMBERED, LiveRequests
from pdserve.proto.errors import StaleReference
from pdserve.proto.types import HandoffId

ID = HandoffId("r", 0, 1)


def test_a_request_is_new_once() -> None:
    live = LiveRequests()
    assert live.is_new(ID)
    live.accept(ID, 10.0)
    assert not live.is_new(ID)
    assert ID in live


def test_what_has_ended_does_not_start_again() -> None:
    live = LiveRequests()
    live.accept(ID, 10.0)
    assert live.end(ID)
    assert not live.end(ID)
    with pytest.raises(StaleReference):
        live.is_new(ID)


def test_what_was_aborted_before_it_came_does_not_start() -> None:
    live = LiveRequests()
    live.abort(ID)
    with pytest.raises(StaleReference):
        live.is_new(ID)


def test_an_end_of_something_unknown_forbids_nothing() -> None:
    live = LiveRequests()
    assert not live.end(ID)
    assert live.is_new(ID)


def test_memory_is_bounded() -> None:
    live = LiveRequests()
    for attempt in range(MAX_REMEMBERED + 1):
        live.abort(HandoffId("r", attempt, 1))
    assert live.is_new(HandoffId("r", 0, 1))
    with pytest.raises(StaleReference):
        live.is_new(HandoffId("r", 1, 1))


def test_requests_are_found_by_epoch_and_by_deadline() -> None:
    live = LiveRequests()
    other = HandoffId("r", 0, 2)
    live.accept(ID, 10.0)
    live.accept(other, 20.0)
    assert live.of_epoch(2) == [other]
    assert live.overdue(10.0) == [ID]
    assert live.all() == [ID, other]
