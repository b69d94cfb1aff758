"""Why a set-up misses: only where its run has tens of misses, and on the side of the target that fails."""

from __future__ import annotations

from planner_setups import make_profile

from pdserve.cluster.planner.attainment import Attainment
from pdserve.cluster.planner.findings import Finding, Phase, Picture
from pdserve.cluster.planner.fleets import fleets_of, parse_split
from pdserve.cluster.planner.goodput import Goodput
from pdserve.cluster.planner.misses import why_missed
from pdserve.cluster.planner.setups import Choices, start

Probed = tuple[float, Attainment]
BUSY = {"prefill-0": 0.7, "prefill-1": 0.7, "prefill-2": 0.7, "decode-0": 1.0}


def attained(ttft: float, tpot: float, num_requests: int = 1_000) -> Attainment:
    value = min(ttft, tpot)
    return Attainment(value, value - 0.02, value + 0.02, num_requests, 20, 0, 0, ttft, tpot, True, "")


def why(
    guilty: str,
    at_rate: Attainment,
    *beyond: Probed,
    text: str = "3P1D",
    busy: dict[str, float] = BUSY,
    share: float = 1.0,
) -> str:
    """What is said of a set-up with a goodput of 10/s, all of whose misses are put down to that phase."""
    (fleet,) = fleets_of([make_profile()], {})
    goodput = Goodput(10.0, 9.0, 11.0, at_rate, 1_000, 4, ((10.0, at_rate), *beyond), "")
    picture = Picture(10.0, (), (), (Phase(guilty, 50.0, 40.0, 90.0, share),), busy, 1.0, 1.0)
    return why_missed(Finding(start(fleet, parse_split(text), Choices()), goodput, True, picture))


def test_misses_of_the_target_that_fails_are_put_down_to_their_phase() -> None:
    assert why("decode", attained(0.99, 0.9)).endswith("decode in 100% of the misses; more decode workers would help")
    assert "memory is short, and more decode workers have more of it" in why("transfer", attained(0.99, 0.9))
    assert why("prefill queue", attained(0.9, 0.99)).endswith("the misses; more prefill workers would help")


def test_a_phase_of_the_other_target_is_no_reason_and_what_fails_is_told_with_who_is_busy() -> None:
    """Decode fails, while the few requests that were late were so by their prefill."""
    assert why("prefill", attained(0.999, 0.68)) == "3P1D misses TPOT first; decode workers are busy 100% of the time"
    assert why("decode", attained(0.7, 0.99)) == "3P1D misses TTFT first; prefill workers are busy 70% of the time"


def test_a_few_misses_are_chance_and_what_fails_beyond_the_goodput_is_told_instead() -> None:
    few = attained(0.998, 1.0)
    assert why("prefill", few) == ""
    assert why("prefill", few, (11.0, attained(0.99, 0.2))).startswith("3P1D misses TPOT first")
    assert why("prefill", few, (20.0, attained(0.1, 0.99))) == "", "far beyond it something else may fail"
    assert why("prefill", few, (11.0, attained(0.5, 0.45))) == "", "both fail"


def test_phases_that_share_the_misses_are_no_reason() -> None:
    assert "decode in" not in why("decode", attained(0.99, 0.9), share=0.2)


def test_more_workers_do_not_help_long_prompts_on_workers_that_idle() -> None:
    idle = dict.fromkeys(BUSY, 0.2)
    line = why("prefill", attained(0.9, 1.0), busy=idle)
    assert line.endswith("long prompts take that long by themselves")
    assert "more prefill workers" in why("prefill", attained(0.9, 1.0))


def test_mixed_workers_are_told_of_interference_and_given_no_advice() -> None:
    mixed = {"mixed-0": 1.0}
    assert why("decode", attained(1.0, 0.9), text="1M", busy=mixed).endswith("(interference)")
    line = why("prefill", attained(1.0, 0.9), text="1M", busy=mixed)
    assert line == "1M misses TPOT first; mixed workers are busy 100% of the time"
