"""Seconds of an engine step by a worker's profile. Called for every step.

A step costs `fixed + per_unit * units + per_load * load`, with the coefficients of its region: units are prefill tokens
and load their pairs, or units are sequences and load the sum of their contexts; beyond a bend each unit of the
load may cost more. Time never falls when work grows: a
region answers at least what a smaller one did at its end. In a mixed step the fixed part is paid once, a share
`overlap` of the smaller of the two variable parts hides behind the larger, and `extra_s` comes on top.

Outside of what was measured the formulas go on, and `Extrapolation` says so. Knows neither how the
coefficients were found nor what a scheduler puts into a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from pdserve.cluster.planner.profile import ContextBend, DecodeRegion, Domain, PrefillRegion, Profile, Range, Slowdown
from pdserve.cluster.planner.step_shape import ALONE, Company, StepShape


class Line(NamedTuple):
    """Seconds as a function of the load alone: `fixed_s + per_load_s * load`."""

    fixed_s: float
    per_load_s: float


class Region(NamedTuple):
    """Coefficients for steps of at most `upto` units."""

    upto: float
    fixed_s: float
    per_unit_s: float
    per_load_s: float


class LoadBend(NamedTuple):
    """What lies beyond a load of `above` costs `extra_s` a unit more."""

    above: float = math.inf
    extra_s: float = 0.0


STRAIGHT = LoadBend()


class Phase(dict[int, tuple[Line, ...]]):
    """Prefill or decode: by the number of units, the lines of which the greatest is the step's time.

    The first line is that of the units' own region. The others are ends of smaller regions that may lie above it; with
    coefficients that fit together there are none. Lines are kept for every number of units that was asked for.
    """

    def __init__(self, regions: Iterable[Region], bend: LoadBend = STRAIGHT) -> None:
        self.regions = tuple(regions)
        self.bend = bend
        self.fixed_s = self.regions[0].fixed_s

    def __missing__(self, units: int) -> tuple[Line, ...]:
        ends: list[Line] = []
        for upto, fixed_s, per_unit_s, per_load_s in self.regions:
            own = Line(fixed_s + per_unit_s * min(units, upto), per_load_s)
            ends = [own, *(end for end in ends if end.fixed_s > own.fixed_s or end.per_load_s > own.per_load_s)]
            if units <= upto:
                break
        self[units] = tuple(ends)
        return self[units]

    def seconds(self, units: int, load: float) -> float:
        """Seconds of a step of this phase alone."""
        lines = self[units]
        fixed_s, per_load_s = lines[0]
        seconds = fixed_s + per_load_s * load
        if len(lines) > 1:
            for fixed_s, per_load_s in lines:
                seconds = max(seconds, fixed_s + per_load_s * load)
        above, extra_s = self.bend
        return seconds + extra_s * (load - above) if load > above else seconds


class Mixing(NamedTuple):
    """Puts the phases of a mixed step together: `larger + exposed * (smaller - fixed)`, both over one fixed part."""

    fixed_s: float
    prefill_extra_s: float
    decode_extra_s: float

    def parts(self, prefill_s: float, decode_s: float) -> tuple[float, float]:
        """The larger phase with the fixed part in it, and the variable part of the smaller one."""
        larger = prefill_s + self.prefill_extra_s
        smaller = decode_s + self.decode_extra_s
        if smaller > larger:
            larger, smaller = smaller, larger
        smaller -= self.fixed_s
        return larger, smaller if smaller > 0.0 else 0.0


def mixing(prefill: Phase, decode: Phase) -> Mixing:
    """The larger of the two fixed parts is the one that is paid."""
    fixed_s = max(prefill.fixed_s, decode.fixed_s)
    return Mixing(fixed_s, fixed_s - prefill.fixed_s, fixed_s - decode.fixed_s)


def prefill_phase(regions: Iterable[PrefillRegion]) -> Phase:
    return Phase(Region(_bound(part.upto_tokens), part.fixed_s, part.per_token_s, part.per_pair_s) for part in regions)


def decode_phase(regions: Iterable[DecodeRegion], bend: ContextBend | None = None) -> Phase:
    return Phase(
        (
            Region(_bound(part.upto_batch), part.fixed_s, part.per_sequence_s, part.per_context_token_s)
            for part in regions
        ),
        STRAIGHT if bend is None else LoadBend(bend.above_context_tokens, bend.extra_s_per_token),
    )


def _bound(upto: int | None) -> float:
    return math.inf if upto is None else upto


class StepModel:
    """Durations of steps by a profile: a look-up and a few multiplications a call."""

    def __init__(self, profile: Profile) -> None:
        self._prefill = prefill_phase(profile.prefill)
        self._decode = decode_phase(profile.decode, profile.decode_bend)
        self._mixing = mixing(self._prefill, self._decode)
        self._exposed, self._mixed_extra_s = 1.0 - profile.mixed.overlap, profile.mixed.extra_s
        slower = profile.contention
        self._slower_prefill = _prices(slower.prefill if slower else None)
        self._slower_decode = _prices(slower.decode if slower else None)
        self.name = profile.name
        self.domain = profile.domain
        self.box = _box(profile.domain)

    def duration_s(self, shape: StepShape) -> float:
        """Seconds of one step; an empty one takes none."""
        tokens, pairs, batch, context_tokens = shape
        if not batch:
            return self._prefill.seconds(tokens, pairs) if tokens else 0.0
        decode_s = self._decode.seconds(batch, context_tokens)
        if not tokens:
            return decode_s
        larger, smaller = self._mixing.parts(self._prefill.seconds(tokens, pairs), decode_s)
        return larger + self._exposed * smaller + self._mixed_extra_s

    def contended_s(self, shape: StepShape, company: Company) -> float:
        """Seconds of one step while others on the machine compute."""
        slower = self._slower_prefill if shape.num_prefill_tokens else self._slower_decode
        return self.duration_s(shape) * (1.0 + slower.prefill * company.prefill + slower.decode * company.decode)


def _prices(slower: Slowdown | None) -> Company:
    """What a full house of either kind adds, as a share."""
    return ALONE if slower is None else Company(slower.beside_prefill, slower.beside_decode)


def _box(domain: Domain) -> tuple[float, ...]:
    """The bounds of the domain in a row, to be compared quickly."""
    ranges = (domain.chunk_tokens, domain.context_tokens, domain.decode_batch, domain.decode_context_tokens)
    return tuple(bound for measured in ranges for bound in (measured.smallest, measured.largest))


@dataclass(frozen=True, slots=True)
class Excess:
    """One figure of a step that nobody measured: `limit` is the nearest value that somebody did."""

    what: str
    value: float
    limit: float

    @property
    def is_above(self) -> bool:
        return self.value > self.limit

    def words(self) -> str:
        which = "above the largest" if self.is_above else "below the smallest"
        return f"{self.what} {self.value:,.6g} is {which} measured, {self.limit:,.6g}"


def excesses(domain: Domain, shape: StepShape) -> tuple[Excess, ...]:
    tokens, pairs, batch, context_tokens = shape
    found: list[Excess | None] = []
    if tokens:
        found.append(_excess("prefill tokens", tokens, domain.chunk_tokens))
        found.append(_excess("context of a prefill token", pairs / tokens, domain.context_tokens))
    if batch:
        found.append(_excess("decode batch", batch, domain.decode_batch))
        found.append(_excess("sum of decode contexts", context_tokens, domain.decode_context_tokens))
    return tuple(excess for excess in found if excess is not None)


def _excess(what: str, value: float, measured: Range) -> Excess | None:
    if value > measured.largest:
        return Excess(what, value, measured.largest)
    if value < measured.smallest:
        return Excess(what, value, measured.smallest)
    return None


class Extrapolation:
    """How many of the steps that a simulation took lie outside of what was measured, in what, and how far.

    One counter serves all models of a simulation; its lines name the profile.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_outside = 0
        self._worst: dict[tuple[str, str, bool], tuple[int, Excess]] = {}

    def see(self, model: StepModel, shape: StepShape) -> None:
        """Count one step."""
        self.num_steps += 1
        tokens, pairs, batch, context_tokens = shape
        tokens_from, tokens_to, pairs_from, pairs_to, batch_from, batch_to, context_from, context_to = model.box
        if (not tokens or (tokens_from <= tokens <= tokens_to and pairs_from <= pairs / tokens <= pairs_to)) and (
            not batch or (batch_from <= batch <= batch_to and context_from <= context_tokens <= context_to)
        ):
            return
        self.num_outside += 1
        for excess in excesses(model.domain, shape):
            self._note(model.name, excess)

    def summary(self) -> tuple[str, ...]:
        """A line for each figure that went beyond what was measured, with its farthest value; empty if none did."""
        return tuple(
            f"{name}: {count:,} of {self.num_steps:,} steps ({count / self.num_steps:.1%}): {excess.words()}"
            for (name, _, _), (count, excess) in self._worst.items()
        )

    def _note(self, name: str, excess: Excess) -> None:
        key = (name, excess.what, excess.is_above)
        before, worst = self._worst.get(key, (0, excess))
        is_farther = abs(excess.value - excess.limit) > abs(worst.value - worst.limit)
        self._worst[key] = (before + 1, excess if is_farther else worst)
