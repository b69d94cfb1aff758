"""To split or not, from findings whose goodputs are given; and what a run tells of how far its targets are off."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from planner_setups import make_profile

from pdserve.cluster.planner.attainment import Attainment
from pdserve.cluster.planner.findings import Finding, Phase, Picture, Target
from pdserve.cluster.planner.fleets import fleets_of, parse_split
from pdserve.cluster.planner.goodput import Goodput
from pdserve.cluster.planner.picture import PHASES, Run, Seen, busy_shares
from pdserve.cluster.planner.setups import Choices, start
from pdserve.cluster.planner.verdict import Verdict, decide, ratio

TARGETS = (Target("all", 500.0, 50.0, 0.9),)
ATTAINED = Attainment(0.9, 0.88, 0.92, 1000, 20, 0, 0, 0.9, 1.0, True, "")


def goodput(rate: float, half: float = 0.02, failing: str = "") -> Goodput:
    reason = f"{failing} fails" if failing else "the curve crosses"
    return Goodput(rate, rate * (1 - half), rate * (1 + half), ATTAINED, 1000, 4, ((rate, ATTAINED),), reason, failing)


def finding(text: str, rate: float, half: float = 0.02, *, failing: str = "", is_refined: bool = True) -> Finding:
    (fleet,) = fleets_of([make_profile()], {})
    return Finding(start(fleet, parse_split(text), Choices()), goodput(rate, half, failing), is_refined)


def decided(*findings: Finding) -> Verdict:
    return decide(findings, [() for _ in findings], TARGETS)


def test_a_split_that_is_surely_better_is_recommended_with_by_how_much() -> None:
    found = decided(finding("3P5D", 120), finding("8M", 100))
    assert found.verdict == "Split: 3P5D has 1.20 times (1.17 to 1.23) the goodput of the best colocated set-up, 8M."
    assert "best split: 3P5D serves 120 requests/s (118 to 122), 15 per GPU" in found.reasons
    assert found.recommended == found.best_split == 0


def test_a_split_that_is_only_probably_better_is_not() -> None:
    found = decided(finding("3P5D", 103, 0.04), finding("8M", 100, 0.04))
    assert found.verdict.startswith("Do not split: 3P5D is not surely better than 8M; it has 1.03 times")
    assert found.plateau == ("3P5D", "8M")
    assert found.recommended == found.best_colocated == 1


def test_colocated_that_is_better_wins() -> None:
    found = decided(finding("8M", 150), finding("3P5D", 100))
    assert found.verdict.startswith("Do not split: 8M has 1.50 times")
    assert (found.best_split, found.best_colocated) == (1, 0)
    assert found.plateau == ("8M",)


def test_where_one_kind_cannot_hold_the_targets_the_other_wins() -> None:
    found = decided(finding("3P5D", 100), finding("8M", 0, failing="TPOT"))
    assert found.verdict.startswith("Split:")
    assert "colocated workers cannot hold the targets at any rate" in found.verdict
    assert found.recommended == 0
    found = decided(finding("8M", 100), finding("3P5D", 0, failing="TTFT"))
    assert found.verdict.startswith("Do not split:")


def test_the_plateau_is_of_what_was_looked_at_closely() -> None:
    found = decided(
        finding("3P5D", 120, 0.03),
        finding("4P4D", 118, 0.03),
        finding("8M", 90, 0.03),
        finding("2P6D", 110, 0.5, is_refined=False),
    )
    assert found.plateau == ("3P5D", "4P4D")


def test_how_much_a_wrong_guess_costs_is_said() -> None:
    found = decided(finding("3P5D", 120), finding("8M", 90), finding("7P1D", 24), finding("1P6D1M", 10))
    assert "the worst static split, 7P1D, serves 5.0 times less than 3P5D" in found.reasons


def test_infeasible_targets_name_what_fails_and_the_closest_that_can_be_met() -> None:
    nearest = (Target("all", 812.3, 50.0, 0.9),)
    findings = [finding("8M", 0, failing="TTFT"), finding("3P5D", 0, failing="TTFT")]
    found = decide(findings, [nearest, nearest], TARGETS)
    assert found.verdict == (
        "No set-up can hold the targets at any rate: TTFT fails; "
        "the closest that can be met: TTFT 820 ms instead of 500 ms for 90%."
    )
    assert len(found.reasons) == 2


def test_the_ratio_of_two_intervals_is_narrower_than_their_ends_say() -> None:
    found = ratio(goodput(110, 0.05), goodput(100, 0.05))
    assert 1.0 < found.low < 1.1 < found.high < 1.19
    unknown = ratio(goodput(110), Goodput(100, 0.0, math.inf, ATTAINED, 0, 0, (), ""))
    assert unknown.low < 0.5


def seen(ttft_ms: float | None, tpot_ms: float | None, *, guilty: str = "", target: int = 0) -> Seen:
    phases = tuple(500.0 if name == guilty else 10.0 for name in PHASES)
    return Seen(0.0, 0.0, 100, 10, target, ttft_ms, tpot_ms, phases if ttft_ms is not None else ())


def run_of(*some: Seen, targets: tuple[Target, ...] = TARGETS) -> Run:
    """Each a hundred times, so that the ends that are cut off do not matter."""
    return Run(list(some) * 100, targets)


def test_stretch_is_by_how_much_both_targets_would_have_to_give() -> None:
    assert run_of(seen(250, 20)).stretch() == pytest.approx(0.5)
    assert run_of(seen(1000, 20)).stretch() == pytest.approx(2.0)
    assert run_of(*[seen(100, 20)] * 9, seen(None, None)).stretch() == pytest.approx(0.4)
    assert run_of(seen(None, None)).stretch() == 100


def test_the_class_that_is_worst_off_decides() -> None:
    targets = (Target("chat", 100.0, 50.0, 0.9), Target("batch", 10_000.0, 500.0, 0.5))
    run = run_of(seen(300, 25), seen(300, 25, target=1), targets=targets)
    assert run.stretch() == pytest.approx(3.0)
    chat, batch = run.nearest()
    assert (round(chat.ttft_ms), chat.tpot_ms) == (300, 50.0)
    assert batch == targets[1]


def test_the_closest_targets_change_only_what_fails() -> None:
    late, slow, both = (run_of(one).nearest()[0] for one in (seen(800, 40), seen(400, 75), seen(1000, 75)))
    assert (round(late.ttft_ms), late.tpot_ms) == (800, 50.0)
    assert (slow.ttft_ms, round(slow.tpot_ms)) == (500.0, 75)
    assert (round(both.ttft_ms), round(both.tpot_ms)) == (1000, 100)


def test_a_miss_is_put_down_to_the_phase_that_took_the_most_beyond_its_median_before_or_after_the_first_token() -> None:
    late = seen(900, 20, guilty="prefill queue")
    slow = seen(100, 80, guilty="transfer")
    picture = run_of(*[seen(100, 20)] * 8, late, slow).picture(3.0, {})
    shares = {phase.name: phase.share_of_misses for phase in picture.phases}
    assert shares["prefill queue"] == shares["transfer"] == 0.5
    assert sum(shares.values()) == 1.0


def test_a_slow_token_is_put_down_to_its_phase_by_the_time_a_token_not_by_how_long_the_answer_is() -> None:
    """Short answers that miss TPOT decode for less than the median, which is that of long ones in time."""
    times_ms = dict.fromkeys(PHASES, 10.0)
    long = Seen(0.0, 0.0, 100, 201, 0, 100.0, 25.0, tuple((times_ms | {"decode": 5_000.0}).values()))
    short = Seen(0.0, 0.0, 100, 11, 0, 100.0, 61.0, tuple((times_ms | {"decode": 570.0, "transfer": 40.0}).values()))
    picture = run_of(*[long] * 8, short, short).picture(3.0, {})
    (guilty,) = [phase.name for phase in picture.phases if phase.share_of_misses]
    assert guilty == "decode"


def test_a_run_is_judged_from_where_its_backlog_is_full_on_however_long_that_takes() -> None:
    """As its attainment is: the first 400 of 1,000 requests fill the system, and are in time."""
    filling = [
        Seen(float(n), n + min(n, 400.0) + 0.5, 100, 10, 0, 100.0 if n < 400 else 900.0, 20.0) for n in range(1000)
    ]
    run = Run(filling, TARGETS)
    assert run.begin_s >= 400.0
    assert min(run.picture(1.0, {}).ttft_ms) == 900.0


def test_workers_are_as_busy_as_they_were_while_requests_came() -> None:
    """What is computed after the last arrivals takes long and says nothing: others would have come meanwhile."""
    work = [
        ("prefill-0", 0.0, 11.0),
        ("prefill-0", 12.0, 14.0),
        ("decode-0", 11.0, 16.0),
        ("decode-0", 15.0, 40.0),
        ("decode-0", 19.0, 90.0),
        ("gone-0", 10.0, 20.0),
    ]
    found = busy_shares(["prefill-0", "decode-0", "mixed-0"], work, 10.0, 20.0)
    assert found == pytest.approx({"prefill-0": 0.3, "decode-0": 0.9, "mixed-0": 0.0})


def test_a_rate_that_the_budget_did_not_find_is_not_called_infeasible() -> None:
    found = decided(finding("3P5D", 100), finding("8M", 0))
    assert "at any rate" not in found.verdict
    assert "for colocated workers no rate that holds the targets was found with as many requests" in found.verdict
    found = decided(finding("8M", 100), finding("3P5D", 0), finding("2P6D", 50))
    assert "for splits no rate" in found.verdict
    assert not any("at any rate" in line for line in found.reasons)
    found = decided(finding("8M", 0), finding("3P5D", 0))
    assert found.verdict.startswith("For no set-up a rate that holds the targets was found")
    assert found.recommended is None


def test_where_requests_fail_at_any_rate_it_is_said_why_and_no_target_is_offered() -> None:
    nearest = (Target("all", math.inf, 50.0, 0.9),)
    findings = [finding("8M", 0, failing="completion"), finding("3P5D", 0, failing="completion")]
    why = "100% of the requests fail: prompt is too long"
    found = decide(findings, [nearest, nearest], TARGETS, [why, why])
    assert found.verdict == f"No set-up can hold the targets at any rate: completion fails ({why})."
    assert all(line.endswith(why) for line in found.reasons)


def test_what_fails_is_named_by_class_and_by_what_never_ended() -> None:
    assert run_of(seen(100, 20)).failing() == ""
    assert run_of(seen(900, 20), seen(100, 20)).failing() == "TTFT"
    assert run_of(seen(100, 90), seen(100, 20)).failing() == "TPOT"
    assert run_of(*[seen(900, 20)] * 2, *[seen(100, 90)] * 2, *[seen(1, 1)] * 27).failing() == "TTFT and TPOT"
    assert run_of(seen(None, None), seen(100, 20)).failing() == "completion"
    targets = (Target("chat", 100.0, 50.0, 0.9), Target("batch", 10_000.0, 500.0, 0.5))
    few = [seen(300, 25), *[seen(300, 25, target=1)] * 99]
    assert run_of(*few, targets=targets).failing() == "TTFT", "the share of all requests hides a small class"


def test_a_split_that_waits_at_the_router_is_not_told_to_have_more_prefill_workers() -> None:
    late = Phase("admission", 900.0, 900.0, 900.0, 0.9)
    picture = Picture(10.0, (), (), (late,), {}, 1.0, 1.0)
    found = decided(replace(finding("3P5D", 120), picture=picture), finding("8M", 100))
    (line,) = [line for line in found.reasons if "misses by" in line]
    assert "wait at the router" in line
    assert "prefill workers would help" not in line
