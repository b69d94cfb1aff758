"""What a survey of a source says, against what numpy says; and the published traces against their published table.

With PDSERVE_TRACES set to the folder of the published traces, those are read; without it, stand-ins of the same three
shapes are written and compared with what they were made from.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from pdserve.cluster.arrivals import HASH_BLOCK_TOKENS, Arrival
from pdserve.cluster.planner.describe import (
    Description,
    Histogram,
    Percentiles,
    ReuseMeter,
    Windows,
    describe,
    describe_arrivals,
)
from pdserve.cluster.planner.workload import parse_workload
from pdserve.proto.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Published:
    """A row of the table, or what a stand-in was made from. `drift` bounds the ratio of ten windows."""

    file: str
    num_requests: int
    prompt: tuple[float, float, float]
    output: tuple[float, float, float]
    rate: float
    gap_cv: float
    reuse_share: float
    drift: tuple[float, float]


TABLE = {
    "azure": Published(
        "azure_2023_conv.csv", 19_366, (1020, 2734, 4142), (129, 424, 601), 5.53, 1.09, 0.0, (3.3, 10.0)
    ),
    "mooncake": Published(
        "mooncake_conversation.jsonl.gz",
        12_031,
        (6909, 27_367, 85_400),
        (350, 597, 1119),
        3.40,
        3.03,
        0.374,
        (30, 41),
    ),
    "servegen": Published(
        "servegen_r1_peak_hour.csv.gz",
        126_395,
        (286, 935, 12_957),
        (529, 1495, 5559),
        35.1,
        1.23,
        0.0,
        (0.75, 0.96),
    ),
}


def stand_in(shape: str, folder: Path) -> Published:
    """A file of the shape with 8,000 requests, and its statistics by numpy."""
    random = np.random.default_rng(0)
    size = 8000
    times = np.cumsum(random.gamma(0.8, 0.25, size))
    prompts = np.rint(random.lognormal(7, 0.9, size)).astype(int) + 1
    outputs = np.rint(random.lognormal(5, 0.7, size) * np.linspace(1, 3, size)).astype(int) + 1
    reuse_share = 0.0
    if shape == "azure":
        start = datetime(2024, 2, 28, tzinfo=UTC)
        stamps = (start + timedelta(seconds=at_s) for at_s in times)
        rows = (f"{s:%Y-%m-%d %H:%M:%S.%f},{p},{o}" for s, p, o in zip(stamps, prompts, outputs, strict=True))
        content = "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]).encode()
    elif shape == "servegen":
        rows = (f"{at_s:.6f},7,{p},{o},0.5" for at_s, p, o in zip(times, prompts, outputs, strict=True))
        head = "timestamp_s,client_id,input_tokens,output_tokens,reason_ratio"
        content = gzip.compress("\n".join([head, *rows]).encode())
    else:
        times = times // 3 * 3
        lines, reuse_share = hashed(times, prompts, outputs)
        content = gzip.compress("\n".join(lines).encode())
    (folder / shape).write_bytes(content)
    gaps = np.diff(times)
    windows = np.minimum(9, (times - times[0]) * 10 // (times[-1] - times[0])).astype(int)
    ratios = np.bincount(windows, prompts) / np.bincount(windows, outputs)
    p50, p90, p99 = (tuple(np.percentile(values, share) for values in (prompts, outputs)) for share in (50, 90, 99))
    return Published(
        shape,
        size,
        (p50[0], p90[0], p99[0]),
        (p50[1], p90[1], p99[1]),
        float(1 / gaps.mean()),
        float(gaps.std() / gaps.mean()),
        reuse_share,
        (float(ratios.min()), float(ratios.max())),
    )


def hashed(times: np.ndarray, prompts: np.ndarray, outputs: np.ndarray) -> tuple[list[str], float]:
    """Every third prompt begins with two blocks of an earlier one; the share of tokens that are reused."""
    lines, reused = [], 0
    for number, (at_s, prompt, output) in enumerate(zip(times, prompts, outputs, strict=True)):
        ids = [100 * number + block for block in range(math.ceil(prompt / HASH_BLOCK_TOKENS))]
        if number % 3 == 2:
            begins_with = [100 * (number - 1) + block for block in range(2)][: len(ids)]
            has_it = math.ceil(prompts[number - 1] / HASH_BLOCK_TOKENS)
            reused += min(prompt, HASH_BLOCK_TOKENS * min(len(begins_with), has_it))
            ids[: len(begins_with)] = begins_with
        row = {"timestamp": int(at_s * 1000), "input_length": int(prompt), "output_length": int(output)}
        lines.append(json.dumps({**row, "hash_ids": ids}))
    return lines, reused / int(prompts.sum())


@pytest.fixture(scope="module", params=["azure", "mooncake", "servegen"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Published]:
    folder = os.environ.get("PDSERVE_TRACES")
    if folder:
        return Path(folder) / TABLE[request.param].file, TABLE[request.param]
    made = tmp_path_factory.mktemp("traces")
    found = stand_in(request.param, made)
    return made / found.file, found


def described(path: Path, num_requests: int, fields: str) -> Description:
    return describe(parse_workload(f"trace:{path}?{fields}").source(num_requests=num_requests), num_requests)


def test_a_published_trace_is_what_its_table_says(published: tuple[Path, Published]) -> None:
    """Burstiness is that of the stamps as they are."""
    path, known = published
    found = described(path, known.num_requests, "order=replay&spread_s=0")
    assert found.num_requests == known.num_requests
    for measured, expected in ((found.prompt, known.prompt), (found.output, known.output)):
        assert [measured.p50, measured.p90, measured.p99] == pytest.approx(expected, rel=0.012)
    assert found.rate == pytest.approx(known.rate, rel=0.005)
    assert found.gap_cv == pytest.approx(known.gap_cv, rel=0.01)
    assert found.reuse_share == pytest.approx(known.reuse_share, abs=0.001)
    assert len(found.window_ratios) == 10
    assert min(found.window_ratios) >= known.drift[0] * 0.99
    assert max(found.window_ratios) <= known.drift[1] * 1.01


def test_resampling_keeps_what_a_trace_is(published: tuple[Path, Published]) -> None:
    path, known = published
    replayed = described(path, known.num_requests, "order=replay")
    resampled = described(path, known.num_requests, "order=resample")
    assert resampled.rate == pytest.approx(known.rate, rel=0.04)
    assert resampled.gap_cv == pytest.approx(replayed.gap_cv, rel=0.06)
    assert resampled.tokens_ratio == pytest.approx(replayed.tokens_ratio, rel=0.05)
    assert resampled.window_ratios == pytest.approx(replayed.window_ratios, rel=0.25)


def test_a_population_of_a_hundred_has_a_hundred_times_the_rate(published: tuple[Path, Published]) -> None:
    path, known = published
    found = described(path, 30_000, "scaling=population&rate=100x")
    assert found.rate == pytest.approx(100 * known.rate, rel=0.05)
    assert found.gap_cv == pytest.approx(1.0, rel=0.1)
    assert found.prompt.p50 == pytest.approx(known.prompt[0], rel=0.05)


def test_a_histogram_has_its_percentiles_within_half_a_percent_and_small_counts_exactly() -> None:
    random = np.random.default_rng(0)
    for values in (random.lognormal(7, 1, 50_000).astype(int) + 1, random.integers(1, 50, 10_000)):
        histogram = Histogram()
        for value in values.tolist():
            histogram.add(value)
        exact = [int(np.percentile(values, share, method="lower")) for share in (50, 90, 99)]
        found = histogram.percentiles()
        assert [found.p50, found.p90, found.p99] == pytest.approx(exact, rel=0.006)
        if max(exact) < 50:
            assert [found.p50, found.p90, found.p99] == exact


def test_a_description_adds_up() -> None:
    arrivals = [Arrival(1.0, 100, 10), Arrival(2.0, 100, 10), Arrival(5.0, 400, 10)]
    found = describe_arrivals(arrivals)
    assert replace(found, prompt=found.output, window_ratios=()) == Description(
        num_requests=3,
        duration_s=4.0,
        rate=0.5,
        gap_cv=0.5,
        prompt=Percentiles(10, 10, 10),
        output=Percentiles(10, 10, 10),
        prompt_tokens=600,
        output_tokens=30,
        tokens_ratio=20.0,
        window_ratios=(),
        reuse_share=0.0,
    )
    assert found.window_ratios == (10.0, 10.0, 40.0)


@pytest.mark.parametrize("num_requests", [0, 1])
def test_too_few_requests_are_an_error(num_requests: int) -> None:
    with pytest.raises(ConfigError, match="too few to describe; ask for more"):
        describe_arrivals([Arrival(0.0, 1, 1)] * num_requests)


def test_windows_are_equal_parts_of_time_however_long_it_gets() -> None:
    windows = Windows()
    for number in range(100_000):
        windows.add(Arrival(7.0 + 0.3 * number, 100 + number // 10_000, 100))
    assert windows.ratios() == pytest.approx([1.0 + part / 100 for part in range(10)], rel=1e-4)


def shared(num_requests: int) -> Iterator[Arrival]:
    """Every prompt: a block that all share, one that it shares with nine others, and one of its own."""
    for number in range(num_requests):
        yield Arrival(float(number), 1300, 1, (0, 1 + number // 10, 10_000_000 + number))


def test_reuse_is_what_a_cache_that_forgets_nothing_finds() -> None:
    meter = ReuseMeter()
    for arrival in shared(10_000):
        meter.add(arrival)
    assert meter.reused_tokens == 512 * 9999 + 512 * 9000


def test_reuse_of_many_ids_is_estimated_from_a_sample_of_them() -> None:
    meter = ReuseMeter(max_ids=12_000)
    exact = 0.0
    for number, arrival in enumerate(shared(60_000)):
        ids = (1 + number // 10, 10_000_000 + number)
        meter.add(replace(arrival, prefix_ids=ids))
        exact += 512 * (number % 10 > 0)
    assert meter.reused_tokens == pytest.approx(exact, rel=0.06)


def test_a_conversations_reuse_is_its_history() -> None:
    source = parse_workload("sessions?prompt=100&output=100&mean_turns=3&turns=fixed&think_s=1&rate=5").source()
    # Prompts of 100, 300 and 500 tokens, of which 0, 200 and 400 were said before.
    assert describe(source, 9000).reuse_share == pytest.approx(600 / 900, rel=0.02)


def test_a_description_takes_no_more_memory_for_more_requests() -> None:
    def peak_bytes(num_requests: int) -> int:
        source = parse_workload("r1?prefixes=600x9").source(num_requests=num_requests)
        tracemalloc.start()
        try:
            describe(source, num_requests)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak_bytes(40_000) < 1.3 * peak_bytes(8000)
