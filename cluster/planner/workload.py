"""Workloads: what a plan is made for, written as one line or in YAML, and asked for requests at any rate by any seed.

    workload = parse_workload("trace:/data/conv.csv?window=600:1200")
    source = workload.source(rate=12.0, seed=3, num_requests=3000)

Besides the kinds of `workload_kinds` there are two that are made of them: a `mix` of several at once, and a `scenario`
of pieces that follow each other. These do not nest. Reads no YAML: `cluster.workload_files` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import ErrorDetails

from pdserve.cluster.planner.drift import Span, envelope, mean_rate
from pdserve.cluster.planner.source import Merged, Source
from pdserve.cluster.planner.workload_fields import Positive, Section
from pdserve.cluster.planner.workload_kinds import Conversations, Replayed, Synthetic
from pdserve.cluster.planner.workload_spec import Demand, WorkloadSpec
from pdserve.cluster.planner.workload_text import KINDS, as_mapping
from pdserve.proto.errors import ConfigError

MAX_PARTS = 100

Traffic: TypeAlias = Annotated[
    Annotated[Synthetic | Replayed | Conversations, Field(discriminator="kind")], BeforeValidator(as_mapping)
]


class Within(Section):
    """Traffic that belongs to a mix or a scenario."""

    workload: Traffic

    @model_validator(mode="after")
    def _no_course_of_its_own(self) -> Self:
        if self.workload.whole_course:
            raise ValueError("whole_course is of the mix or scenario as a whole; write it there")
        return self


class Part(Within):
    """One of several kinds of traffic at once."""

    share: Positive | None = None


class Mix(WorkloadSpec):
    """Several at once. `share` is of the requests; without shares each part comes at its own rate."""

    kind: Literal["mix"] = "mix"
    parts: tuple[Part, ...] = Field(min_length=1, max_length=MAX_PARTS)

    @model_validator(mode="after")
    def _shares(self) -> Mix:
        if len({part.share is None for part in self.parts}) > 1:
            raise ValueError("some parts have a share and some have not; give all of them one, or none")
        return self

    def own_rate(self) -> float | None:
        if self.rate is not None or self.parts[0].share is not None:
            return super().own_rate()
        return math.fsum(self._weights()) * self.rate_scale

    def slo_classes(self) -> frozenset[str | None]:
        return frozenset[str | None]().union(*(part.workload.slo_classes() for part in self.parts))

    def drift_s(self) -> float:
        return max(part.workload.drift_s() for part in self.parts)

    def course_s(self, rate: float) -> float:
        weights = self._weights()
        rates = (rate * weight / math.fsum(weights) for weight in weights)
        return max(part.workload.course_s(rate) for part, rate in zip(self.parts, rates, strict=True))

    def shares_prefixes(self) -> bool:
        return any(part.workload.shares_prefixes() for part in self.parts)

    def build(self, demand: Demand) -> Source:
        weights = self._weights()
        built = []
        for number, (part, weight) in enumerate(zip(self.parts, weights, strict=True)):
            share = weight / math.fsum(weights)
            built.append(part.workload.build(demand.part(number, demand.rate * share, share)))
        return Merged(built)

    def _weights(self) -> list[float]:
        return [part.share or _known_rate(part.workload, f"parts.{n}") for n, part in enumerate(self.parts)]


class Piece(Within):
    """A stretch of a scenario. Its `rate` is by default the workload's own."""

    duration_s: Positive
    rate: Positive | None = None


class Scenario(WorkloadSpec):
    """Pieces that follow each other, over and over, fading into each other during `fade_s`.

    Its rate is the mean over all pieces: another one scales every piece's rate and leaves their durations alone.
    Sessions of a piece that is over go on until they end, and a piece of sessions begins with none.
    """

    kind: Literal["scenario"] = "scenario"
    pieces: tuple[Piece, ...] = Field(min_length=1, max_length=MAX_PARTS)
    fade_s: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _room_to_fade(self) -> Scenario:
        shortest_s = min(piece.duration_s for piece in self.pieces)
        if self.fade_s > shortest_s:
            raise ValueError(f"fade_s {self.fade_s:g} is longer than the shortest piece, {shortest_s:g} s")
        return self

    def own_rate(self) -> float:
        return (self.rate or mean_rate(self._spans())) * self.rate_scale

    def slo_classes(self) -> frozenset[str | None]:
        return frozenset[str | None]().union(*(piece.workload.slo_classes() for piece in self.pieces))

    def drift_s(self) -> float:
        return math.fsum(piece.duration_s for piece in self.pieces)

    def shares_prefixes(self) -> bool:
        return any(piece.workload.shares_prefixes() for piece in self.pieces)

    def build(self, demand: Demand) -> Source:
        spans = self._spans()
        factor = demand.rate / mean_rate(spans)
        scaled = [Span(span.duration_s * demand.drift_scale, span.rate * factor) for span in spans]
        total = math.fsum(span.duration_s * span.rate for span in spans)
        built = []
        for number, (piece, span) in enumerate(zip(self.pieces, scaled, strict=True)):
            share = spans[number].duration_s * spans[number].rate / total
            course = envelope(scaled, number, self.fade_s * demand.drift_scale)
            built.append(piece.workload.build(demand.part(number, span.rate, share, course)))
        return Merged(built)

    def _spans(self) -> list[Span]:
        return [
            Span(piece.duration_s, piece.rate or _known_rate(piece.workload, f"pieces.{number}"))
            for number, piece in enumerate(self.pieces)
        ]


_ANY: TypeAdapter[WorkloadSpec] = TypeAdapter(
    Annotated[
        Annotated[Synthetic | Replayed | Conversations | Mix | Scenario, Field(discriminator="kind")],
        BeforeValidator(as_mapping),
    ]
)


def parse_workload(written: str | Mapping[str, Any], folder: Path | None = None) -> WorkloadSpec:
    """A workload from one line, or from what was read from YAML in `folder`, from which its paths are taken.

    Raises:
        ConfigError: naming the field and what is wrong with it. Traces are not opened yet.
    """
    value = written if isinstance(written, str) else dict(written)
    try:
        return _ANY.validate_python(value, context={"folder": folder})
    except ValidationError as error:
        raise ConfigError(f"workload: {_explained(error)}") from error


def _known_rate(workload: WorkloadSpec, where: str) -> float:
    rate = workload.own_rate()
    if rate is None:
        raise ConfigError(f"workload: {where}.workload.rate: is not known; add it to that workload")
    return rate


def _explained(error: ValidationError) -> str:
    """The first problem as `field: what is wrong`, and how many more there are."""
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    # The union's tags are no fields: `pieces.0.workload.trace.path` is written `pieces.0.workload.path`.
    place = [str(part) for part in first["loc"] if part not in KINDS]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{'.'.join(place)}{': ' if place else ''}{_problem(first)}{more}"


def _problem(error: ErrorDetails) -> str:
    kinds = ", ".join(KINDS)
    if error["type"] == "extra_forbidden":
        return "unknown key"
    if error["type"] == "union_tag_not_found":
        return f"kind: is missing; one of {kinds}, or give a preset"
    if error["type"] == "union_tag_invalid":
        return f"kind: is none of {kinds}; parts and pieces are of the first three"
    given = error["input"]
    shown = f" (given {given!r})" if isinstance(given, str | int | float) and error["type"] != "value_error" else ""
    return error["msg"].removeprefix("Value error, ") + shown
