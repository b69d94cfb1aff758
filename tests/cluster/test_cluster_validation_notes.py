"""What must be known before a validation is believed: each thing once for a set-up and workload."""

from __future__ import annotations

from pdserve.cluster.validation import Point
from pdserve.cluster.validation_notes import Beyond, beyond_lines, clipped_lines, missing_lines

SLOW, FAST = Point("1M", "short", 1.0), Point("1M", "short", 4.0)


def batch_line(num_steps: int, batch: int) -> str:
    return f"beyond: cpu-1: {num_steps} of 90 steps (1.5%): decode batch {batch} is above the largest measured, 8"


def test_of_several_runs_the_one_that_was_most_beyond_speaks() -> None:
    runs = [(SLOW, Beyond(0.1, (batch_line(9, 9),))), (FAST, Beyond(0.5, (batch_line(45, 16),)))]
    assert list(beyond_lines(runs)) == [f"1M, short at 4/s: {batch_line(45, 16)}"]


def test_what_only_another_run_was_beyond_is_told_as_well() -> None:
    other = "beyond: cpu-1: 3 of 90 steps (3%): prefill tokens 1 is below the smallest measured, 4"
    runs = [(SLOW, Beyond(0.1, (other,))), (FAST, Beyond(0.5, (batch_line(45, 16),)))]
    assert list(beyond_lines(runs)) == [f"1M, short at 4/s: {batch_line(45, 16)}", f"1M, short at 1/s: {other}"]


def test_set_ups_and_workloads_speak_for_themselves() -> None:
    beyond = Beyond(0.1, (batch_line(9, 9),))
    points = [SLOW, Point("1P1D", "short", 1.0), Point("1M", "long", 1.0)]
    assert len(list(beyond_lines((point, beyond) for point in points))) == 3


def test_requests_that_only_the_real_side_cut_are_told_once() -> None:
    (line,) = clipped_lines([(SLOW, 3), (FAST, 5), (Point("1P1D", "short", 1.0), 0)])
    assert line.startswith("1M, short: 5 requests of a run were cut")


def test_a_validation_that_ended_early_says_how_much_is_there() -> None:
    assert list(missing_lines(2, 6)) == ["it ended early: only 2 of 6 runs were measured"]
    assert list(missing_lines(6, 6)) == []
