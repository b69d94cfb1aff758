"""What one kind of worker costs: step times with their errors, memory, links, overheads. One JSON file for each kind.

A kind is a model on some hardware at one tensor-parallel degree. A profile says where its figures come from (measured
here, fitted by others, or predicted), how well each region of them fits, and within which bounds anybody measured.
Knows the file format only: nothing of how steps are timed or fitted, nor what a simulation makes of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pdserve.cluster.unique_keys import unique_keys
from pdserve.proto.errors import ConfigError

MAX_PROFILE_CHARS = 1 << 20
MAX_REGIONS = 8
LEAST_STEP_S = 1e-9

Seconds: TypeAlias = Annotated[float, Field(ge=0, le=1e6)]
Error: TypeAlias = Annotated[float, Field(ge=0)]
Count: TypeAlias = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FitError(Section):
    """How far the model is off samples it was not fitted to, as a share of what was measured.

    The ends of what was measured are the exception: every fit has them. `num_samples` counts the measurements; the
    errors are null where nobody published them or where there were too few to hold any out.
    """

    num_samples: int = Field(ge=0)
    median_error: Error | None = None
    p95_error: Error | None = None


class PrefillRegion(FitError):
    """`fixed_s + per_token_s * tokens + per_pair_s * pairs`, for steps of at most `upto_tokens` prefill tokens.

    `upto_tokens: null` is the last region. `fixed_s` may be negative from the second region on, where the line is
    steeper than before.
    """

    upto_tokens: Count | None = None
    fixed_s: float
    per_token_s: Seconds
    per_pair_s: Seconds


class DecodeRegion(FitError):
    """`fixed_s + per_sequence_s * batch + per_context_token_s * context`, for steps of at most `upto_batch` sequences.

    `context` is the sum over the sequences of the step.
    """

    upto_batch: Count | None = None
    fixed_s: float
    per_sequence_s: Seconds
    per_context_token_s: Seconds


class ContextBend(Section):
    """Beyond so many tokens of context in a decode step each takes this much longer: no cache holds their KV."""

    above_context_tokens: float = Field(ge=0)
    extra_s_per_token: Seconds


class MixedSteps(FitError):
    """How much of the smaller part of a mixed step hides behind the larger: 0 adds them, 1 hides it all.

    `extra_s` is what such a step takes beyond both.
    """

    overlap: float = Field(default=0.0, ge=0, le=1)
    extra_s: Seconds = 0.0
    num_samples: int = Field(default=0, ge=0)


class Range(Section):
    """The smallest and the largest value that was measured."""

    smallest: float = Field(ge=0)
    largest: float = Field(ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.smallest > self.largest:
            raise ValueError(f"smallest {self.smallest:g} is above largest {self.largest:g}")
        return self


class Domain(Section):
    """What was measured; a model has nothing to say for certain outside of it.

    `chunk_tokens` and `decode_batch` are of a step. `context_tokens` is what a prefill token attends to, on average
    over the step (pairs by tokens). `decode_context_tokens` is the sum over the sequences of a step.
    """

    chunk_tokens: Range
    context_tokens: Range
    decode_batch: Range
    decode_context_tokens: Range


class LinkCost(Section):
    """One transfer between two such workers: `latency_s + bytes / bandwidth_bytes_per_s`."""

    latency_s: Seconds
    bandwidth_bytes_per_s: float = Field(gt=0)


class Overheads(Section):
    """Seconds around the steps: of a request before its prefill is queued, of a hand-off, of a token to the client."""

    tokenize_s_per_token: Seconds = 0.0
    request_s: Seconds = 0.0
    handoff_s: Seconds = 0.0
    token_s: Seconds = 0.0


class Slowdown(Section):
    """By which share a step takes longer while all other workers of its machine compute steps of a kind.

    Of prompts, maybe with decodes in them, or of decodes alone: those wait for memory, and leave less of it.
    """

    beside_prefill: float = Field(ge=0)
    beside_decode: float = Field(ge=0)


class Contention(Section):
    """What workers of one machine cost each other: a step with prefill tokens in it, and one that only decodes."""

    prefill: Slowdown
    decode: Slowdown


class Power(Section):
    """Watts of one worker. `idle_w: null` is not known."""

    idle_w: float | None = Field(default=None, ge=0)
    prefill_w: float = Field(ge=0)
    decode_w: float = Field(ge=0)


class Profile(Section):
    """One kind of worker. `num_gpus` is of a worker, 0 on a CPU; `flip_s` is without the drain before it.

    Steps are those of a worker that computes alone; with `contention: null` others do not matter.
    """

    format: int
    name: str = Field(min_length=1)
    model: str = Field(min_length=1)
    hardware: str = Field(min_length=1)
    tensor_parallel_size: int = Field(default=1, ge=1)
    source: Literal["measured", "fitted", "predicted"]
    origin: str
    num_gpus: float = Field(ge=0)
    kv_bytes_per_token: int = Field(ge=1)
    kv_capacity_tokens: int = Field(ge=1)
    max_model_len: int = Field(ge=2)
    prefill: tuple[PrefillRegion, ...] = Field(min_length=1, max_length=MAX_REGIONS)
    decode: tuple[DecodeRegion, ...] = Field(min_length=1, max_length=MAX_REGIONS)
    decode_bend: ContextBend | None = None
    mixed: MixedSteps = MixedSteps()
    domain: Domain
    links: dict[str, LinkCost]
    overheads: Overheads = Overheads()
    contention: Contention | None = None
    startup_s: Seconds
    flip_s: Seconds
    power: Power | None = None
    price_per_gpu_hour: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.format != 1:
            raise ValueError(f"format: {self.format} is not known here; this version reads format 1")
        _check_regions("prefill", [(region.upto_tokens, region.fixed_s) for region in self.prefill])
        _check_regions("decode", [(region.upto_batch, region.fixed_s) for region in self.decode])
        prefill, decode = self.prefill[0], self.decode[0]
        _check_takes_time("prefill", prefill.fixed_s + prefill.per_token_s)
        _check_takes_time("decode", decode.fixed_s + decode.per_sequence_s)
        return self


def load(text: str, name: str) -> Profile:
    """The profile of a file's text; `name` is what messages call the file.

    Raises:
        ConfigError: naming the file and the field.
    """
    if len(text) > MAX_PROFILE_CHARS:
        raise ConfigError(f"{name}: {len(text)} characters are too many for a profile")
    try:
        profile = Profile.model_validate_json(text)
        # Only a file that makes sense otherwise is read again, for what pydantic does not see.
        json.loads(text, object_pairs_hook=unique_keys)
    except ValidationError as error:
        raise ConfigError(f"{name}: {_describe(error)}") from error
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    return profile


def dump(profile: Profile) -> str:
    """The file of a profile; `load` gives an equal one."""
    return profile.model_dump_json(indent=2) + "\n"


def describe_fit(profile: Profile) -> tuple[str, ...]:
    """A line for each region: what it covers and how well it fits."""
    lines = [
        *_region_lines("prefill", "tokens", ((region.upto_tokens, region) for region in profile.prefill)),
        *_region_lines("decode", "sequences", ((region.upto_batch, region) for region in profile.decode)),
    ]
    if (bend := profile.decode_bend) is not None:
        lines.append(
            f"decode, beyond {bend.above_context_tokens:,.0f} tokens of context in a step: "
            f"{bend.extra_s_per_token * 1e6:.3g} us more for each"
        )
    if profile.mixed.num_samples:
        lines.append(f"mixed, overlap {profile.mixed.overlap:.2f}: {_error_words(profile.mixed)}")
    slower = profile.contention
    if slower is not None:
        lines += [_describe_slowdown("prefill", slower.prefill), _describe_slowdown("decode", slower.decode)]
    return tuple(lines)


def _describe_slowdown(steps: str, slower: Slowdown) -> str:
    beside = f"that prefill {slower.beside_prefill:+.0%}, that decode {slower.beside_decode:+.0%}"
    return f"{steps} steps beside workers {beside}"


def region_bounds(above: int, upto: int | None) -> str:
    """The units of a region in words."""
    if upto is None:
        return f"above {above}" if above else "any number of"
    return f"{above + 1} to {upto}"


def _region_lines(phase: str, unit: str, regions: Iterable[tuple[int | None, FitError]]) -> list[str]:
    lines, above = [], 0
    for upto, region in regions:
        lines.append(f"{phase}, {region_bounds(above, upto)} {unit}: {_error_words(region)}")
        above = upto or 0
    return lines


def _error_words(fit: FitError) -> str:
    if fit.median_error is None or fit.p95_error is None:
        return f"error not known ({fit.num_samples} samples)"
    return f"error {fit.median_error:.1%} median, {fit.p95_error:.1%} p95 ({fit.num_samples} samples)"


def _check_regions(phase: str, regions: Sequence[tuple[int | None, float]]) -> None:
    above = 0
    for position, (upto, _) in enumerate(regions):
        if (upto is None) != (position == len(regions) - 1):
            raise ValueError(f"{phase}.{position}: only the last region has no upper bound, and it must have none")
        if upto is not None and upto <= above:
            raise ValueError(f"{phase}.{position}: its upper bound {upto} is not above that of the region before")
        above = upto or above
    if regions[0][1] < 0:
        raise ValueError(f"{phase}.0.fixed_s: {regions[0][1]:g} is negative in the first region")


def _check_takes_time(phase: str, one_s: float) -> None:
    if one_s < LEAST_STEP_S:
        raise ValueError(f"{phase}.0: a step of one token takes no time; give fixed_s a positive value")


def _describe(error: ValidationError) -> str:
    """The first problem as `field.path: what is wrong`, and how many more there are."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    first = problems[0]
    field = ".".join(str(part) for part in first["loc"])
    what = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{field}: {what}{more}" if field else f"{what}{more}"
