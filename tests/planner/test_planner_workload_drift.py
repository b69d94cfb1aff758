"""Traffic that changes: scenarios, mixes, and the sources that merge them."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdserve.cluster.arrivals import Arrival
from pdserve.cluster.planner.drift import Span, envelope, mean_rate
from pdserve.cluster.planner.source import Limited, Merged, OpenLoop, drain
from pdserve.cluster.planner.workload import parse_workload
from pdserve.proto.errors import ConfigError


def synthetic(prompt: int, rate: float | None = None, arrivals: str = "poisson") -> dict[str, Any]:
    """Traffic that is known by its prompts."""
    return {"kind": "synthetic", "prompt": prompt, "output": 10, "rate": rate, "arrivals": arrivals}


def scenario(*pieces: tuple[int, float, float], fade_s: float = 0.0, arrivals: str = "deterministic") -> dict[str, Any]:
    """Of (prompt, seconds, rate)."""
    made = [{"workload": synthetic(p, arrivals=arrivals), "duration_s": s, "rate": rate} for p, s, rate in pieces]
    return {"kind": "scenario", "pieces": made, "fade_s": fade_s}


def counts(
    written: dict[str, Any], prompt: int, until_s: float, width_s: float, rate: float | None = None
) -> list[int]:
    """Requests of one kind in windows of time."""
    found = np.zeros(round(until_s / width_s), dtype=int)
    for arrival in drain(parse_workload(written).source(rate)):
        if arrival.at_s >= until_s:
            break
        found[int(arrival.at_s / width_s)] += arrival.num_prompt_tokens == prompt
    return found.tolist()


def test_pieces_follow_each_other_at_their_rates_and_begin_again() -> None:
    written = scenario((1, 100, 5.0), (2, 50, 20.0), (3, 50, 1.0))
    assert counts(written, 1, 400, 50) == pytest.approx([250, 250, 0, 0] * 2, abs=1)
    assert counts(written, 2, 400, 50) == pytest.approx([0, 0, 1000, 0] * 2, abs=1)
    assert counts(written, 3, 400, 50) == pytest.approx([0, 0, 0, 50] * 2, abs=1)


def test_another_rate_scales_every_piece_and_leaves_their_durations_alone() -> None:
    written = scenario((1, 100, 5.0), (2, 100, 15.0))
    assert parse_workload(written).own_rate() == pytest.approx(10.0)
    assert parse_workload({**written, "rate": "3x"}).own_rate() == pytest.approx(30.0)
    assert parse_workload(written).course_s(99.0) == 200.0
    assert counts(written, 1, 200, 100, rate=30.0) == pytest.approx([1500, 0], abs=1)
    assert counts(written, 2, 200, 100, rate=30.0) == pytest.approx([0, 4500], abs=1)


def test_a_fade_is_linear_around_the_border_and_keeps_each_pieces_number_of_requests() -> None:
    written = scenario((1, 100, 10.0), (2, 100, 10.0), fade_s=40.0)
    old, new = (counts(written, prompt, 400, 10) for prompt in (1, 2))
    assert old[:14] == pytest.approx([100] * 8 + [88, 62, 38, 12, 0, 0], abs=2)
    assert new[:14] == pytest.approx([0] * 8 + [12, 38, 62, 88, 100, 100], abs=2)
    assert [a + b for a, b in zip(old, new, strict=True)] == pytest.approx([100] * 40, abs=3)
    assert sum(new) == pytest.approx(2000, abs=130)


@pytest.mark.parametrize("fade_s", [0.0, 5.0, 30.0])
def test_an_envelope_has_the_mean_rate_of_its_piece_over_a_lap(fade_s: float) -> None:
    spans = [Span(30.0, 2.0), Span(40.0, 5.0), Span(90.0, 1.0)]
    assert mean_rate(spans) == pytest.approx((60 + 200 + 90) / 160)
    for number, span in enumerate(spans):
        at_s = mass = 0.0
        for seconds, rate in envelope(spans, number, fade_s):
            within_s = max(0.0, min(at_s + seconds, 320.0) - max(at_s, 160.0))
            mass += within_s * rate
            at_s += seconds
            if at_s > 320:
                break
        assert mass == pytest.approx(span.duration_s * span.rate)


def test_a_scenario_of_one_piece_is_that_piece() -> None:
    found = list(drain(parse_workload(scenario((1, 10, 5.0), arrivals="poisson")).source(num_requests=300)))
    alone = list(drain(parse_workload(synthetic(1, 5.0)).source(num_requests=300)))
    assert [arrival.at_s for arrival in found] == pytest.approx([arrival.at_s for arrival in alone])


def test_bursts_go_on_within_a_piece() -> None:
    written = scenario((1, 500, 20.0), arrivals="onoff:2:2:10")
    found = np.array(counts(written, 1, 500, 1.0))
    assert found.mean() == pytest.approx(20.0, rel=0.1)
    assert found.var() / found.mean() > 5


def test_a_piece_takes_its_workloads_own_rate_and_says_so_when_there_is_none() -> None:
    pieces = [{"workload": "azure-conv", "duration_s": 60}, {"workload": "r1?rate=2x", "duration_s": 60}]
    found = parse_workload({"kind": "scenario", "pieces": pieces})
    assert found.own_rate() == pytest.approx((5.53 + 70.2) / 2)
    pieces.append({"workload": "synthetic?prompt=1&output=1", "duration_s": 60})
    with pytest.raises(ConfigError, match=r"pieces\.2\.workload\.rate: is not known; add it to that workload"):
        parse_workload({"kind": "scenario", "pieces": pieces}).source()


def test_the_ratio_of_input_to_output_drifts_as_the_pieces_say() -> None:
    """Conversation, then long prompts, then reasoning: what a plan for one ratio cannot serve."""
    pieces = [{"workload": name, "duration_s": 200, "rate": 10} for name in ("azure-conv", "mooncake", "r1")]
    ratios = []
    arrivals = list(drain(parse_workload({"kind": "scenario", "pieces": pieces}).source(num_requests=6000)))
    for start_s in (0, 200, 400):
        part = [a for a in arrivals if start_s <= a.at_s < start_s + 200]
        ratios.append(sum(a.num_prompt_tokens for a in part) / sum(a.max_tokens for a in part))
    assert ratios[1] > 3 * ratios[0] > 9 * ratios[2]


def test_a_mix_has_its_shares_at_any_rate() -> None:
    parts = [{"workload": synthetic(1), "share": 3}, {"workload": synthetic(2), "share": 1}]
    workload = parse_workload({"kind": "mix", "parts": parts})
    assert workload.own_rate() is None
    found = list(drain(workload.source(40.0, num_requests=20_000)))
    assert found[-1].at_s == pytest.approx(500, rel=0.03)
    assert sum(a.num_prompt_tokens == 1 for a in found) == pytest.approx(15_000, rel=0.02)


def test_a_mix_without_shares_takes_each_part_at_its_own_rate() -> None:
    workload = parse_workload({"kind": "mix", "parts": [{"workload": synthetic(1, 3)}, {"workload": synthetic(2, 5)}]})
    assert workload.own_rate() == pytest.approx(8.0)
    found = list(drain(workload.source(num_requests=8000)))
    assert sum(a.num_prompt_tokens == 2 for a in found) == pytest.approx(5000, rel=0.03)


def test_parts_of_a_mix_draw_apart_and_share_nothing() -> None:
    part = {"workload": "synthetic?prompt=9/99&output=9&rate=5&prefixes=512&classes=a:1,b:1"}
    found = list(drain(parse_workload({"kind": "mix", "parts": [part, part]}).source(num_requests=200)))
    assert len({arrival.prefix_ids for arrival in found}) == 2
    by_part = [[a for a in found if a.prefix_ids == ids] for ids in {a.prefix_ids for a in found}]
    assert [a.num_prompt_tokens for a in by_part[0][:50]] != [a.num_prompt_tokens for a in by_part[1][:50]]


def test_conversations_in_a_mix_hear_of_their_own_answers_alone() -> None:
    talk = {"workload": "sessions?prompt=10&output=10&mean_turns=3&turns=fixed&think_s=1", "share": 1}
    workload = parse_workload({"kind": "mix", "parts": [{"workload": synthetic(7), "share": 1}, talk, talk]})
    sessions: dict[int, list[Arrival]] = {}
    for arrival in drain(workload.source(30.0, seed=1, num_requests=3000)):
        if arrival.session is not None:
            sessions.setdefault(arrival.session, []).append(arrival)
    begun = [turns for turns in sessions.values() if turns[0].num_history_tokens == 0]
    whole = [turns for turns in begun if turns[0].at_s < 60]
    assert len(whole) > 300
    assert all([turn.num_prompt_tokens for turn in turns] == [10, 30, 50] for turns in whole)
    assert len({number >> 40 for number in sessions}) == 2


def test_sessions_of_a_piece_that_is_over_go_on() -> None:
    talk = "sessions?prompt=10&output=10&mean_turns=5&turns=fixed&think_s=20"
    pieces = [
        {"workload": talk, "duration_s": 100, "rate": 5},
        {"workload": synthetic(7), "duration_s": 900, "rate": 5},
    ]
    found = parse_workload({"kind": "scenario", "pieces": pieces}).source(num_requests=2000)
    late = [a for a in drain(found) if a.session is not None and 100 < a.at_s < 900]
    assert late
    assert all(arrival.num_history_tokens > 0 for arrival in late)
    assert max(arrival.at_s for arrival in late) < 100 + 4 * 20


def test_a_context_applies_to_every_part() -> None:
    pieces = [{"workload": name, "duration_s": 10} for name in ("mooncake", "r1?max_model_len=500")]
    workload = parse_workload({"kind": "scenario", "pieces": pieces}).for_model(4096)
    found = [a.num_prompt_tokens + a.max_tokens for a in drain(workload.source(num_requests=700))]
    assert max(found) == 4096
    assert parse_workload({"kind": "scenario", "pieces": pieces[1:]}).for_model(4096).source().pop().max_tokens <= 500


def test_an_open_source_ends_after_its_last_request_and_hears_nothing() -> None:
    source = OpenLoop(iter([Arrival(1.0, 1, 1), Arrival(2.0, 2, 2)]))
    assert source.next_arrival_s() == 1.0
    first = source.pop()
    source.ended(first, 9.0)
    assert source.next_arrival_s() == 2.0
    assert list(source) == [Arrival(2.0, 2, 2)]
    assert source.next_arrival_s() == math.inf


def test_merged_sources_are_in_order_of_time_and_limits_count_all_of_them() -> None:
    odd, even = (OpenLoop(Arrival(float(n), 1, 1) for n in range(start, 99, 2)) for start in (1, 0))
    source = Limited(Merged([odd, even]), 7)
    assert [arrival.at_s for arrival in drain(source)] == [0, 1, 2, 3, 4, 5, 6]
    assert source.next_arrival_s() == math.inf
    assert [a.at_s for a in islice(odd, 2)] == [7.0, 9.0]


@pytest.mark.parametrize(("num_requests", "scale"), [(200, 0.1), (2000, 1.0), (2600, 1.3), (3200, 0.8), (4000, 1.0)])
def test_a_run_in_whole_courses_sees_every_piece_as_often_as_it_comes(num_requests: int, scale: float) -> None:
    """Shorter than a course it would see the first piece alone, and two rates would be compared at different loads."""
    written = scenario((1, 100, 5.0), (2, 100, 15.0))
    workload = parse_workload(written).in_whole_courses()
    assert workload == parse_workload({**written, "whole_course": True})
    found = list(drain(workload.source(10.0, 0, num_requests)))
    assert sum(arrival.num_prompt_tokens == 1 for arrival in found) == pytest.approx(num_requests / 4, abs=2)
    assert found[-1].at_s == pytest.approx(num_requests / 10.0, rel=0.01)
    border_s = next(arrival.at_s for arrival in found if arrival.num_prompt_tokens == 2)
    assert border_s == pytest.approx(100 * scale, rel=0.02)


def test_fades_and_the_time_of_day_pass_faster_with_the_course() -> None:
    """A day of 1,000 requests; its first half has the higher rate."""
    day = {**synthetic(1, arrivals="deterministic"), "diurnal": {"amplitude": 0.8, "period_s": 86_400}}
    workload = parse_workload(day).in_whole_courses()
    times_s = [arrival.at_s for arrival in drain(workload.source(2.0, 0, 1000))]
    assert times_s[-1] == pytest.approx(500, rel=0.01)
    assert sum(at_s < 250 for at_s in times_s) == pytest.approx(500 * (1 + 0.8 * 2 / math.pi), rel=0.02)
    slow = scenario((1, 100, 10.0), (2, 100, 10.0), fade_s=40.0)
    fast = parse_workload({**slow, "whole_course": True}).source(10.0, 0, 1000)
    old = [arrival.at_s for arrival in drain(parse_workload(slow).source(10.0, 0, 2000))]
    assert [2 * arrival.at_s for arrival in drain(fast)] == pytest.approx(old[1::2], abs=0.5)


def test_a_course_is_a_number_of_requests_at_each_rate() -> None:
    pieces = parse_workload(scenario((1, 100, 5.0), (2, 100, 15.0)))
    assert (pieces.course_requests(), pieces.course_requests(30.0)) == (2000, 6000)
    day = {**synthetic(1), "diurnal": 0.5}
    assert parse_workload(day).course_requests(2.0) == 2 * 86_400
    assert parse_workload(day).course_requests() == 0  # no rate is known
    both = parse_workload({"kind": "mix", "parts": [{"workload": day, "share": 1}, {"workload": "short", "share": 3}]})
    assert both.course_requests(2.0) == 2 * 86_400
    assert parse_workload("azure-conv").course_requests(5.0) == 0


def test_a_replayed_trace_is_over_after_its_requests_and_a_population_after_its_seconds(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("timestamp,input_tokens,output_tokens\n" + "".join(f"{n / 2},9,9\n" for n in range(4000)))
    replayed = parse_workload(f"trace:{path}?order=replay")
    assert [replayed.course_requests(rate) for rate in (None, 2.0, 50.0)] == [4000] * 3
    copies = parse_workload(f"trace:{path}?order=replay&scaling=population")
    assert [copies.course_requests(rate) for rate in (None, 4.0)] == [4000, 8000]
    for order in ("rotate", "resample"):
        assert parse_workload(f"trace:{path}?order={order}").course_requests(4.0) == 0


def test_classes_are_known_before_any_request_comes() -> None:
    chat, code = {**synthetic(1, 1.0), "classes": "chat:1"}, {**synthetic(1, 1.0), "classes": "code:1,batch:1"}
    parts = [{"workload": one} for one in (chat, code, synthetic(1, 1.0))]
    assert parse_workload({"kind": "mix", "parts": parts}).slo_classes() == {"chat", "code", "batch", None}
    pieces = [{**part, "duration_s": 9} for part in parts[:2]]
    assert parse_workload({"kind": "scenario", "pieces": pieces}).slo_classes() == {"chat", "code", "batch"}
