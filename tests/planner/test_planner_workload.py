"""Workloads as they are written, what is refused, and what a seed and a rate mean."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdserve.cluster.arrivals import HASH_BLOCK_TOKENS, WORKLOADS, Arrival
from pdserve.cluster.planner.source import OpenLoop, drain
from pdserve.cluster.planner.workload import parse_workload
from pdserve.cluster.planner.workload_kinds import Conversations, Replayed, Synthetic
from pdserve.proto.errors import ConfigError

CSV = "timestamp,input_tokens,output_tokens\n" + "".join(f"{n / 2},{100 + n},{10 + n % 50}\n" for n in range(4000))
HASHED = "".join(
    f'{{"timestamp": {n * 1000}, "input_length": 1000, "output_length": 10, "hash_ids": [0, {n + 1}]}}\n'
    for n in range(400)
)


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "conv.csv"
    path.write_text(CSV)
    return path


def take(written: str | dict[str, Any], count: int, rate: float | None = None, seed: int = 0) -> list[Arrival]:
    return list(drain(parse_workload(written).source(rate, seed, count)))


def measured_rate(arrivals: list[Arrival]) -> float:
    return (len(arrivals) - 1) / (arrivals[-1].at_s - arrivals[0].at_s)


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_a_preset_has_the_rate_lengths_and_burstiness_of_its_traffic(name: str) -> None:
    known = WORKLOADS[name]
    found = take(name, 20_000)
    gaps = np.diff([arrival.at_s for arrival in found])
    assert measured_rate(found) == pytest.approx(known.rate, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(known.burstiness**-0.5, rel=0.05)
    assert np.percentile([a.num_prompt_tokens for a in found], [50, 90]) == pytest.approx(
        [known.prompt.p50, known.prompt.p90], rel=0.05
    )
    assert np.percentile([a.max_tokens for a in found], [50, 90]) == pytest.approx(
        [known.output.p50, known.output.p90], rel=0.05
    )


def test_short_and_long_forms_mean_the_same(csv: Path) -> None:
    assert parse_workload(f"trace:{csv}?rate=2x&window=600:1200&order=rotate") == parse_workload(
        {"kind": "trace", "path": csv, "rate_scale": 2.0, "window": [600.0, 1200.0], "order": "rotate"}
    ).model_copy(update={"window": "600:1200"})
    assert parse_workload(
        "synthetic?prompt=1020/2734&output=128&rate=4&arrivals=onoff:10:30:5&diurnal=0.5:3600"
        "&prefixes=2048x2&classes=chat:0.8,batch:0.2"
    ) == parse_workload(
        {
            "kind": "synthetic",
            "prompt": {"p50": 1020, "p90": 2734},
            "output": 128,
            "rate": 4,
            "arrivals": {"process": "onoff", "mean_on_s": 10, "mean_off_s": 30, "ratio": 5},
            "diurnal": {"amplitude": 0.5, "period_s": 3600},
            "prefixes": {"tokens": [2048, 2048]},
            "classes": {"chat": {"weight": 0.8}, "batch": 0.2},
        }
    )
    assert parse_workload("synthetic?prompt.p50=10&prompt.p90=20&output=1") == parse_workload(
        "synthetic?prompt=10/20&output=1"
    )
    assert parse_workload({"preset": "r1", "rate": "3x"}) == parse_workload("r1?rate=3x")
    assert parse_workload("r1?rate=3x").own_rate() == pytest.approx(3 * WORKLOADS["r1"].rate)


def test_the_kinds_are_what_they_are_called(csv: Path) -> None:
    assert isinstance(parse_workload("azure-conv"), Synthetic)
    assert isinstance(parse_workload(f"trace:{csv}"), Replayed)
    assert isinstance(parse_workload("sessions?prompt=10&output=10"), Conversations)


def test_a_relative_path_is_taken_from_the_folder_of_the_file_that_names_it(csv: Path) -> None:
    found = parse_workload({"kind": "trace", "path": "conv.csv"}, csv.parent)
    assert found == parse_workload(f"trace:{csv}")
    lengths = parse_workload({"kind": "synthetic", "lengths": "conv.csv", "rate": 1}, csv.parent)
    assert next(drain(lengths.source(num_requests=1))).num_prompt_tokens >= 100


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "'' is neither a preset (azure-conv, "),
        ("azur-conv", "'azur-conv' is neither a preset"),
        ("/data/conv.csv", "a trace is written trace:PATH"),
        ("synthetic:/x", "only a trace has a path"),
        ("trace:", "path: names no file; give the path of a trace"),
        ("azure-conv?rate", "'rate' is not KEY=VALUE"),
        ("azure-conv?rate=", "'rate=' is not KEY=VALUE"),
        ("azure-conv?rate=1&rate=2", "rate: given twice"),
        ("azure-conv?rate=0", "rate: Input should be greater than 0 (given '0')"),
        ("azure-conv?rate=nan", "rate: Input should be a finite number"),
        ("azure-conv?rate=inf", "rate: Input should be a finite number"),
        ("azure-conv?rate=fast", "rate: Input should be a valid number"),
        ("azure-conv?rate=0x", "rate_scale: Input should be greater than 0"),
        ("azure-conv?rate=twox", "rate: 'twox' is no multiple of the workload's own; write 2x"),
        ("azure-conv?rate=2x&rate_scale=2", "say the same; give one of them"),
        ("azure-conv?window=1:2", "window: unknown key"),
        ("azure-conv?prompt=20/10", "prompt: p90 10 is below p50 20"),
        ("azure-conv?prompt=0", "prompt.p50: Input should be greater than 0"),
        ("azure-conv?prompt=10/nan", "prompt.p90: Input should be a finite number"),
        ("azure-conv?prompt.p95=10", "prompt.p50: Field required"),
        ("azure-conv?arrivals=pareto", "arrivals.process: Input should be 'poisson', 'gamma', 'deterministic' or"),
        ("azure-conv?arrivals=gamma", "arrivals: gamma needs cv"),
        ("azure-conv?arrivals=gamma:0", "arrivals.cv: Input should be greater than 0"),
        ("azure-conv?arrivals=gamma:1:2", "'gamma:1:2' has too many parameters; gamma takes cv"),
        ("azure-conv?arrivals=poisson:1", "poisson takes none"),
        ("azure-conv?arrivals=onoff:1:2", "arrivals: onoff needs ratio"),
        ("azure-conv?arrivals=onoff:1:2:nan", "arrivals.ratio"),
        ("azure-conv?arrivals.process=poisson&arrivals.cv=2", "cv has no meaning for poisson; leave it out"),
        ("azure-conv?diurnal=1.5", "diurnal.amplitude: Input should be less than or equal to 1"),
        ("azure-conv?diurnal=0.5:0", "diurnal.period_s: Input should be greater than or equal to 1"),
        ("azure-conv?arrivals=onoff:1e-9:1:9", "arrivals.mean_on_s: Input should be greater than or equal to 0.001"),
        ("azure-conv?prefixes=10x0", "'10x0' is not TOKENSxPROMPTS; write 2048x10"),
        ("azure-conv?prefixes=0", "prefixes.tokens.0: Input should be greater than or equal to 1"),
        ("azure-conv?classes=a:0", "classes.a.weight: Input should be greater than 0"),
        ("azure-conv?classes=a", "classes.a.weight: Input should be a valid number"),
        ("azure-conv?max_model_len=1", "max_model_len: Input should be greater than or equal to 2"),
        ("synthetic?prompt=10&rate=1", "give prompt and output (tokens, or P50/P90), or lengths"),
        ("synthetic?prompt=10&output=1&lengths=x.csv", "lengths already gives prompt and output"),
        ("trace:x.csv?window=5", "window: '5' is not START:END in seconds"),
        ("trace:x.csv?window=9:5", "window: '9:5' is not START:END in seconds"),
        ("trace:x.csv?order=backwards", "order: Input should be 'replay', 'rotate' or 'resample'"),
        ("trace:x.csv?shift_s=5", "shift_s needs scaling=population"),
        ("trace:x.csv?path=y.csv", "path: given twice"),
        ("sessions?prompt=1&output=1&mean_turns=0", "mean_turns: Input should be greater than or equal to 1"),
        ("sessions?prompt=1&output=1&mean_turns=2.5&turns=fixed", "mean_turns 2.5 is not a whole number"),
        ({"prompt": 1, "output": 1}, "kind: is missing; one of synthetic, trace, sessions, mix, scenario, or"),
        ({"kind": "replay"}, "kind: is none of synthetic, trace"),
        ({"preset": "chat"}, "preset 'chat' is none of azure-conv"),
        ({"kind": "trace", "path": "x.csv", "window": 310}, "310 is not START:END in seconds; in YAML write it"),
        ({"kind": "mix", "parts": []}, "parts: Tuple should have at least 1 item"),
        (
            {"kind": "mix", "parts": [{"workload": "r1", "share": 1}, {"workload": "short"}]},
            "some parts have a share and some have not; give all of them one, or none",
        ),
        (
            {"kind": "mix", "parts": [{"workload": {"kind": "trace", "path": "x", "wndow": "1:2"}}]},
            "parts.0.workload.wndow: unknown key",
        ),
        ({"kind": "scenario", "pieces": [{"workload": "r1"}]}, "pieces.0.duration_s: Field required"),
        (
            {"kind": "scenario", "fade_s": 50, "pieces": [{"workload": "r1", "duration_s": 40}] * 2},
            "fade_s 50 is longer than the shortest piece, 40 s",
        ),
        (
            {"kind": "scenario", "pieces": [{"workload": {"kind": "mix", "parts": []}, "duration_s": 40}]},
            "pieces.0.workload: kind: is none of synthetic",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_error_that_names_the_field(written: str | dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_workload(written)
    assert message in caught.value.message
    assert "workload" in caught.value.message or "window" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "workload: rate: is not known for this workload; add rate=REQUESTS_PER_SECOND"),
        ({"rate": 0.0}, "rate: 0.0 is not a number of requests per second"),
        ({"rate": float("nan")}, "rate: nan is not a number of requests per second"),
        ({"rate": float("inf")}, "rate: inf is not a number of requests per second"),
        ({"rate": 1.0, "seed": -1}, "seed: -1 is negative; use 0 or more"),
        ({"rate": 1.0, "num_requests": 0}, "num_requests: 0 is not a positive number"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_workload("synthetic?prompt=10&output=10").source(**arguments)
    assert message in caught.value.message


def test_more_copies_of_a_trace_than_can_be_followed_are_refused(csv: Path) -> None:
    with pytest.raises(ConfigError, match="needs 500000 copies of the trace, more than 100000; use scaling=time"):
        parse_workload(f"trace:{csv}?scaling=population").source(rate=1e6)


@pytest.mark.parametrize("kind", ["trace:{}", "synthetic?rate=1&lengths={}"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("", "holds no requests"),
        ("timestamp,input_tokens,output_tokens\n0,1,1\n1,1,1\n2,one,1\n", "line 4: 'one' is not a number of tokens"),
        ("timestamp,input_tokens,output_tokens\n0,1,1\nnan,1,1\n", "line 3: time: 'nan' is not a moment"),
        ("timestamp,input_tokens,output_tokens\n0,0,1\n1,1,0\n", "holds no requests"),
    ],
)
def test_a_bad_trace_is_one_error_that_names_file_and_line(
    tmp_path: Path, kind: str, content: str | None, message: str
) -> None:
    path = tmp_path / "bad.csv"
    if content is not None:
        path.write_text(content)
    workload = parse_workload(kind.format(path))
    with pytest.raises(ConfigError) as caught:
        workload.source(num_requests=10)
    assert f"{path}: {message}" in caught.value.message


def test_a_window_that_holds_nothing_is_an_error(csv: Path) -> None:
    with pytest.raises(ConfigError, match="holds no requests in the window 9000:9500"):
        parse_workload(f"trace:{csv}?window=9000:9500").source()


@pytest.mark.parametrize(
    "written",
    [
        "azure-conv?prefixes=600x5&classes=a:1,b:1&diurnal=0.5:60",
        "r1?arrivals=onoff:5:5:10",
        "trace:{csv}",
        "trace:{csv}?order=rotate",
        "trace:{csv}?scaling=population&rate=3.5x",
        "synthetic?lengths={csv}&rate=3",
        "sessions?prompt=60/300&output=200&rate=3",
    ],
)
def test_the_same_seed_gives_the_same_requests_and_another_seed_others(csv: Path, written: str) -> None:
    text = written.format(csv=csv)
    first = take(text, 400, seed=1)
    assert len(first) == 400
    assert all(early.at_s <= late.at_s for early, late in pairwise(first))
    assert take(text, 400, seed=1) == first
    assert take(text, 400, seed=2) != first
    # A copy, as another process would have.
    assert list(drain(copy.deepcopy(parse_workload(text)).source(seed=1, num_requests=400))) == first
    # Asking for more changes nothing before; a resampled course alone is laid out for the number wanted.
    if not text.startswith("trace") or "order" in text or "population" in text:
        assert take(text, 900, seed=1)[:400] == first


@pytest.mark.parametrize(
    "written", ["azure-conv", "synthetic?prompt=9/99&output=9&rate=1&prefixes=600x5", "trace:{csv}"]
)
def test_another_rate_is_the_same_requests_at_another_speed(csv: Path, written: str) -> None:
    slow, fast = (take(written.format(csv=csv), 500, rate) for rate in (2.0, 16.0))
    assert [arrival.at_s for arrival in slow] == pytest.approx([8 * arrival.at_s for arrival in fast])
    for one, other in zip(slow, fast, strict=True):
        assert (one.num_prompt_tokens, one.max_tokens) == (other.num_prompt_tokens, other.max_tokens)


def test_a_field_that_is_added_leaves_the_rest_as_it_was() -> None:
    plain = take("azure-conv", 300)
    for more in ("classes=a:0.5,b:0.5", "prefixes=512x3", "max_model_len=500"):
        found = take(f"azure-conv?{more}", 300)
        assert [arrival.at_s for arrival in found] == [arrival.at_s for arrival in plain]
    assert [a.max_tokens for a in take("azure-conv?prompt=50", 300)] == [a.max_tokens for a in plain]


def test_classes_have_their_shares_priorities_and_tenants() -> None:
    found = take(
        {"preset": "short", "classes": {"chat": {"weight": 3, "priority": 2, "tenant": "acme"}, "batch": 1}}, 20_000
    )
    assert Counter((a.slo_class, a.priority, a.tenant) for a in found) == {
        ("chat", 2, "acme"): pytest.approx(15_000, rel=0.03),
        ("batch", 0, None): pytest.approx(5_000, rel=0.06),
    }
    assert {(a.slo_class, a.priority, a.tenant) for a in take("short", 10)} == {(None, 0, None)}


def test_system_prompts_come_before_the_message_as_often_as_zipf_says() -> None:
    written = {"kind": "synthetic", "prompt": 10, "output": 10, "rate": 1}
    found = take({**written, "prefixes": {"tokens": [1024, 600, 300], "zipf": 1.0, "share": 0.55}}, 22_000)
    counts = Counter((a.num_prompt_tokens, len(a.prefix_ids)) for a in found)
    # Weights 1, 1/2, 1/3 of 55 %.
    assert counts == {
        (1034, 2): pytest.approx(6600, rel=0.05),
        (610, 1): pytest.approx(3300, rel=0.05),
        (310, 0): pytest.approx(2200, rel=0.06),
        (10, 0): pytest.approx(9900, rel=0.03),
    }
    assert len({prefix_id for a in found for prefix_id in a.prefix_ids}) == 3
    even = take({**written, "prefixes": {"tokens": [1024, 600], "zipf": 0.0}}, 20_000)
    assert sum(a.num_prompt_tokens == 610 for a in even) == pytest.approx(10_000, rel=0.03)


def test_lengths_of_a_trace_are_drawn_as_pairs(csv: Path) -> None:
    found = take(f"synthetic?lengths={csv}&rate=5&arrivals=deterministic", 5000)
    assert all(a.max_tokens == 10 + (a.num_prompt_tokens - 100) % 50 for a in found)
    assert np.mean([a.num_prompt_tokens for a in found]) == pytest.approx(2100, rel=0.03)
    assert [a.at_s for a in found[:3]] == pytest.approx([0.2, 0.4, 0.6])


def test_what_a_context_cannot_hold_is_cut_and_the_rest_is_left_alone() -> None:
    whole = take("r1", 2000)
    cut = list(drain(parse_workload("r1").for_model(1000).source(num_requests=2000)))
    for before, after in zip(whole, cut, strict=True):
        if before.num_prompt_tokens + before.max_tokens <= 1000:
            assert after == before
        assert after.num_prompt_tokens + after.max_tokens <= 1000
    (short,) = take("synthetic?prompt=9000&output=10&rate=1&prefixes=4096&max_model_len=1100", 1)
    assert (short.num_prompt_tokens, len(short.prefix_ids)) == (1090, 3)
    assert parse_workload("r1?max_model_len=500").for_model(1000) == parse_workload("r1?max_model_len=500")


def test_a_trace_is_at_its_own_rate_or_at_the_one_asked_for(csv: Path) -> None:
    assert parse_workload(f"trace:{csv}").own_rate() == pytest.approx(2.0)
    assert parse_workload(f"trace:{csv}?rate=2.5x").own_rate() == pytest.approx(5.0)
    assert parse_workload(f"trace:{csv}?rate=7").own_rate() == 7.0
    for scaling in ("time", "population"):
        found = take(f"trace:{csv}?order=replay&scaling={scaling}", 4000, rate=20.0)
        assert measured_rate(found) == pytest.approx(20.0, rel=0.01)
        longest = max(a.num_prompt_tokens for a in found[:400])
        assert longest < 600 if scaling == "time" else longest > 3600


def test_a_trace_with_prefix_ids_is_rotated_and_one_without_resampled(tmp_path: Path, csv: Path) -> None:
    path = tmp_path / "hashed.jsonl"
    path.write_text(HASHED)
    found = take(f"trace:{path}?spread_s=0", 300, seed=3)
    places = [arrival.prefix_ids[1] for arrival in found]
    assert places[:20] == list(range(places[0], places[0] + 20))
    assert places[0] > 1
    prompts = [arrival.num_prompt_tokens for arrival in take(f"trace:{csv}", 400)]
    assert prompts[0] < 1000
    assert prompts[-1] > 3000


def test_stamps_that_stand_for_seconds_are_spread_at_random(tmp_path: Path) -> None:
    path = tmp_path / "coarse.jsonl"
    rows = (f'{{"timestamp": {n // 9 * 3000}, "input_length": 10, "output_length": 10}}\n' for n in range(9000))
    path.write_text("".join(rows))
    gaps = np.diff([arrival.at_s for arrival in take(f"trace:{path}?order=replay", 9000)])
    assert gaps.std() / gaps.mean() == pytest.approx(0.95, abs=0.06)
    even = np.diff([arrival.at_s for arrival in take(f"trace:{path}?order=replay&spread=even", 9000)])
    assert even.std() == pytest.approx(0.0, abs=1e-6)


def test_a_trace_that_changes_on_disk_is_read_again(csv: Path) -> None:
    assert parse_workload(f"trace:{csv}").own_rate() == pytest.approx(2.0)
    csv.write_text("timestamp,input_tokens,output_tokens\n" + "".join(f"{n},5,5\n" for n in range(100)))
    assert parse_workload(f"trace:{csv}").own_rate() == pytest.approx(1.0)


def test_a_day_takes_its_period_and_a_replayed_trace_its_length(csv: Path) -> None:
    """What a search must run for, to have seen everything."""
    assert parse_workload("azure-conv").course_s(10.0) == 0.0
    assert parse_workload("azure-conv?diurnal=0.5").course_s(10.0) == 86_400.0
    assert parse_workload(f"trace:{csv}?order=replay").course_s(4.0) == pytest.approx(1000.0, rel=0.01)
    assert parse_workload(f"trace:{csv}?order=replay&scaling=population").course_s(4.0) == pytest.approx(2000, rel=0.01)
    assert parse_workload(f"trace:{csv}").course_s(4.0) == 0.0


def test_an_open_loop_is_an_iterator_too() -> None:
    source = parse_workload("azure-conv").source()
    assert isinstance(source, OpenLoop)
    assert list(islice(source, 100)) == take("azure-conv", 100)


def test_ids_of_shared_prompts_stand_for_whole_blocks() -> None:
    (found,) = take("synthetic?prompt=10&output=10&rate=1&prefixes=1500", 1)
    assert (found.num_prompt_tokens, len(found.prefix_ids)) == (1510, 1500 // HASH_BLOCK_TOKENS)


@pytest.mark.parametrize(
    ("written", "shares"),
    [
        ("synthetic?prompt=100&output=10&rate=1", False),
        ("sessions?prompt=100&output=10&rate=1", True),
        (
            {
                "kind": "mix",
                "parts": [
                    {"workload": "synthetic?prompt=100&output=10&rate=1"},
                    {"workload": "sessions?prompt=100&output=10&rate=1"},
                ],
            },
            True,
        ),
        (
            {
                "kind": "scenario",
                "pieces": [{"workload": "synthetic?prompt=100&output=10&rate=1", "duration_s": 10.0}],
            },
            False,
        ),
    ],
)
def test_a_workload_knows_whether_prefix_caches_matter(written: str | dict[str, object], shares: bool) -> None:
    assert parse_workload(written).shares_prefixes() is shares
