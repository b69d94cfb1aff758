"""Coefficients are found again in noisy steps with outliers; errors are those of steps the fit did not see."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from pdserve.cluster.planner.fit import StepFit, fit_steps
from pdserve.cluster.planner.nnls import Floats, nnls
from pdserve.cluster.planner.profile import Slowdown
from pdserve.cluster.planner.step_model import decode_phase, mixing, prefill_phase
from pdserve.cluster.planner.step_sample import StepSample
from pdserve.cluster.planner.step_shape import Company, StepShape, chunk_pairs
from pdserve.proto.errors import ConfigError

CHUNKS = (1, 4, 16, 32, 64, 96, 128, 192, 256, 384, 512)
CONTEXTS = (0, 128, 512, 1024, 2048)
BATCHES = (1, 2, 4, 8, 12, 16, 24, 32)

PREFILL_SHAPES = [StepShape(n, chunk_pairs(n, c), 0, 0) for n in CHUNKS for c in CONTEXTS]
DECODE_SHAPES = [StepShape(0, 0.0, batch, batch * c) for batch in BATCHES for c in (16, 128, 512, 1024, 2048)]
MIXED_SHAPES = [StepShape(n, chunk_pairs(n, 256), batch, batch * 600) for n in (32, 128, 384) for batch in BATCHES]

Cost = Callable[[StepShape], float]


def prefill_s(shape: StepShape) -> float:
    return 0.008 + 1.5e-4 * shape.num_prefill_tokens + 4e-8 * shape.prefill_pairs


def decode_s(shape: StepShape) -> float:
    return 0.012 + 6e-4 * shape.num_decodes + 3e-7 * shape.decode_context_tokens


def mixed_s(shape: StepShape, overlap: float) -> float:
    prefill_part_s, decode_part_s = prefill_s(shape) - 0.008, decode_s(shape) - 0.012
    smaller_s, larger_s = sorted((prefill_part_s, decode_part_s))
    return 0.012 + larger_s + (1.0 - overlap) * smaller_s


def either_s(shape: StepShape) -> float:
    return decode_s(shape) if shape.num_decodes else prefill_s(shape)


def timed(
    shapes: Iterable[StepShape],
    cost: Cost,
    *,
    noise: float = 0.03,
    outliers: float = 0.0,
    repeats: int = 1,
    seed: int = 1,
) -> list[StepSample]:
    """Each shape timed some times, with noise in proportion; a share of the times is twice to ten times as long."""
    random = np.random.default_rng(seed)
    samples = []
    for shape in itertools.chain.from_iterable(itertools.repeat(shape, repeats) for shape in shapes):
        seconds = cost(shape) * float(random.lognormal(0.0, noise))
        if random.random() < outliers:
            seconds *= float(random.uniform(2.0, 10.0))
        samples.append(StepSample(shape, seconds))
    return samples


def test_known_coefficients_are_found_in_noise_with_outliers() -> None:
    fit = fit_steps(timed([*PREFILL_SHAPES, *DECODE_SHAPES], either_s, outliers=0.1, repeats=5))
    (prefill,), (decode,) = fit.prefill, fit.decode
    assert (prefill.fixed_s, prefill.per_token_s, prefill.per_pair_s) == pytest.approx((0.008, 1.5e-4, 4e-8), rel=0.05)
    assert (decode.fixed_s, decode.per_sequence_s, decode.per_context_token_s) == pytest.approx(
        (0.012, 6e-4, 3e-7), rel=0.05
    )


def test_outliers_are_withstood_where_no_shape_was_timed_twice() -> None:
    fit = fit_steps(timed([*PREFILL_SHAPES, *DECODE_SHAPES], either_s, outliers=0.1))
    prefill, decode = prefill_phase(fit.prefill), decode_phase(fit.decode)
    for tokens, pairs, _, _ in PREFILL_SHAPES:
        assert prefill.seconds(tokens, pairs) == pytest.approx(prefill_s(StepShape(tokens, pairs, 0, 0)), rel=0.08)
    for _, _, batch, context_tokens in DECODE_SHAPES:
        shape = StepShape(0, 0.0, batch, context_tokens)
        assert decode.seconds(batch, context_tokens) == pytest.approx(decode_s(shape), rel=0.08)


def test_the_error_is_that_of_the_noise_when_the_model_is_right() -> None:
    fit = fit_steps(timed([*PREFILL_SHAPES, *DECODE_SHAPES], either_s, noise=0.1))
    for region in (*fit.prefill, *fit.decode):
        assert region.median_error is not None
        assert region.p95_error is not None
        # Of |N(0, 0.1)| the median is 0.067 and the 95th percentile 0.196.
        assert region.median_error == pytest.approx(0.067, rel=0.5)
        assert region.p95_error == pytest.approx(0.196, rel=0.5)


def test_the_error_is_no_smaller_for_a_model_that_could_follow_the_noise() -> None:
    """Four shapes, three coefficients: the fit is nearly exact on what it saw and knows that this means nothing."""
    shapes = [StepShape(n, chunk_pairs(n, c), 0, 0) for n, c in ((8, 0), (64, 900), (256, 0), (400, 500), (512, 1500))]
    fit = fit_steps(timed([*shapes, *DECODE_SHAPES], either_s, noise=0.3, seed=5))
    assert max(region.p95_error or 0.0 for region in fit.prefill) > 0.1


def bent_s(shape: StepShape) -> float:
    """Cheap up to 64 tokens, then three times as dear."""
    tokens = shape.num_prefill_tokens
    return 0.01 + 5e-5 * min(tokens, 64) + 1.5e-4 * max(0, tokens - 64) + 2e-8 * shape.prefill_pairs


def test_a_bend_becomes_a_bound_between_regions() -> None:
    fit = fit_steps([*timed(PREFILL_SHAPES, bent_s, noise=0.01), *timed(DECODE_SHAPES, decode_s)])
    assert [region.upto_tokens for region in fit.prefill] == [64, None]
    assert fit.prefill[0].per_token_s == pytest.approx(5e-5, rel=0.15)
    assert fit.prefill[1].per_token_s == pytest.approx(1.5e-4, rel=0.05)
    phase = prefill_phase(fit.prefill)
    for shape in PREFILL_SHAPES:
        assert phase.seconds(shape.num_prefill_tokens, shape.prefill_pairs) == pytest.approx(bent_s(shape), rel=0.04)


def test_pairs_that_become_dearer_become_a_bound_too() -> None:
    def dearer_s(shape: StepShape) -> float:
        return prefill_s(shape) + (1.2e-7 * shape.prefill_pairs if shape.num_prefill_tokens > 128 else 0.0)

    fit = fit_steps([*timed(PREFILL_SHAPES, dearer_s, noise=0.01), *timed(DECODE_SHAPES, decode_s)])
    assert len(fit.prefill) > 1
    assert fit.prefill[0].per_pair_s == pytest.approx(4e-8, rel=0.2)
    assert fit.prefill[-1].per_pair_s == pytest.approx(1.6e-7, rel=0.1)


def cached_s(shape: StepShape) -> float:
    """Decodes whose context gets four times as dear where it no longer fits a cache."""
    return decode_s(shape) + 9e-7 * max(0, shape.decode_context_tokens - 4000)


def test_context_that_gets_dearer_in_large_steps_is_a_bend_whatever_the_batch() -> None:
    fit = fit_steps([*timed(PREFILL_SHAPES, prefill_s), *timed(DECODE_SHAPES, cached_s, repeats=4)])
    assert fit.decode_bend is not None
    assert fit.decode_bend.above_context_tokens == pytest.approx(4000, rel=0.3)
    assert fit.decode_bend.extra_s_per_token == pytest.approx(9e-7, rel=0.1)
    phase = decode_phase(fit.decode, fit.decode_bend)
    for shape in DECODE_SHAPES:
        seconds = phase.seconds(shape.num_decodes, shape.decode_context_tokens)
        assert seconds == pytest.approx(cached_s(shape), rel=0.06)


@pytest.mark.parametrize("seed", range(8))
def test_noise_makes_neither_bounds_nor_a_bend(seed: int) -> None:
    fit = fit_steps(timed([*PREFILL_SHAPES, *DECODE_SHAPES], either_s, noise=0.15, outliers=0.05, seed=seed))
    assert (len(fit.prefill), len(fit.decode), fit.decode_bend) == (1, 1, None)


BUSY_SHAPES = [StepShape(n, chunk_pairs(n, c), b, b * 300) for n in (8, 32, 128, 384) for c in (0, 512) for b in (1, 6)]


def test_a_busy_worker_tells_of_prefill_in_its_mixed_steps() -> None:
    """It hardly ever computes a prompt without decodes beside it."""
    lone = timed([StepShape(40, chunk_pairs(40, 0), 0, 0)], lambda _: 0.05)
    busy = timed(BUSY_SHAPES, lambda shape: mixed_s(shape, 0.0), noise=0.02, repeats=4)
    fit = fit_steps([*timed(DECODE_SHAPES, decode_s, repeats=2), *lone, *busy])
    assert any("hardly any step without decodes" in line for line in fit.thin)
    model_s = (prefill_phase(fit.prefill), decode_phase(fit.decode))
    mixer = mixing(*model_s)
    for shape in BUSY_SHAPES:
        larger, smaller = mixer.parts(model_s[0].seconds(*shape[:2]), model_s[1].seconds(*shape[2:]))
        predicted = larger + (1.0 - fit.mixed.overlap) * smaller + fit.mixed.extra_s
        assert predicted == pytest.approx(mixed_s(shape, 0.0), rel=0.06)


def test_company_of_a_busy_workers_prompts_is_found_in_its_mixed_steps() -> None:
    busy = timed(BUSY_SHAPES, lambda shape: mixed_s(shape, 0.0), noise=0.02, repeats=4)
    steps = [*timed(DECODE_SHAPES, decode_s, repeats=2), *busy]
    fit = fit_steps(beside_others(steps, (0.3, 0.1), (0.2, 0.5), MANY))
    assert fit.contention is not None
    assert prices_of(fit.contention.prefill) == pytest.approx((0.3, 0.1), abs=0.05)
    assert prices_of(fit.contention.decode) == pytest.approx((0.2, 0.5), abs=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_fitted_regions_meet_so_that_no_step_needs_another_regions_end(seed: int) -> None:
    def jumping_s(shape: StepShape) -> float:
        return either_s(shape) * (1.0 + 0.5 * ((shape.num_prefill_tokens + shape.num_decodes) % 3))

    fit = fit_steps(timed([*PREFILL_SHAPES, *DECODE_SHAPES], jumping_s, noise=0.2, seed=seed))
    prefill, decode = prefill_phase(fit.prefill), decode_phase(fit.decode)
    assert all(len(prefill[tokens]) == 1 for tokens in range(1, 600))
    assert all(len(decode[batch]) == 1 for batch in range(1, 100))


@pytest.mark.parametrize("overlap", [0.0, 0.6, 1.0])
def test_the_overlap_of_mixed_steps_is_found(overlap: float) -> None:
    alone = timed([*PREFILL_SHAPES, *DECODE_SHAPES], either_s, noise=0.01)
    mixed = timed(MIXED_SHAPES, lambda shape: mixed_s(shape, overlap), noise=0.02, outliers=0.1)
    fit = fit_steps([*alone, *mixed])
    assert fit.mixed.overlap == pytest.approx(overlap, abs=0.06)
    assert fit.mixed.num_samples == len(MIXED_SHAPES)
    assert fit.mixed.median_error is not None
    assert fit.mixed.median_error < 0.05


@pytest.mark.parametrize("extra_s", [0.0, 0.002, 0.006])
def test_what_mixed_steps_take_beyond_both_phases_is_found(extra_s: float) -> None:
    alone = timed([*PREFILL_SHAPES, *DECODE_SHAPES], either_s, noise=0.01)
    mixed = timed(MIXED_SHAPES, lambda shape: mixed_s(shape, 0.5) + extra_s, noise=0.02)
    fit = fit_steps([*alone, *mixed])
    assert fit.mixed.extra_s == pytest.approx(extra_s, abs=0.001)
    assert fit.mixed.overlap == pytest.approx(0.5, abs=0.1)


Prices = tuple[float, float]
"""What company that prefills and company that decodes add."""


def beside_others(
    samples: Iterable[StepSample], prefill: Prices, decode: Prices, company: Sequence[Company]
) -> list[StepSample]:
    """As if the machine's other workers had computed meanwhile: shares of the time, in turn."""
    found = []
    for sample, shares in zip(samples, itertools.cycle(company)):
        prices = prefill if sample.shape.num_prefill_tokens else decode
        slower = 1.0 + prices[0] * shares.prefill + prices[1] * shares.decode
        found.append(replace(sample, duration_s=sample.duration_s * slower, company=shares))
    return found


def prices_of(slower: Slowdown) -> Prices:
    return slower.beside_prefill, slower.beside_decode


MANY = [Company(*shares) for shares in ((0, 0), (0.2, 0.1), (0.9, 0), (0, 0.5), (0.3, 0.7), (0, 1), (0.4, 0.2), (1, 0))]


@pytest.mark.parametrize(
    ("prefill", "decode"), [((0.3, 0.1), (0.2, 0.8)), ((0.0, 0.2), (0.5, 0.0)), ((0.6, 0.6), (0.0, 0.0))]
)
def test_what_company_costs_is_found_and_so_are_the_steps_alone(prefill: Prices, decode: Prices) -> None:
    steps = timed([*PREFILL_SHAPES, *DECODE_SHAPES], either_s, noise=0.01, repeats=4)
    fit = fit_steps(beside_others(steps, prefill, decode, MANY))
    assert fit.contention is not None
    assert prices_of(fit.contention.prefill) == pytest.approx(prefill, abs=0.04)
    assert prices_of(fit.contention.decode) == pytest.approx(decode, abs=0.04)
    alone = fit_steps(steps)
    assert fit.prefill[0].per_token_s == pytest.approx(alone.prefill[0].per_token_s, rel=0.05)
    assert fit.decode[0].fixed_s == pytest.approx(alone.decode[0].fixed_s, rel=0.05)


@pytest.mark.parametrize("busy", [[0.0], [0.6], [0.55, 0.6, 0.65]])
def test_company_that_does_not_vary_has_no_price(busy: list[float]) -> None:
    steps = timed([*PREFILL_SHAPES, *DECODE_SHAPES], either_s)
    company = [Company(share, share) for share in busy]
    assert fit_steps(beside_others(steps, (0.3, 0.3), (0.8, 0.8), company)).contention is None


def test_a_kind_of_company_that_was_never_there_costs_what_the_other_one_does() -> None:
    """Workers of a pair only ever have one kind beside them."""
    steps = timed([*PREFILL_SHAPES, *DECODE_SHAPES], either_s, noise=0.01, repeats=4)
    company = [Company(decode=share) for share in (0.0, 0.2, 0.9, 0.5, 1.0, 0.4, 0.7)]
    fit = fit_steps(beside_others(steps, (0.0, 0.3), (0.0, 0.8), company))
    assert fit.contention is not None
    assert prices_of(fit.contention.prefill) == pytest.approx((0.3, 0.3), abs=0.04)
    assert prices_of(fit.contention.decode) == pytest.approx((0.8, 0.8), abs=0.04)


@pytest.mark.parametrize("seed", range(4))
def test_what_the_steps_took_in_sum_is_what_the_fit_says_however_skewed_they_are(seed: int) -> None:
    """A simulation adds steps up: means matter, and the median of a skewed time lies below its mean."""
    random, skew = np.random.default_rng(seed), 0.15
    prompts = [
        StepShape(n, chunk_pairs(n, c + more), 0, 0) for n, c, more in itertools.product(CHUNKS, CONTEXTS, range(20))
    ]
    decodes = [StepShape(0, 0.0, n, n * (c + more)) for n, c, more in itertools.product(BATCHES, CONTEXTS, range(20))]
    samples = [
        StepSample(shape, either_s(shape) * float(random.lognormal(-skew * skew / 2, skew)))
        for shape in (*prompts, *decodes)
    ]
    fit = fit_steps(samples)
    prefill, decode = prefill_phase(fit.prefill), decode_phase(fit.decode)
    for is_prefill in (True, False):
        some = [sample for sample in samples if bool(sample.shape.num_prefill_tokens) is is_prefill]
        said = sum(prefill.seconds(*one.shape[:2]) if is_prefill else decode.seconds(*one.shape[2:]) for one in some)
        assert said == pytest.approx(sum(one.duration_s for one in some), rel=0.02)


def test_mixed_steps_do_not_bend_the_phases() -> None:
    alone = timed([*PREFILL_SHAPES, *DECODE_SHAPES], either_s)
    wild = [StepSample(shape, 9.0) for shape in MIXED_SHAPES]
    with_mixed, without = fit_steps([*alone, *wild]), fit_steps(alone)
    assert (with_mixed.prefill, with_mixed.decode) == (without.prefill, without.decode)


def test_the_fit_tells_what_was_measured_and_how_often() -> None:
    fit = fit_steps(timed([*PREFILL_SHAPES, *DECODE_SHAPES], either_s, repeats=3))
    assert sum(region.num_samples for region in fit.prefill) == 3 * len(PREFILL_SHAPES)
    assert sum(region.num_samples for region in fit.decode) == 3 * len(DECODE_SHAPES)
    assert (fit.domain.chunk_tokens.smallest, fit.domain.chunk_tokens.largest) == (1, 512)
    assert (fit.domain.context_tokens.smallest, fit.domain.context_tokens.largest) == (0.5, 2048 + 256)
    assert (fit.domain.decode_batch.smallest, fit.domain.decode_batch.largest) == (1, 32)
    assert (fit.domain.decode_context_tokens.smallest, fit.domain.decode_context_tokens.largest) == (16, 65536)


def test_thin_regions_are_named_with_what_to_time() -> None:
    prefill = [StepShape(n, chunk_pairs(n, 0), 0, 0) for n in (8, 64, 256)]
    decode = [StepShape(0, 0.0, batch, batch * 100) for batch in BATCHES]
    assert fit_steps(timed([*prefill, *decode], either_s)).thin == (
        "prefill, any number of tokens: 3 distinct shapes; time at least 5",
        "decode, any number of sequences: context did not vary on its own; "
        "time equal steps behind shorter and longer contexts",
        "mixed steps: none timed; the sum of both phases is assumed",
    )


def test_too_few_shapes_to_hold_any_out_leave_the_error_unknown() -> None:
    prefill = [StepShape(n, chunk_pairs(n, 0), 0, 0) for n in (8, 64, 256)]
    (region,) = fit_steps(timed([*prefill, *DECODE_SHAPES], either_s, repeats=10)).prefill
    assert (region.num_samples, region.median_error, region.p95_error) == (30, None, None)


def test_one_shape_for_each_phase_is_fitted_as_it_is() -> None:
    shapes = [StepShape(64, chunk_pairs(64, 0), 0, 0), StepShape(0, 0.0, 4, 400)]
    fit = fit_steps(timed(shapes, either_s, noise=0.0))
    assert prefill_phase(fit.prefill).seconds(64, 2048) == pytest.approx(prefill_s(shapes[0]))
    assert decode_phase(fit.decode).seconds(4, 400) == pytest.approx(decode_s(shapes[1]))


def test_the_same_samples_in_another_order_give_the_same_fit() -> None:
    samples = timed([*PREFILL_SHAPES, *DECODE_SHAPES], either_s, outliers=0.1)
    assert fit_steps(samples) == fit_steps(samples[::-1])


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "samples: none is a decode step alone"),
        ([StepSample(StepShape(0, 0.0, 1, 5), 0.1)], "samples: none is a prefill step alone"),
        ([StepSample(StepShape(1, 0.5, 0, 0), 0.1)], "samples: none is a decode step alone"),
        ([StepSample(StepShape(1, 0.5, 0, 0), 0.0)], r"samples\.0: 0\.0 s is no duration"),
        ([StepSample(StepShape(1, 0.5, 0, 0), float("nan"))], r"samples\.0: nan s is no duration"),
        ([StepSample(StepShape(0, 0.0, 0, 0), 0.1)], r"samples\.0: \(0, 0\.0, 0, 0\) is no shape of a step"),
        ([StepSample(StepShape(1, -1.0, 0, 0), 0.1)], r"samples\.0: .* is no shape of a step"),
        ([StepSample(StepShape(1, float("nan"), 0, 0), 0.1)], r"samples\.0: .* is no shape of a step"),
    ],
)
def test_what_cannot_be_fitted_is_refused(samples: list[StepSample], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_steps(samples)


def brute_force(matrix: Floats, target: Floats) -> float:
    """The least residual over all choices of columns that may be above zero."""
    best = float(np.linalg.norm(target))
    for size in range(1, matrix.shape[1] + 1):
        for chosen in itertools.combinations(range(matrix.shape[1]), size):
            columns = matrix[:, chosen]
            weights = np.linalg.lstsq(columns, target, rcond=None)[0]
            if weights.min() >= 0.0:
                best = min(best, float(np.linalg.norm(columns @ weights - target)))
    return best


@pytest.mark.parametrize("seed", range(60))
def test_non_negative_least_squares_is_as_good_as_trying_everything(seed: int) -> None:
    random = np.random.default_rng(seed)
    num_rows, num_columns = int(random.integers(1, 12)), int(random.integers(1, 7))
    matrix = random.normal(size=(num_rows, num_columns)) * 10.0 ** random.integers(-6, 3, size=num_columns)
    if seed % 3 == 0 and num_columns > 1:
        matrix[:, 1] = matrix[:, 0] * 2.0  # columns that cannot be told apart
    if seed % 5 == 0:
        matrix[:, -1] = 0.0
    target = random.normal(size=num_rows)
    found = nnls(matrix, target)
    assert found.min() >= 0.0
    assert float(np.linalg.norm(matrix @ found - target)) == pytest.approx(
        brute_force(matrix, target), rel=1e-6, abs=1e-9
    )


def test_the_combination_of_fitted_phases_predicts_mixed_steps() -> None:
    alone = timed([*PREFILL_SHAPES, *DECODE_SHAPES], either_s, noise=0.01)
    fit: StepFit = fit_steps([*alone, *timed(MIXED_SHAPES, lambda shape: mixed_s(shape, 0.5), noise=0.01)])
    prefill, decode = prefill_phase(fit.prefill), decode_phase(fit.decode)
    mixer = mixing(prefill, decode)
    for shape in MIXED_SHAPES:
        tokens, pairs, batch, context_tokens = shape
        larger, smaller = mixer.parts(prefill.seconds(tokens, pairs), decode.seconds(batch, context_tokens))
        predicted = larger + (1.0 - fit.mixed.overlap) * smaller
        assert predicted == pytest.approx(mixed_s(shape, 0.5), rel=0.05)
