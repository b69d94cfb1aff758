"""Virtual time: events in order of their moment and, within one moment, of who asked first."""

from __future__ import annotations

from pdserve.cluster.planner.clock import Clock


def test_of_one_moment_who_took_a_place_in_line_first_goes_first() -> None:
    clock, happened = Clock(), list[str]()
    clock.at(2.0, happened.append, "first")
    number = clock.number()
    clock.at(2.0, happened.append, "third")
    clock.after(1.0, clock.at_place, 2.0, number, happened.append, "second")
    clock.after(2.0, happened.append, "last")
    while clock.advance():
        pass
    assert happened == ["first", "second", "third", "last"]
    assert clock.now_s == 2.0
