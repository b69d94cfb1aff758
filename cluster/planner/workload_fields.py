"""The fields that workloads are written with, each with a short form for the command line.

Frozen, unknown keys refused. A short form is turned into the long one before anything is checked, so both are held to
the same rules. Knows no kind of workload and reads no file.

    percentiles   1024 | 1020/2734                        constant, or lognormal through p50 and p90
    arrivals      poisson | gamma:CV | deterministic | onoff:ON_S:OFF_S:RATIO
    diurnal       AMPLITUDE:PERIOD_S[:PHASE]
    prefixes      2048 | 2048x10 | 1024,2048              system prompts by their tokens, most frequent first
    classes       chat:0.8,batch:0.2                      weights
    lengths       a trace's path                          pairs of lengths sampled from it
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from pdserve.cluster.planner import processes
from pdserve.cluster.planner.lengths import Pair
from pdserve.cluster.planner.processes import CHUNK, Segment
from pdserve.cluster.planner.sessions import TrafficClass
from pdserve.cluster.planner.trace_sample import load_lengths
from pdserve.cluster.trace import TraceOptions, parse_window

MAX_SHARED_PROMPTS = 100_000


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Positive: TypeAlias = Annotated[float, Field(gt=0)]
Moment: TypeAlias = Annotated[float, Field(ge=1e-3, le=1e9)]
Period: TypeAlias = Annotated[float, Field(ge=1, le=1e9)]
"""Bounds keep a run finite: a process that changes a billion times a second never gets anywhere."""


def _anchored(value: Any, info: ValidationInfo) -> Any:
    """A relative path is taken from the folder of the file that names it."""
    folder = (info.context or {}).get("folder")
    return Path(folder) / Path(value).expanduser() if folder is not None and isinstance(value, str) else value


def _without(value: Any) -> Any:
    """An empty path is a mistake, not the current folder."""
    if value in ("", Path()):
        raise ValueError("names no file; give the path of a trace")
    return value


def _window_text(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) == 2:
        return f"{value[0]}:{value[1]}"
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not START:END in seconds; in YAML write it in quotes")
    return value


TracePath: TypeAlias = Annotated[Path, BeforeValidator(_anchored), BeforeValidator(_without)]
WindowText: TypeAlias = Annotated[str, BeforeValidator(_window_text)]


class TraceFile(Section):
    """A trace, or a window of it. All times are of the trace.

    Coarse stamps stand for `spread_s` seconds, over which their requests are spread: at random, or evenly.
    """

    path: TracePath
    window: WindowText = ":"
    spread_s: float = Field(default=3.0, ge=0)
    spread: Literal["random", "even"] = "random"
    length_scale: Positive = 1.0

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _check_window(self) -> TraceFile:
        parse_window(self.window)
        return self

    @property
    def options(self) -> TraceOptions:
        return TraceOptions(
            window_s=parse_window(self.window),
            spread_s=self.spread_s,
            length_scale=self.length_scale,
            jitter=self.spread == "random",
        )

    def pairs(self, random: np.random.Generator) -> Iterator[Pair]:
        return load_lengths(self.path, self.options).pairs(random)


class Percentiles(Section):
    """A lognormal distribution by its 50th and 90th percentiles; equal ones make it a constant."""

    p50: Positive
    p90: Positive

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str):
            p50, _, p90 = value.partition("/")
            return {"p50": p50, "p90": p90 or p50}
        return {"p50": value, "p90": value} if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _ordered(self) -> Percentiles:
        if self.p90 < self.p50:
            raise ValueError(f"p90 {self.p90:g} is below p50 {self.p50:g}")
        return self


class ArrivalProcess(Section):
    """When requests come, but for their rate. Each process has its own parameters and takes no other's."""

    process: Literal["poisson", "gamma", "deterministic", "onoff"] = "poisson"
    cv: float | None = Field(default=None, gt=0, le=100)
    mean_on_s: Moment | None = None
    mean_off_s: Moment | None = None
    ratio: float | None = Field(default=None, ge=1, allow_inf_nan=True)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        process, *parameters = value.split(":")
        names = {"gamma": ["cv"], "onoff": ["mean_on_s", "mean_off_s", "ratio"]}.get(process, [])
        if len(parameters) > len(names):
            raise ValueError(f"{value!r} has too many parameters; {process} takes {':'.join(names) or 'none'}")
        return {"process": process, **dict(zip(names, parameters, strict=False))}

    @model_validator(mode="after")
    def _complete(self) -> ArrivalProcess:
        wanted = {"gamma": {"cv"}, "onoff": {"mean_on_s", "mean_off_s", "ratio"}}.get(self.process, set())
        given = {name for name in ("cv", "mean_on_s", "mean_off_s", "ratio") if getattr(self, name) is not None}
        if missing := sorted(wanted - given):
            raise ValueError(f"{self.process} needs {', '.join(missing)}")
        if excess := sorted(given - wanted):
            raise ValueError(f"{', '.join(excess)} has no meaning for {self.process}; leave it out")
        return self

    def units(self, random: np.random.Generator) -> Iterator[float]:
        """Moments at a mean rate of 1."""
        if self.process == "deterministic":
            return processes.deterministic()
        return processes.gamma(self.cv, random) if self.cv is not None else processes.poisson(random)

    def phases(self, random: np.random.Generator) -> Iterator[Segment] | None:
        """Factors on the rate, if it has any."""
        if self.mean_on_s is None or self.mean_off_s is None or self.ratio is None:
            return None
        return processes.on_off(self.mean_on_s, self.mean_off_s, self.ratio, random)


class Diurnal(Section):
    """A slow sine on the rate; `phase` is the part of the period that is over at the start."""

    amplitude: float = Field(gt=0, le=1)
    period_s: Period = 86_400.0
    phase: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str):
            return dict(zip(("amplitude", "period_s", "phase"), value.split(":", 2), strict=False))
        return {"amplitude": value} if isinstance(value, int | float) else value

    def segments(self, scale: float = 1.0) -> Iterator[Segment]:
        """With another period, `scale` times as long, for those who cannot wait for a day."""
        return processes.sine(self.amplitude, self.period_s * scale, self.phase)


class SharedPrompts(Section):
    """System prompts before what the user says, the k-th with weight k^-zipf; `share` of requests have one."""

    tokens: tuple[Annotated[int, Field(ge=1, le=10_000_000)], ...] = Field(min_length=1, max_length=MAX_SHARED_PROMPTS)
    zipf: float = Field(default=1.0, ge=0, le=10)
    share: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, int):
            return {"tokens": (value,)}
        if not isinstance(value, str):
            return value
        tokens, times, count = value.partition("x")
        if not times:
            return {"tokens": tuple(value.split(","))}
        if not count.isdecimal() or not 0 < int(count) <= MAX_SHARED_PROMPTS:
            raise ValueError(f"{value!r} is not TOKENSxPROMPTS; write 2048x10 for 10 prompts of 2048 tokens")
        return {"tokens": (tokens,) * int(count)}


class ClassShare(Section):
    """A class of requests by its share of them."""

    weight: Positive
    priority: int = 0
    tenant: str | None = None


def _class_shares(value: Any) -> Any:
    if isinstance(value, str):
        value = dict(part.partition(":")[::2] for part in value.split(","))
    if not isinstance(value, dict):
        return value
    return {name: share if isinstance(share, dict | ClassShare) else {"weight": share} for name, share in value.items()}


Classes: TypeAlias = Annotated[dict[str, ClassShare], BeforeValidator(_class_shares)]


def class_draws(classes: dict[str, ClassShare], random: np.random.Generator) -> Iterator[TrafficClass]:
    """The class of each request; without classes it is nobody's."""
    if not classes:
        yield from itertools.repeat(TrafficClass())
    known = [TrafficClass(name, share.priority, share.tenant) for name, share in classes.items()]
    edges = np.cumsum([share.weight for share in classes.values()])
    while True:
        drawn = np.searchsorted(edges[:-1], random.random(CHUNK) * edges[-1], side="right")
        yield from (known[choice] for choice in drawn.tolist())
