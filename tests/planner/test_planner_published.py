"""The comparisons with published results: what their own logic makes of made-up runs. No public file is needed."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pdserve.cluster.arrivals import Arrival
from pdserve.cluster.planner.profile import DecodeRegion, Domain, PrefillRegion, Profile, Range
from pdserve.cluster.planner.virtual_router import Record

BENCH = Path(__file__).parents[2] / "bench"
FIRST_S, TOKEN_S = 0.1, 0.02
"""What a lone request takes with `lone_worker`: its prefill, and each further token."""


@pytest.fixture
def splitwise(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("_published_splitwise")


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("published")


def test_requests_as_fast_as_a_lone_one_are_within_all_slowdowns(splitwise: ModuleType) -> None:
    found = splitwise.stretch([record(number, 1.0, 1.0) for number in range(100)], lone_worker())
    # The tightest limit is 1.25 times, for tokens of the median request.
    assert found == pytest.approx(1 / 1.25)


def test_the_worst_of_the_nine_slowdowns_decides(splitwise: ModuleType) -> None:
    slow_first = [record(number, 4.0, 1.0) for number in range(100)]
    assert splitwise.stretch(slow_first, lone_worker()) == pytest.approx(4 / 2)
    one_in_ten = [record(number, 1.0, 3.0 if number % 5 == 0 else 1.0) for number in range(100)]
    assert splitwise.stretch(one_in_ten, lone_worker()) == pytest.approx(3 / 1.5)


def test_a_request_that_failed_is_infinitely_slow(splitwise: ModuleType) -> None:
    records = [record(number, 1.0, 1.0) for number in range(100)]
    records[-1].failure = "refused"
    assert splitwise.stretch(records, lone_worker()) == math.inf


def test_the_first_requests_found_an_empty_system_and_are_not_judged(splitwise: ModuleType) -> None:
    records = [record(number, 100.0 if number < 30 else 1.0, 1.0) for number in range(100)]
    assert splitwise.stretch(records, lone_worker()) == pytest.approx(1 / 1.25)


def test_a_published_share_is_compared_with_the_nearest_split_of_ours(splitwise: ModuleType) -> None:
    assert splitwise.on_grid(45 / 70) == 0.625
    assert splitwise.on_grid(35 / 40) == 0.875


def test_without_the_public_files_it_says_which_are_missing_and_has_no_rows(
    published: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["published.py", "--json", "--traces", str(tmp_path)])
    published.main()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "splitwise_sim_perf_model.csv.gz" in printed.err
    assert "distserve_profiler-a100-80g.vllm.json" in printed.err


def record(number: int, first_slowdown: float, token_slowdown: float) -> Record:
    """A request of 11 tokens that took so many times what a lone one takes."""
    first_s = number + first_slowdown * FIRST_S
    end_s = first_s + 10 * token_slowdown * TOKEN_S
    arrival = Arrival(float(number), 50, 11)
    return Record(arrival, first_token_s=first_s, end_s=end_s, num_output_tokens=11)


def lone_worker() -> Profile:
    wide = Range(smallest=0, largest=1e9)
    return Profile(
        format=1,
        name="lone",
        model="made up",
        hardware="made up",
        source="predicted",
        origin="",
        num_gpus=1,
        kv_bytes_per_token=4096,
        kv_capacity_tokens=10_000,
        max_model_len=1024,
        prefill=(PrefillRegion(num_samples=0, fixed_s=FIRST_S, per_token_s=0.0, per_pair_s=0.0),),
        decode=(DecodeRegion(num_samples=0, fixed_s=TOKEN_S, per_sequence_s=0.0, per_context_token_s=0.0),),
        domain=Domain(chunk_tokens=wide, context_tokens=wide, decode_batch=wide, decode_context_tokens=wide),
        links={},
        startup_s=0.0,
        flip_s=0.0,
    )
