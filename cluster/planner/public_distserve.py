"""DistServe's published coefficients (LLMServe/DistServe, simdistserve/estimators/profile_data) to profiles.

The file gives milliseconds: prefill `a + b * sum(len) + c * sum(len**2)`, and decode `a + b * sum(context) + c * batch`
twice, for small and for large batches. Its authors publish no errors, so a profile has none either; what is told is how
far the profile is from their formula on the grid that they timed. Their simulator adds 2 ms a step for Ray: not here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.cluster.planner.fit import decode_region, prefill_region
from pdserve.cluster.planner.phase_fit import distinct_shapes, fit_phase
from pdserve.cluster.planner.profile import Domain, FitError, Range
from pdserve.cluster.planner.public_facts import Conversion, Kind, StepCosts, assemble
from pdserve.cluster.planner.step_model import Phase, Region
from pdserve.cluster.unique_keys import unique_keys
from pdserve.proto.errors import ConfigError

HARDWARE = "a100-80gb"
MAX_NUMBER = 1e9
"""Far beyond any coefficient in milliseconds."""

# The grid that was timed: evaluation/0-test-single-forward-performance/main.py, at most so many tokens a batch.
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192)
INPUT_LENGTHS = (4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 284, 512, 768, 1024, 1536, 2020)
GRID_TOKENS = {
    ("facebook/opt-13b", 1): 49_152,
    ("facebook/opt-13b", 2): 98_304,
    ("facebook/opt-13b", 4): 250_000,
    ("facebook/opt-66b", 2): 8_192,
    ("facebook/opt-66b", 3): 36_864,
    ("facebook/opt-66b", 4): 65_000,
}


@dataclass(frozen=True, slots=True)
class _Published:
    """One phase as published: regions by the number of units, prices by units and load."""

    regions: tuple[Region, ...]

    def seconds(self, units: float, load: float) -> float:
        region = next(region for region in self.regions if units <= region.upto)
        return region.fixed_s + region.per_unit_s * units + region.per_load_s * load


def distserve_profiles(text: str, name: str, engine: str = "DistServe") -> tuple[Conversion, ...]:
    """One profile for each model and tensor-parallel degree; `engine` is whose steps were fitted.

    Raises:
        ConfigError: naming the file and the key.
    """
    try:
        tree = json.loads(text, object_pairs_hook=unique_keys)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{name}: is not JSON: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    conversions = []
    for model, degrees in _mapping(tree, name).items():
        for degree, entry in _mapping(degrees, f"{name}: {model}").items():
            where = f"{name}: {model}.{degree}"
            if not degree.isdecimal() or int(degree) < 1:
                raise ConfigError(f"{where}: {degree!r} is not a tensor-parallel degree")
            kind = Kind(model, HARDWARE, int(degree), name, "" if engine == "DistServe" else f"-{engine.lower()}")
            conversions.append(_convert(kind, _mapping(entry, where), where, engine))
    return tuple(conversions)


def _convert(kind: Kind, entry: dict[str, Any], where: str, engine: str) -> Conversion:
    threshold = _numbers(entry, "decoding_large_small_bs_threshold", where, 1)[0]
    if threshold < 1 or threshold != int(threshold):
        raise ConfigError(f"{where}.decoding_large_small_bs_threshold: {threshold:g} is no batch size")
    prefill_ms = _numbers(entry, "prefill", where, 3)
    # A pair is half of a squared length: `tokens * (context + tokens / 2)` without context.
    prefill = _Published((Region(math.inf, prefill_ms[0] / 1e3, prefill_ms[1] / 1e3, 2 * prefill_ms[2] / 1e3),))
    small, large = (_numbers(entry, key, where, 3) for key in ("decoding_smallbs", "decoding_largebs"))
    decode = _Published(
        tuple(
            Region(upto, fixed / 1e3, per_sequence / 1e3, per_context / 1e3)
            for upto, (fixed, per_context, per_sequence) in ((threshold, small), (math.inf, large))
        )
    )
    grid = list(_grid(kind))
    prefill_grid = [(batch * length, batch * length**2 / 2) for batch, length in grid]
    decode_grid = [(batch, batch * length) for batch, length in grid]
    fitted_prefill, prefill_note = _monotone(where, "prefill", prefill, prefill_grid)
    fitted_decode, decode_note = _monotone(where, "decode", decode, decode_grid)
    notes = (prefill_note, decode_note, "error not known: its authors publish none")
    unknown = FitError(num_samples=0)
    costs = StepCosts(
        tuple(prefill_region(region, unknown) for region in fitted_prefill),
        tuple(decode_region(region, unknown) for region in fitted_decode),
        _domain(prefill_grid, decode_grid),
        "fitted",
        f"DistServe (OSDI'24), LLMServe/DistServe, steps of {engine}, Apache-2.0. {prefill_note}. {decode_note}.",
    )
    return Conversion(assemble(kind, costs), notes)


def _monotone(
    where: str, phase: str, published: _Published, grid: Sequence[tuple[float, float]]
) -> tuple[tuple[Region, ...], str]:
    """The published coefficients, or where one is negative a fit to what they say; and how far they are apart."""
    if any(published.seconds(units, load) <= 0 for units, load in grid):
        raise ConfigError(f"{where}: its {phase} coefficients give steps that take no time")
    regions = published.regions
    kept = "kept"
    if any(min(region[1:]) < 0 for region in regions):
        shapes = distinct_shapes((units, load, published.seconds(units, load), 1) for units, load in grid)
        regions = tuple(part.region for part in fit_phase(shapes).parts)
        kept = "refitted, one being negative"
    model = Phase(regions)
    worst = max(abs(model.seconds(int(units), load) / published.seconds(units, load) - 1.0) for units, load in grid)
    return regions, f"{phase}: coefficients {kept}; within {worst:.1%} of the published formula where it was timed"


def _grid(kind: Kind) -> Iterator[tuple[int, int]]:
    limit = GRID_TOKENS.get((kind.model, kind.tensor_parallel_size), kind.kv_capacity_tokens)
    for batch in BATCH_SIZES:
        yield from ((batch, length) for length in INPUT_LENGTHS if batch * (-(-length // 16) * 16) <= limit)


def _domain(prefill_grid: Sequence[tuple[float, float]], decode_grid: Sequence[tuple[float, float]]) -> Domain:
    return Domain(
        chunk_tokens=_range([tokens for tokens, _ in prefill_grid]),
        context_tokens=_range([pairs / tokens for tokens, pairs in prefill_grid]),
        decode_batch=_range([batch for batch, _ in decode_grid]),
        decode_context_tokens=_range([context for _, context in decode_grid]),
    )


def _range(values: Sequence[float]) -> Range:
    return Range(smallest=min(values), largest=max(values))


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{where}: expected keys and values")
    return value


def _numbers(entry: dict[str, Any], key: str, where: str, count: int) -> tuple[float, ...]:
    values = entry.get(key)
    values = values if isinstance(values, list) else [values]
    if len(values) != count or not all(
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_NUMBER for value in values
    ):
        raise ConfigError(f"{where}.{key}: expected {count} numbers")
    return tuple(float(value) for value in values)
