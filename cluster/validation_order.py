"""Whether a simulation ranks set-ups as reality does, pair by pair. Pure.

Attainments closer than `TIE` are a tie: neither side's sampling tells them apart. Ties do not carry over (of 50, 48 and
46 % only the ends are apart), so there is no rank to compare but the relation of each pair: it is the same on both
sides, or apart on one side and a tie on the other, or swapped. Knows nothing of how attainments came about.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pdserve.cluster.validation import Comparison

TIE = 0.03
NOISE = 1e-9
"""Of a difference of two shares: 53 less 50 of 100 are three points, not more."""

Relation = Literal[">", "=", "<"]
Kind = Literal["same", "tied", "real_tied", "simulated_tied", "swapped"]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two set-ups; each relation is of the first one's attainment to the second one's."""

    first: str
    second: str
    real: Relation
    simulated: Relation

    @property
    def kind(self) -> Kind:
        if self.real == self.simulated:
            return "tied" if self.real == "=" else "same"
        if self.real == "=":
            return "real_tied"
        return "simulated_tied" if self.simulated == "=" else "swapped"


@dataclass(frozen=True, slots=True)
class Order:
    """The set-ups at one workload and rate. `real` and `simulated` are written, the best first, as `1M = 1P1D > 2M`."""

    workload: str
    rate: float
    real: str
    simulated: str
    pairs: tuple[Pair, ...]

    @property
    def swapped(self) -> tuple[Pair, ...]:
        return tuple(pair for pair in self.pairs if pair.kind == "swapped")

    @property
    def verdict(self) -> str:
        """In words: the same order only where nothing differs and something is apart."""
        differing = [pair for pair in self.pairs if pair.kind not in ("same", "tied")]
        if not differing:
            is_apart = any(pair.kind == "same" for pair in self.pairs)
            return "the same order" if is_apart else f"no order: all within {TIE * 100:g} points"
        words = "; ".join(_difference(pair) for pair in differing)
        num_alike = len(self.pairs) - len(differing)
        return words if len(self.pairs) == 1 else f"{words}; {num_alike} of {len(self.pairs)} pairs alike"


def orders(comparisons: Iterable[Comparison]) -> tuple[Order, ...]:
    """One for each workload and rate that more than one set-up was measured at."""
    groups: dict[tuple[str, float], list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault((comparison.point.workload, comparison.point.rate), []).append(comparison)
    return tuple(_order(*key, group) for key, group in groups.items() if len(group) > 1)


def _order(workload: str, rate: float, group: Sequence[Comparison]) -> Order:
    real = {one.point.setup: one.attainment.real or 0.0 for one in group}
    simulated = {one.point.setup: one.attainment.simulated or 0.0 for one in group}
    pairs = (
        Pair(first, second, _relation(real, first, second), _relation(simulated, first, second))
        for first, second in itertools.combinations(real, 2)
    )
    return Order(workload, rate, _written(real), _written(simulated), tuple(pairs))


def _relation(attainments: Mapping[str, float], first: str, second: str) -> Relation:
    gap = attainments[first] - attainments[second]
    if abs(gap) < TIE - NOISE:
        return "="
    return ">" if gap > 0 else "<"


def _written(attainments: Mapping[str, float]) -> str:
    """Between neighbours. Where a row of ties has ends that are apart, that is said of them in brackets."""
    text, apart = "", []
    for row in _rows(attainments):
        ends = [pair for pair in itertools.combinations(row, 2) if _relation(attainments, *pair) != "="]
        if not ends:  # equal ones in the order in which they were asked for, whatever their last digits say
            row = sorted(row, key=list(attainments).index)
        apart += [f"{better} > {worse}" for better, worse in ends]
        text += (" > " if text else "") + " = ".join(row)
    return f"{text} (but {', '.join(apart)})" if apart else text


def _rows(attainments: Mapping[str, float]) -> Iterator[list[str]]:
    """The set-ups from best to worst, cut wherever two neighbours are apart."""
    ranked = sorted(attainments, key=lambda setup: -attainments[setup])
    row = ranked[:1]
    for before, setup in itertools.pairwise(ranked):
        if _relation(attainments, before, setup) != "=":
            yield row
            row = []
        row.append(setup)
    yield row


def _difference(pair: Pair) -> str:
    names = f"{pair.first} and {pair.second}"
    real, simulated = (_apart(pair, relation) for relation in (pair.real, pair.simulated))
    if pair.kind == "swapped":
        return f"{names} swapped: real {real}, simulated {simulated}"
    if pair.kind == "real_tied":
        return f"real cannot tell {names} apart, simulated {simulated}"
    return f"simulated cannot tell {names} apart, real {real}"


def _apart(pair: Pair, relation: Relation) -> str:
    return f"{pair.second} > {pair.first}" if relation == "<" else f"{pair.first} > {pair.second}"
