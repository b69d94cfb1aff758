"""Plans of load: gaps, lengths, prompts."""

from __future__ import annotations

from itertools import islice, pairwise

import numpy as np
import pytest

from pdserve.cluster.arrivals import (
    WORKLOADS,
    Arrival,
    Lengths,
    PromptMaker,
    Workload,
    fit,
    survey,
    synthesize,
)
from pdserve.proto.errors import ConfigError


def gaps(workload: Workload, count: int) -> np.ndarray:
    times = [0.0] + [arrival.at_s for arrival in synthesize(workload, count, np.random.default_rng(1))]
    return np.diff(times)


def test_poisson_arrivals_have_the_rate_and_the_memoryless_spread() -> None:
    found = gaps(Workload(Lengths(8, 8), Lengths(8, 8), rate=20.0), 20_000)
    assert found.mean() == pytest.approx(1 / 20, rel=0.03)
    assert found.std() / found.mean() == pytest.approx(1.0, abs=0.03)
    # P(gap > mean) = 1/e for an exponential gap, and for nothing much else with the same two moments.
    assert (found > 1 / 20).mean() == pytest.approx(np.exp(-1), abs=0.01)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.03


def test_burstiness_is_the_inverse_square_of_the_variation() -> None:
    found = gaps(Workload(Lengths(8, 8), Lengths(8, 8), rate=5.0, burstiness=0.25), 20_000)
    assert found.mean() == pytest.approx(0.2, rel=0.05)
    assert found.std() / found.mean() == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_preset_has_the_percentiles_it_is_named_for(name: str) -> None:
    workload = WORKLOADS[name]
    arrivals = list(synthesize(workload, 20_000, np.random.default_rng(0)))
    for values, lengths in (
        ([a.num_prompt_tokens for a in arrivals], workload.prompt),
        ([a.max_tokens for a in arrivals], workload.output),
    ):
        assert np.percentile(values, 50) == pytest.approx(lengths.p50, rel=0.05)
        assert np.percentile(values, 90) == pytest.approx(lengths.p90, rel=0.05)


def test_the_same_seed_gives_the_same_plan() -> None:
    once, again = (list(synthesize(WORKLOADS["r1"], 50, np.random.default_rng(3))) for _ in range(2))
    assert once == again
    assert all(early.at_s < late.at_s for early, late in pairwise(once))


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_no_rate_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="rate"):
        synthesize(Workload(Lengths(8, 8), Lengths(8, 8), rate=rate), 1, np.random.default_rng(0))


def test_a_survey_counts_what_comes() -> None:
    found = survey(islice([Arrival(1.0, 5, 2), Arrival(3.0, 7, 4)], 2))
    assert (found.num_requests, found.duration_s, found.prompt_tokens, found.output_tokens) == (2, 3.0, 12, 6)


@pytest.mark.parametrize(
    ("prompt", "output", "fitted"),
    [(10, 10, (10, 10)), (10, 90, (10, 90)), (500, 10, (90, 10)), (99, 99, (50, 50)), (20, 90, (20, 50))],
)
def test_an_arrival_is_cut_to_the_context(prompt: int, output: int, fitted: tuple[int, int]) -> None:
    found = fit(Arrival(0.0, prompt, output), 100)
    assert (found.num_prompt_tokens, found.max_tokens) == fitted


def test_cutting_an_arrival_leaves_the_rest_of_it_alone() -> None:
    asked = Arrival(2.0, 500, 10, (1, 2), "chat", 3, "acme", 7, 400)
    assert fit(asked, 100) == Arrival(2.0, 90, 10, (1, 2), "chat", 3, "acme", 7, 400)
    assert fit(asked, 510) is asked


def test_prompts_have_their_length_and_never_an_end_of_sequence_token() -> None:
    maker = PromptMaker(16, [2, 7], seed=0)
    prompt = maker.prompt(Arrival(0.0, 2000, 1))
    assert len(prompt) == 2000
    assert set(prompt) == set(range(16)) - {2, 7}
    assert maker.prompt(Arrival(0.0, 2000, 1)) != prompt
    assert PromptMaker(16, [2, 7], seed=0).prompt(Arrival(0.0, 2000, 1)) == prompt


def test_equal_prefix_ids_are_equal_tokens_and_the_rest_is_unique() -> None:
    maker = PromptMaker(1000, [], seed=0)
    first = maker.prompt(Arrival(0.0, 1200, 1, (5, 6)))
    second = maker.prompt(Arrival(0.0, 1300, 1, (5, 9)))
    third = maker.prompt(Arrival(0.0, 600, 1, (5, 6)))
    assert first[:512] == second[:512] == third[:512]
    assert first[512:1024] != second[512:1024]
    assert first[512:600] == third[512:600]
    assert first[1024:] != second[1024:1200]
    assert [len(first), len(second), len(third)] == [1200, 1300, 600]


def test_a_model_of_nothing_but_end_tokens_is_refused() -> None:
    with pytest.raises(ConfigError):
        PromptMaker(2, [0, 1], seed=0)
