"""Seconds of steps: by region, never falling, longer beside busy workers; beyond what was measured never in silence."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.cluster.planner.profile import (
    Contention,
    ContextBend,
    DecodeRegion,
    Domain,
    LinkCost,
    MixedSteps,
    PrefillRegion,
    Profile,
    Range,
    Slowdown,
)
from pdserve.cluster.planner.step_model import Extrapolation, StepModel, excesses
from pdserve.cluster.planner.step_shape import ALONE, Company, StepShape, chunk_pairs

MEASURED = Domain(
    chunk_tokens=Range(smallest=4, largest=512),
    context_tokens=Range(smallest=2, largest=1000),
    decode_batch=Range(smallest=1, largest=16),
    decode_context_tokens=Range(smallest=10, largest=8000),
)


def profile(
    prefill: Sequence[tuple[int | None, float, float, float]],
    decode: Sequence[tuple[int | None, float, float, float]],
    overlap: float = 0.0,
    extra_s: float = 0.0,
    contention: Contention | None = None,
    bend: ContextBend | None = None,
) -> Profile:
    """Regions as `(upto, fixed, per unit, per load)`."""
    return Profile(
        format=1,
        name="a worker",
        model="m",
        hardware="h",
        source="measured",
        origin="",
        num_gpus=0,
        kv_bytes_per_token=100,
        kv_capacity_tokens=8000,
        max_model_len=2048,
        prefill=tuple(
            PrefillRegion(upto_tokens=upto, fixed_s=a, per_token_s=b, per_pair_s=c, num_samples=0)
            for upto, a, b, c in prefill
        ),
        decode=tuple(
            DecodeRegion(upto_batch=upto, fixed_s=a, per_sequence_s=b, per_context_token_s=c, num_samples=0)
            for upto, a, b, c in decode
        ),
        decode_bend=bend,
        mixed=MixedSteps(overlap=overlap, extra_s=extra_s),
        contention=contention,
        domain=MEASURED,
        links={"shm": LinkCost(latency_s=0.001, bandwidth_bytes_per_s=1e9)},
        startup_s=1.0,
        flip_s=0.1,
    )


PREFILL = [(64, 0.010, 2e-4, 1e-7), (None, 0.005, 3e-4, 1e-7)]
DECODE = [(8, 0.020, 1e-4, 1e-6), (None, 0.012, 1.2e-3, 1e-6)]


@st.composite
def regions(draw: st.DrawFn) -> list[tuple[int | None, float, float, float]]:
    """Any coefficients that a file may hold: steps down and up at the bounds, prices that fall."""
    uppers: list[int | None] = [*sorted(draw(st.sets(st.integers(1, 60), max_size=3)))]
    price = st.floats(0.0, 1e-2)
    found = [(upper, draw(st.floats(-0.05, 0.1)), draw(price), draw(price)) for upper in [*uppers, None]]
    return [(found[0][0], draw(st.floats(1e-4, 0.1)), *found[0][2:]), *found[1:]]


any_bend = st.builds(ContextBend, above_context_tokens=st.floats(0, 5000), extra_s_per_token=st.floats(0, 1e-3))
any_profile = st.builds(profile, regions(), regions(), st.floats(0.0, 1.0), bend=st.none() | any_bend)


@st.composite
def growing_shapes(draw: st.DrawFn) -> tuple[StepShape, StepShape]:
    """A shape and one with at least as much work of every kind."""
    tokens, batch = draw(st.integers(0, 100)), draw(st.integers(0, 100))
    pairs = draw(st.floats(0, 1e4)) if tokens else 0.0
    context_tokens = draw(st.integers(0, 10_000)) if batch else 0
    more = StepShape(
        tokens + draw(st.integers(0, 100)),
        pairs + draw(st.floats(0, 1e4)),
        batch + draw(st.integers(0, 100)),
        context_tokens + draw(st.integers(0, 1000)),
    )
    return StepShape(tokens, pairs, batch, context_tokens), more


def test_a_prefill_step_costs_by_its_tokens_and_pairs() -> None:
    model = StepModel(profile(PREFILL, DECODE))
    assert model.duration_s(StepShape(64, chunk_pairs(64, 100), 0, 0)) == pytest.approx(0.010 + 64 * 2e-4 + 8448e-7)
    assert model.duration_s(StepShape(100, chunk_pairs(100, 0), 0, 0)) == pytest.approx(0.005 + 100 * 3e-4 + 5000e-7)


def test_a_decode_step_costs_by_its_batch_and_contexts() -> None:
    model = StepModel(profile(PREFILL, DECODE))
    assert model.duration_s(StepShape(0, 0.0, 8, 4000)) == pytest.approx(0.020 + 8e-4 + 4e-3)
    assert model.duration_s(StepShape(0, 0.0, 10, 4000)) == pytest.approx(0.012 + 12e-3 + 4e-3)


def test_an_empty_step_takes_no_time() -> None:
    assert StepModel(profile(PREFILL, DECODE)).duration_s(StepShape(0, 0.0, 0, 0)) == 0.0


def test_a_region_that_begins_lower_answers_the_end_of_the_one_before_until_it_is_above() -> None:
    falling = [(8, 0.020, 1e-3, 0.0), (None, 0.010, 1e-3, 0.0)]
    model = StepModel(profile(PREFILL, falling))
    times = [model.duration_s(StepShape(0, 0.0, batch, 0)) for batch in (8, 9, 18, 19, 30)]
    assert times == pytest.approx([0.028, 0.028, 0.028, 0.029, 0.040])


@pytest.mark.parametrize(("overlap", "smaller_part_s"), [(0.0, 0.006), (0.5, 0.003), (1.0, 0.0)])
def test_a_mixed_step_pays_the_larger_fixed_part_once_and_hides_the_overlap(
    overlap: float, smaller_part_s: float
) -> None:
    model = StepModel(profile([(None, 0.010, 1e-3, 0.0)], [(None, 0.030, 1e-3, 0.0)], overlap))
    # 20 tokens vary by 20 ms, 6 sequences by 6 ms.
    assert model.duration_s(StepShape(20, 0.0, 6, 0)) == pytest.approx(0.030 + 0.020 + smaller_part_s)


def test_a_mixed_step_takes_what_is_extra_and_the_phases_alone_do_not() -> None:
    without, model = (StepModel(profile(PREFILL, DECODE, 0.5, extra_s)) for extra_s in (0.0, 0.004))
    mixed = StepShape(20, chunk_pairs(20, 100), 6, 900)
    assert model.duration_s(mixed) == pytest.approx(without.duration_s(mixed) + 0.004)
    for alone in (mixed._replace(num_prefill_tokens=0, prefill_pairs=0.0), StepShape(*mixed[:2], 0, 0)):
        assert model.duration_s(alone) == without.duration_s(alone)


@pytest.mark.parametrize(
    ("shape", "prefill", "decode"),
    [
        (StepShape(64, chunk_pairs(64, 100), 0, 0), 0.3, 0.1),
        (StepShape(64, chunk_pairs(64, 100), 8, 4000), 0.3, 0.1),  # mixed: counted as prefill
        (StepShape(0, 0.0, 8, 4000), 0.2, 0.8),
    ],
)
def test_company_makes_a_step_longer_by_its_kind_and_share(shape: StepShape, prefill: float, decode: float) -> None:
    contention = Contention(
        prefill=Slowdown(beside_prefill=0.3, beside_decode=0.1), decode=Slowdown(beside_prefill=0.2, beside_decode=0.8)
    )
    model = StepModel(profile(PREFILL, DECODE, extra_s=0.002, contention=contention))
    alone_s = model.duration_s(shape)
    assert model.contended_s(shape, ALONE) == alone_s
    assert model.contended_s(shape, Company(prefill=0.5)) == pytest.approx(alone_s * (1.0 + prefill / 2))
    assert model.contended_s(shape, Company(decode=1.0)) == pytest.approx(alone_s * (1.0 + decode))
    both = Company(prefill=0.5, decode=0.5)
    assert model.contended_s(shape, both) == pytest.approx(alone_s * (1.0 + (prefill + decode) / 2))


def test_context_beyond_the_bend_costs_more_in_any_region() -> None:
    bend = ContextBend(above_context_tokens=3000, extra_s_per_token=5e-6)
    straight, bent = StepModel(profile(PREFILL, DECODE)), StepModel(profile(PREFILL, DECODE, bend=bend))
    for batch in (2, 12):
        for tokens, extra_s in ((100, 0.0), (3000, 0.0), (3500, 0.0025), (7000, 0.02)):
            shape = StepShape(0, 0.0, batch, tokens)
            assert bent.duration_s(shape) == pytest.approx(straight.duration_s(shape) + extra_s)


def test_company_costs_nothing_where_nobody_measured_it() -> None:
    model, shape = StepModel(profile(PREFILL, DECODE)), StepShape(64, chunk_pairs(64, 100), 8, 4000)
    assert model.contended_s(shape, Company(decode=1.0)) == model.duration_s(shape)


@given(any_profile, growing_shapes())
def test_time_never_falls_when_work_grows(some: Profile, shapes: tuple[StepShape, StepShape]) -> None:
    model = StepModel(some)
    less, more = shapes
    assert model.duration_s(less) <= model.duration_s(more)


def test_a_shape_outside_of_what_was_measured_is_told_in_words_with_numbers() -> None:
    assert excesses(MEASURED, StepShape(4, chunk_pairs(4, 0), 16, 8000)) == ()
    found = excesses(MEASURED, StepShape(600, chunk_pairs(600, 900), 20, 9))
    assert tuple(excess.words() for excess in found) == (
        "prefill tokens 600 is above the largest measured, 512",
        "context of a prefill token 1,200 is above the largest measured, 1,000",
        "decode batch 20 is above the largest measured, 16",
        "sum of decode contexts 9 is below the smallest measured, 10",
    )


def test_extrapolated_steps_are_counted_with_the_farthest_of_them() -> None:
    model, seen = StepModel(profile(PREFILL, DECODE)), Extrapolation()
    for batch in (16, 17, 40, 24):
        seen.see(model, StepShape(0, 0.0, batch, 1000))
    assert (seen.num_steps, seen.num_outside) == (4, 3)
    assert seen.summary() == ("a worker: 3 of 4 steps (75.0%): decode batch 40 is above the largest measured, 16",)


def test_nothing_is_said_of_steps_that_were_measured() -> None:
    model, seen = StepModel(profile(PREFILL, DECODE)), Extrapolation()
    seen.see(model, StepShape(512, chunk_pairs(512, 0), 0, 0))
    seen.see(model, StepShape(0, 0.0, 1, 10))
    assert (seen.num_steps, seen.num_outside, seen.summary()) == (2, 0, ())
