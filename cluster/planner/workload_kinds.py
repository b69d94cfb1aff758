"""Kinds of traffic, as they are written and as sources of requests: synthetic, a trace, conversations.

All of them take the same steps: operational times, what comes at each, the pace that makes seconds of them, the cut to
the context, the class.

Traces are opened by `cluster.trace`; nothing here reads a file itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Literal

from pydantic import Field, model_validator

from pdserve.cluster.arrivals import HASH_BLOCK_TOKENS, Arrival, fit_lengths
from pdserve.cluster.planner.lengths import Pair, token_counts
from pdserve.cluster.planner.prefixes import SharedPrompt, chosen_prompts, shared_prompts
from pdserve.cluster.planner.processes import Pace, Segment, constant, product
from pdserve.cluster.planner.sessions import Habits, Script, ScriptWriter, Sessions, TrafficClass, found_sessions
from pdserve.cluster.planner.source import OpenLoop, Source
from pdserve.cluster.planner.trace_rows import MAX_COPIES, Course, trace_rows
from pdserve.cluster.planner.trace_sample import TraceSample, load_sample
from pdserve.cluster.planner.workload_fields import (
    ArrivalProcess,
    Classes,
    Diurnal,
    Percentiles,
    Positive,
    SharedPrompts,
    TraceFile,
    class_draws,
)
from pdserve.cluster.planner.workload_spec import Demand, Stream, WorkloadSpec
from pdserve.cluster.trace import Row
from pdserve.proto.errors import ConfigError


class Kind(WorkloadSpec):
    """What is not made of others."""

    classes: Classes = Field(default_factory=dict)
    diurnal: Diurnal | None = None

    def slo_classes(self) -> frozenset[str | None]:
        return frozenset(self.classes) or frozenset({None})

    def drift_s(self) -> float:
        return self.diurnal.period_s if self.diurnal else 0.0

    def _segments(self, demand: Demand, phases: Iterator[Segment] | None = None) -> Iterator[Segment]:
        """The rate over time: the demand's, times phases of its own, times the time of day."""
        found = constant(demand.rate) if demand.envelope is None else demand.envelope
        day = self.diurnal.segments(demand.drift_scale) if self.diurnal else None
        for factor in (phases, day):
            found = found if factor is None else product(found, factor)
        return found

    def _max_model_len(self, demand: Demand) -> int | None:
        known = [limit for limit in (self.max_model_len, demand.max_model_len) if limit is not None]
        return min(known, default=None)

    def _open_loop(self, rows: Iterator[Row], demand: Demand, segments: Iterator[Segment]) -> OpenLoop:
        classes = class_draws(self.classes, demand.random(Stream.CLASSES)) if self.classes else None
        return OpenLoop(_arrivals(rows, Pace(segments), classes, self._max_model_len(demand)))


def _arrivals(
    rows: Iterator[Row], pace: Pace, classes: Iterator[TrafficClass] | None, max_model_len: int | None
) -> Iterator[Arrival]:
    """Rows at the pace's times, cut to the context, each for somebody."""
    at_s = pace.at_s
    for unit, prompt, output, prefix_ids in rows:
        if max_model_len is not None and prompt + output > max_model_len:
            prompt, output = fit_lengths(prompt, output, max_model_len)
            prefix_ids = prefix_ids[: -(-prompt // HASH_BLOCK_TOKENS)]
        if classes is None:
            yield Arrival(at_s(unit), prompt, output, prefix_ids)
        else:
            who = next(classes)
            yield Arrival(at_s(unit), prompt, output, prefix_ids, who.name, who.priority, who.tenant)


class Drawn(Kind):
    """Traffic whose requests are drawn: lengths independently, or as pairs from a trace."""

    prompt: Percentiles | None = None
    output: Percentiles | None = None
    lengths: TraceFile | None = None
    arrivals: ArrivalProcess = ArrivalProcess()
    prefixes: SharedPrompts | None = None

    @model_validator(mode="after")
    def _one_way_to_draw(self) -> Drawn:
        if self.lengths is not None and (self.prompt or self.output):
            raise ValueError("lengths already gives prompt and output; leave those out")
        if self.lengths is None and (self.prompt is None or self.output is None):
            raise ValueError("give prompt and output (tokens, or P50/P90), or lengths (a trace to sample both from)")
        return self

    def shares_prefixes(self) -> bool:
        return self.prefixes is not None

    def _pairs(self, demand: Demand, *purpose: int) -> Iterator[Pair]:
        randoms = [demand.random(stream, *purpose) for stream in (Stream.PROMPTS, Stream.OUTPUTS)]
        if self.lengths is not None:
            return self.lengths.pairs(randoms[0])
        assert self.prompt is not None
        assert self.output is not None
        sides = zip((self.prompt, self.output), randoms, strict=True)
        prompts, outputs = (token_counts(side.p50, side.p90, random) for side, random in sides)
        return zip(prompts, outputs, strict=True)

    def _systems(self, demand: Demand, *purpose: int) -> Iterator[SharedPrompt | None]:
        if self.prefixes is None:
            return repeat(None)
        known = shared_prompts(self.prefixes.tokens, demand.namespace)
        random = demand.random(Stream.PREFIXES, *purpose)
        return chosen_prompts(known, self.prefixes.zipf, self.prefixes.share, random)

    def _times(self, demand: Demand) -> tuple[Iterator[float], Iterator[Segment]]:
        """Operational times, and the rate over time."""
        phases = self.arrivals.phases(demand.random(Stream.PHASES))
        return self.arrivals.units(demand.random(Stream.TIMES)), self._segments(demand, phases)


class Synthetic(Drawn):
    """An open loop: independent requests, each after the system prompt that it may have."""

    kind: Literal["synthetic"] = "synthetic"

    def build(self, demand: Demand) -> Source:
        units, segments = self._times(demand)
        pairs = self._pairs(demand)
        if self.prefixes is None:
            rows: Iterator[Row] = ((unit, *pair, ()) for unit, pair in zip(units, pairs, strict=True))
        else:
            rows = _after_systems(units, pairs, self._systems(demand))
        return self._open_loop(rows, demand, segments)


def _after_systems(
    units: Iterator[float], pairs: Iterator[Pair], systems: Iterator[SharedPrompt | None]
) -> Iterator[Row]:
    for unit, (prompt, output), system in zip(units, pairs, systems, strict=True):
        if system is None:
            yield unit, prompt, output, ()
        else:
            yield unit, system.num_tokens + prompt, output, system.prefix_ids


class Conversations(Drawn):
    """A closed loop: `prompt` is a user's message, `output` the answer, and a turn's prompt all that was said so far.

    `arrivals` are those of the sessions. `think_s` passes between an answer and the next message.
    """

    kind: Literal["sessions"] = "sessions"
    turns: Literal["geometric", "fixed"] = "geometric"
    mean_turns: float = Field(default=5.0, ge=1, le=10_000)
    think_s: Percentiles = Percentiles(p50=10.0, p90=60.0)

    @model_validator(mode="after")
    def _whole_turns(self) -> Conversations:
        if self.turns == "fixed" and self.mean_turns != round(self.mean_turns):
            raise ValueError(f"mean_turns {self.mean_turns:g} is not a whole number; fixed turns need one")
        return self

    def shares_prefixes(self) -> bool:
        return True

    def build(self, demand: Demand) -> Source:
        units, segments = self._times(demand)
        pace = Pace((seconds, rate / self.mean_turns) for seconds, rate in segments)
        habits = Habits(self.turns, self.mean_turns, self.think_s.p50, self.think_s.p90)
        found: Iterable[tuple[float, Script]] = ()
        if demand.begins_steady:
            random, writer = demand.random(Stream.FOUND), self._writer(habits, demand, Stream.FOUND)
            found = found_sessions(habits, demand.rate / self.mean_turns, writer, random)
        return Sessions(
            map(pace.at_s, units),
            self._writer(habits, demand),
            found=found,
            namespace=demand.namespace,
            max_model_len=self._max_model_len(demand),
        )

    def _writer(self, habits: Habits, demand: Demand, *purpose: int) -> ScriptWriter:
        classes = class_draws(self.classes, demand.random(Stream.CLASSES, *purpose))
        turns = demand.random(Stream.TURNS, *purpose)
        return ScriptWriter(habits, self._pairs(demand, *purpose), self._systems(demand, *purpose), classes, turns)


class Replayed(Kind, TraceFile):
    """A trace's own times, lengths and prefix ids, at its own rate or another; see `trace_rows` for the choices.

    `order` is by default `resample`, and `rotate` for a trace with prefix ids, whose reuse resampling would lose.
    `scaling` says what meets another rate: faster time, or a larger or smaller population on the trace's clock.
    Copies of a population start within `shift_s` of each other, by default anywhere in the trace.
    """

    kind: Literal["trace"] = "trace"
    order: Literal["replay", "rotate", "resample"] | None = None
    scaling: Literal["time", "population"] = "time"
    shift_s: Positive | None = None

    @model_validator(mode="after")
    def _shifted_copies(self) -> Replayed:
        if self.shift_s is not None and self.scaling != "population":
            raise ValueError("shift_s needs scaling=population: copies of the trace are what it shifts")
        return self

    def sample(self) -> TraceSample:
        return load_sample(self.path, self.options)

    def own_rate(self) -> float:
        return (self.rate or 1 / self.sample().mean_gap_s) * self.rate_scale

    def shares_prefixes(self) -> bool:
        return self.sample().has_prefixes

    def course_s(self, rate: float) -> float:
        sample = self.sample()
        if self._order(sample) != "replay":
            return super().course_s(rate)
        faster = rate * sample.mean_gap_s if self.scaling == "time" else 1.0
        return max(super().course_s(rate), sample.num_requests * sample.mean_gap_s / faster)

    def _order(self, sample: TraceSample) -> Literal["replay", "rotate", "resample"]:
        return self.order or ("rotate" if sample.has_prefixes else "resample")

    def build(self, demand: Demand) -> Source:
        sample = self.sample()
        course = Course(
            self._order(sample),
            population=1.0 if self.scaling == "time" else demand.rate * sample.mean_gap_s,
            shift_s=self.shift_s or math.inf,
            num_requests=demand.num_requests,
            namespace=demand.namespace,
        )
        if course.num_copies > MAX_COPIES:
            raise ConfigError(
                f"workload: rate: {demand.rate:g} per second needs {course.num_copies} copies of the trace, "
                f"more than {MAX_COPIES}; use scaling=time"
            )
        rows = trace_rows(sample, course, lambda *purpose: demand.random(Stream.COURSE, *purpose))
        return self._open_loop(rows, demand, self._segments(demand))
