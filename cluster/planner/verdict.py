"""To split or not: one sentence from all findings, and the reasons behind it.

Splitting has a price (two kinds of workers, a hand-off, more to go wrong), so it has to be better for certain: the 95 %
interval of the ratio of goodputs, best split over best colocated, must lie above one. Intervals are added up as
squares on a logarithmic scale, as if the runs were independent. They see the same requests as far as their rates allow,
which moves both goodputs alike: the ratio's interval is rather too wide than too narrow. Knows nothing of how set-ups
were chosen or shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.cluster.planner.findings import Finding, Target, at
from pdserve.cluster.planner.goodput import COMPLETION, Goodput
from pdserve.cluster.planner.misses import why_missed
from pdserve.cluster.planner.picture import PHASES
from pdserve.proto.types import Role

UNKNOWN = 1.0
"""Half of an interval's logarithm, where there is no interval."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `Answer` has of the same names."""

    verdict: str
    reasons: tuple[str, ...]
    best_split: int | None
    best_colocated: int | None
    plateau: tuple[str, ...]
    recommended: int | None


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of two goodputs, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def words(self) -> str:
        return f"{self.value:.2f} times ({self.low:.2f} to {self.high:.2f})"


def ratio(one: Goodput, other: Goodput) -> Ratio:
    """Both have a rate."""
    half = math.hypot(_half(one), _half(other))
    value = one.rate / other.rate
    return Ratio(value, value * math.exp(-half), value * math.exp(half))


def _half(goodput: Goodput) -> float:
    is_known = goodput.low > 0 and goodput.high < math.inf
    return math.log(goodput.high / goodput.low) / 2 if is_known else UNKNOWN


def decide(
    findings: Sequence[Finding],
    nearest: Sequence[tuple[Target, ...]],
    targets: Sequence[Target],
    failures: Sequence[str] = (),
) -> Verdict:
    """`findings` are best first; `nearest` are for each the targets that it could just meet where it was looked at, and
    `failures` why requests failed there, if they did."""
    split = next((index for index, one in enumerate(findings) if one.setup.is_split), None)
    colocated = next((index for index, one in enumerate(findings) if not one.setup.is_split), None)
    if not any(one.goodput.rate > 0 for one in findings):
        verdict = _nothing(findings, nearest, targets, failures)
        return Verdict(verdict, _closest(findings, nearest, failures), split, colocated, (), None)
    best = max((index for index in (split, colocated) if index is not None), key=lambda i: findings[i].goodput.rate)
    verdict, reasons, recommended = _compared(findings, split, colocated)
    plateau = _plateau(findings, findings[best])
    reasons += _where_time_goes([findings[index] for index in (split, colocated) if index is not None])
    if len(plateau) > 1:
        reasons.append(f"the choice is not sharp: {', '.join(plateau)} cannot be told apart")
    reasons += _worst_split(findings)
    return Verdict(verdict, tuple(reasons), split, colocated, plateau, recommended)


def _compared(findings: Sequence[Finding], split: int | None, colocated: int | None) -> tuple[str, list[str], int]:
    """The verdict, the reasons for it and which of the two to run."""
    if split is None or colocated is None:
        only = findings[0]
        kind = "splits were" if colocated is None else "colocated set-ups were"
        return f"{_serves(only)}; no other than {kind} tried.", [], 0
    one, other = findings[split], findings[colocated]
    if not other.goodput.rate:
        why = f"{other.setup.name}: {other.goodput.reason}"
        return f"Split: {_serves(one)}; {_cannot('colocated workers', other)}.", [why], split
    if not one.goodput.rate:
        why = f"{one.setup.name}: {one.goodput.reason}"
        return f"Do not split: {_serves(other)}; {_cannot('splits', one)}.", [why], colocated
    times = ratio(one.goodput, other.goodput)
    reasons = [f"best split: {_serves(one)}", f"best colocated: {_serves(other)}"]
    if times.low > 1:
        sizes = f"{times.words} the goodput of the best colocated set-up, {other.setup.name}"
        return f"Split: {one.setup.name} has {sizes}.", reasons, split
    if times.high < 1:
        inverse = Ratio(1 / times.value, 1 / times.high, 1 / times.low)
        words = f"{other.setup.name} has {inverse.words} the goodput of the best split"
        return f"Do not split: {words}.", reasons, colocated
    reasons.append("a split has to be better for certain, as it is more to run and to go wrong")
    why = f"{one.setup.name} is not surely better than {other.setup.name}; it has {times.words} its goodput"
    return f"Do not split: {why}.", reasons, colocated


def _cannot(who: str, finding: Finding) -> str:
    if finding.goodput.failing:
        return f"{who} cannot hold the targets at any rate"
    return f"for {who} no rate that holds the targets was found with as many requests as may be simulated"


def _serves(finding: Finding) -> str:
    goodput = finding.goodput
    return (
        f"{finding.setup.name} serves {goodput.rate:.3g} requests/s ({goodput.low:.3g} to {goodput.high:.3g}), "
        f"{goodput.rate / finding.setup.num_gpus:.3g} per GPU"
    )


def _plateau(findings: Sequence[Finding], best: Finding) -> tuple[str, ...]:
    """Of those that were looked at closely."""
    close = [one for one in findings if one.is_refined and one.goodput.rate > 0]
    names = [one.setup.name for one in close if one is best or ratio(one.goodput, best.goodput).high >= 1]
    return tuple(dict.fromkeys([best.setup.name, *names]))


def _where_time_goes(findings: Sequence[Finding]) -> list[str]:
    """For each: what a request waits for at the goodput, and which phase makes requests miss."""
    lines = []
    for finding in findings:
        picture = finding.picture
        if picture is None or not picture.phases:
            continue
        phases = {phase.name: phase for phase in picture.phases}
        parts = [f"{phases[name].mean_ms:,.0f} ms {name}" for name in PHASES if name in phases]
        token = f", {at(picture.tpot_ms, 0.5):.3g} ms a token" if picture.tpot_ms else ""
        lines.append(f"{finding.setup.name} at {picture.rate:.3g}/s, a mean request: {', '.join(parts)}{token}")
        lines.append(why_missed(finding))
    return [line for line in lines if line]


def _worst_split(findings: Sequence[Finding]) -> list[str]:
    """By how much a wrong guess of a static split costs."""
    plain = [one for one in findings if one.setup.is_split and Role.MIXED not in one.setup.num_workers]
    if len(plain) < 2:
        return []
    best, worst = (pick(plain, key=lambda one: one.goodput.rate) for pick in (max, min))
    if not worst.goodput.rate:
        return [f"the worst static split is {worst.setup.name}: {_cannot('it', worst)}"]
    times = best.goodput.rate / worst.goodput.rate
    return [f"the worst static split, {worst.setup.name}, serves {times:.1f} times less than {best.setup.name}"]


def _nothing(
    findings: Sequence[Finding],
    nearest: Sequence[tuple[Target, ...]],
    targets: Sequence[Target],
    failures: Sequence[str],
) -> str:
    """That no set-up does, and what would."""
    known = [_asked_and_near(targets, near) for near in nearest if _can_be_met(near)]
    closest = f"; the closest that can be met: {known[0]}" if known else ""
    failing = list(dict.fromkeys(one.goodput.failing for one in findings if one.goodput.failing))
    if not failing:
        return (
            "For no set-up a rate that holds the targets was found with as many requests as may be simulated; "
            f"--effort thorough or --max-requests looks longer{closest}."
        )
    why = next((words for words in failures if words), "") if COMPLETION in failing[0] else ""
    return f"No set-up can hold the targets at any rate: {failing[0]} fails{f' ({why})' if why else ''}{closest}."


def _can_be_met(near: Sequence[Target]) -> bool:
    return bool(near) and all(math.isfinite(one.ttft_ms) and math.isfinite(one.tpot_ms) for one in near)


def _asked_and_near(targets: Sequence[Target], nearest: Sequence[Target]) -> str:
    parts = []
    for asked, near in zip(targets, nearest, strict=True):
        name = f"{asked.name}: " if len(targets) > 1 else ""
        for what, wanted, found in (("TTFT", asked.ttft_ms, near.ttft_ms), ("TPOT", asked.tpot_ms, near.tpot_ms)):
            if found > wanted:
                parts.append(f"{name}{what} {_up(found)} ms instead of {wanted:g} ms for {asked.share:.0%}")
    return " and ".join(parts) or "the targets themselves, just"


def _up(value_ms: float) -> str:
    """Rounded up to two digits: what is printed can be met."""
    unit = 10 ** (math.floor(math.log10(value_ms)) - 1)
    return f"{math.ceil(value_ms / unit) * unit:g}"


def _closest(
    findings: Sequence[Finding], nearest: Sequence[tuple[Target, ...]], failures: Sequence[str]
) -> tuple[str, ...]:
    """A line for the best of each kind."""
    lines: dict[bool, str] = {}
    for number, (finding, near) in enumerate(zip(findings, nearest, strict=True)):
        line = f"{finding.setup.name}: {finding.goodput.reason}"
        if _can_be_met(near):
            words = ", ".join(f"TTFT {_up(one.ttft_ms)} ms and TPOT {_up(one.tpot_ms)} ms" for one in near)
            line += f"; it could hold {words}"
        if failures and failures[number]:
            line += f"; {failures[number]}"
        lines.setdefault(finding.setup.is_split, line)
    return tuple(lines.values())
