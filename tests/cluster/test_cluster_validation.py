"""How far a simulation is off, figure by figure; what a refit takes from a run; and set-ups in a word."""

from __future__ import annotations

from array import array

import pytest
from planner_setups import make_config, make_profile, run
from rich.console import Console

from pdserve.cluster.arrivals import Arrival
from pdserve.cluster.load import LoadResult, RequestRecord
from pdserve.cluster.load_report import LoadReport, summarize
from pdserve.cluster.planner.profile import PrefillRegion, Range
from pdserve.cluster.planner.step_model import StepModel
from pdserve.cluster.planner.step_sample import StepSample
from pdserve.cluster.planner.step_shape import StepShape, chunk_pairs
from pdserve.cluster.profiling_samples import Timing
from pdserve.cluster.validation import Comparison, Point, compare
from pdserve.cluster.validation_order import orders
from pdserve.cluster.validation_point import (
    Judgement,
    adapted,
    beyond_of,
    foretold,
    judged_real,
    judged_simulated,
    refitted,
    step_error,
)
from pdserve.cluster.validation_report import render
from pdserve.cluster.validation_run import MeasuredRun
from pdserve.cluster.validation_setups import set_up_config
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import SLO, RequestTiming, Role

GOAL = SLO(ttft_ms=100.0, tpot_ms=20.0)


def result(ttfts_s: list[float], gap_s: float = 0.010, num_tokens: int = 5) -> LoadResult:
    """Requests a second apart, each with this time to its first token and this gap between tokens."""
    records = []
    for number, ttft_s in enumerate(ttfts_s):
        first_s = number + ttft_s
        last_s = first_s + gap_s * (num_tokens - 1)
        timing = RequestTiming(float(number), number + 0.001, first_s, last_s, last_s, num_tokens)
        records.append(RequestRecord(timing, 10, array("d", [first_s, last_s])))
    return LoadResult(tuple(records), 0.0, float(len(records)), num_capped=0, num_clipped=0)


def report(ttft_s: float, gap_s: float = 0.010, num_missed: int = 0, num_requests: int = 20) -> LoadReport:
    ttfts_s = [ttft_s] * (num_requests - num_missed) + [1.0] * num_missed
    return summarize(result(ttfts_s, gap_s), GOAL)


def comparison(setup: str, real: LoadReport, simulated: LoadReport, rate: float = 1.0) -> Comparison:
    return compare(Point(setup, "short", rate), [real], [simulated], [0.01])


def test_errors_are_of_the_simulation_against_the_measurement() -> None:
    found = comparison("2M", report(0.050), report(0.053, gap_s=0.012))
    by_name = {figure.name: figure for figure in found.figures}
    assert list(by_name) == ["ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "attainment"]
    assert by_name["ttft_p50_ms"].error == pytest.approx(0.06)
    assert by_name["ttft_p50_ms"].is_within
    assert by_name["tpot_p50_ms"].error == pytest.approx(0.20)
    assert not by_name["tpot_p50_ms"].is_within
    assert not by_name["tpot_p99_ms"].is_within
    assert not found.is_within
    assert found.send_lag_ms == pytest.approx(1.0)


def test_attainment_is_compared_in_points() -> None:
    close = comparison(
        "2M", report(0.050, num_missed=50, num_requests=100), report(0.050, num_missed=48, num_requests=100)
    )
    assert close.attainment.error == pytest.approx(0.02)
    assert close.attainment.is_within
    assert not comparison("2M", report(0.050), report(0.050, num_missed=1)).attainment.is_within


def test_of_repeats_the_median_counts_on_both_sides() -> None:
    real = [report(0.050), report(0.052), report(0.500)]
    simulated = [report(0.010), report(0.052), report(0.060)]
    found = compare(Point("2M", "short", 1.0), real, simulated, [0.3, -0.1, 0.0])
    assert found.figures[0].real == pytest.approx(52.0)
    assert found.figures[0].error == pytest.approx(0.0)
    assert found.step_error == 0.0
    assert found.num_requests == 60


def test_a_figure_on_one_side_only_is_a_miss_and_on_neither_is_none() -> None:
    nobody = summarize(LoadResult((), 0.0, 1.0, 0, 0), GOAL)
    one_sided = comparison("2M", report(0.050), nobody)
    assert not one_sided.figures[0].is_within
    neither = comparison("2M", nobody, nobody)
    assert all(figure.is_within for figure in neither.figures)


def test_the_table_marks_what_is_beyond_its_limit() -> None:
    found = [comparison("2M", report(0.050), report(0.100)), comparison("1P1D", report(0.050), report(0.050))]
    console = Console(width=200, record=True)
    for part in render(found, orders(found), ["1M: a note"]):
        console.print(part)
    text = console.export_text()
    assert "50.0 > 100.0 +100% !" in text
    assert "100.0% > 100.0% +0.0" in text
    assert "short at 1/s: real 2M = 1P1D; simulated 1P1D > 2M: real cannot tell" in text
    assert "1M: a note" in text
    assert "7 of 10 figures within their limits" in text


def test_the_same_requests_are_judged_on_both_sides() -> None:
    judgement = Judgement(GOAL, 2, False, 60.0)
    ttfts_s = [0.9, 0.8, 0.05, 0.05, 0.05]
    real = judged_real(MeasuredRun(result(ttfts_s), {}), judgement)
    assert real.num_requests == 3
    assert real.ttft is not None
    assert real.ttft.max_ms == pytest.approx(50.0)
    outcome = run(make_config(), [Arrival(float(number), 100 * (5 - number), 4) for number in range(5)])
    simulated = judged_simulated(outcome, judgement)
    assert simulated.num_requests == 3
    assert simulated.prompt_tokens == 600


def test_prompts_of_token_ids_are_not_tokenised_in_the_simulation() -> None:
    profile = make_profile()
    texts = profile.model_copy(update={"overheads": profile.overheads.model_copy(update={"tokenize_s_per_token": 1.0})})
    assert adapted(texts, ()) == profile


def test_prompts_that_begin_alike_are_found_in_the_caches_of_both_sides() -> None:
    """The load generator makes equal blocks of equal prefix ids, and engines cache by default."""
    profiles = dict.fromkeys(Role, make_profile())
    alike = [Arrival(float(number), 1100, 4, prefix_ids=(7, 8)) for number in range(4)]
    found = foretold(make_config(), profiles, alike)
    assert found.num_prefix_hit_tokens >= 3 * 1024
    assert foretold(make_config(), profiles, [Arrival(0.0, 1100, 4)]).num_prefix_query_tokens == 0


def test_a_refit_takes_step_times_from_the_run_and_everything_else_from_the_profile() -> None:
    shapes = [StepShape(n, chunk_pairs(n, 0), 0, 0) for n in (8, 32, 128, 512)]
    shapes += [StepShape(0, 0.0, batch, batch * context) for batch in (1, 4, 16) for context in (50, 500)]
    profile = make_profile()
    slower = [StepSample(shape, 2.0 * StepModel(profile).duration_s(shape)) for shape in shapes]
    found = adapted(profile, slower)
    for sample in slower:
        assert StepModel(found).duration_s(sample.shape) == pytest.approx(sample.duration_s, rel=0.02)
    assert (found.links, found.overheads) == (profile.links, profile.overheads)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([StepShape(8, 32.0, 0, 0), StepShape(32, 500.0, 0, 0)], "no decode step to take step times from"),
        ([StepShape(0, 0.0, 1, 10), StepShape(0, 0.0, 2, 20)], "no prefill step to take step times from"),
        ([], "no step was recorded"),
    ],
    ids=["decode", "prefill", "none"],
)
def test_a_run_that_a_refit_learns_nothing_from_is_named(shapes: list[StepShape], words: str) -> None:
    samples = [StepSample(shape, 0.01) for shape in shapes]
    with pytest.raises(ConfigError, match=f"^--refit: 1M, short at 2/s: .*{words}"):
        refitted({Role.MIXED: make_profile()}, samples, Point("1M", "short", 2.0))


def test_a_simulation_beyond_its_profile_says_so() -> None:
    arrivals = [Arrival(0.0, 1100, 4)]
    assert beyond_of(foretold(make_config(), dict.fromkeys(Role, make_profile()), arrivals)).lines == ()
    known = Range(smallest=1, largest=64)
    narrow = make_profile().model_copy(
        update={"domain": make_profile().domain.model_copy(update={"chunk_tokens": known})}
    )
    beyond = beyond_of(foretold(make_config(), dict.fromkeys(Role, narrow), arrivals))
    assert 0.0 < beyond.share < 1.0
    (line,) = beyond.lines
    assert line.startswith("beyond what was measured: ")
    assert "prefill tokens" in line


def test_the_profiles_error_is_on_the_steps_that_were_taken_by_each_role() -> None:
    slow = make_profile(prefill=(PrefillRegion(num_samples=0, fixed_s=1.0, per_token_s=0.0, per_pair_s=0.0),))
    prefill = Timing(StepShape(8, 32.0, 0, 0), 1.0, 1.0, None)
    decode = Timing(StepShape(0, 0.0, 1, 10), 0.5, 0.5, 1.0)
    fast_s = StepModel(make_profile()).duration_s(decode.shape)
    profiles = {Role.PREFILL: slow, Role.DECODE: make_profile()}
    found = step_error(profiles, {Role.PREFILL: [prefill], Role.DECODE: [decode]})
    assert found == pytest.approx((1.0 + fast_s) / 2.0 - 1.0)
    assert step_error(profiles, {Role.PREFILL: []}) == 0.0


@pytest.mark.parametrize(
    ("written", "replicas"),
    [("2M", (0, 0, 2)), ("1P1D", (1, 1, 0)), ("2p1d", (2, 1, 0)), ("1P2D3M", (1, 2, 3)), ("", (2, 3, 0))],
)
def test_a_set_up_is_a_word(written: str, replicas: tuple[int, int, int]) -> None:
    config = set_up_config(make_config(prefill=2, decode=3), written)
    assert tuple(config.replicas(role) for role in (Role.PREFILL, Role.DECODE, Role.MIXED)) == replicas


@pytest.mark.parametrize(
    ("written", "words"),
    [("1X", "is no set-up"), ("2P", "cannot serve"), ("0M", "cannot serve"), ("M", "is no set-up")],
)
def test_a_word_that_is_no_set_up_is_refused(written: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        set_up_config(make_config(), written)
