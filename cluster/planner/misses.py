"""Why requests of a set-up miss their targets at its goodput, as far as its run tells, and what would help.

A run's misses are put down to phases (`Picture`); that is a reason where there are tens of them, and where the phase is
on the side of the target that is missed. Else it is told which target fails and how busy its workers are, or nothing.
Knows nothing of other set-ups, or of what more workers cost.
"""

from __future__ import annotations

import math

from pdserve.cluster.planner.attainment import Attainment
from pdserve.cluster.planner.findings import Finding, Phase
from pdserve.cluster.planner.picture import AFTER_FIRST_TOKEN
from pdserve.proto.types import Role

MIN_MISSES = 30
"""Fewer requests that missed are chance, and the shares of phases in them more so."""

NOTEWORTHY = 0.25
CLEARLY = 2.0
"""By so many times one target is missed more often than the other where it is the one that fails."""

BEYOND = 1.3
"""What fails up to so many times the goodput is what holds it down."""

IDLE = 0.5
"""Of workers that are busy for less than that, more do not make a prompt any faster."""


def why_missed(finding: Finding) -> str:
    """A line for the reasons; empty where nothing can be said."""
    assert finding.picture is not None
    guilty = max(finding.picture.phases, key=lambda phase: phase.share_of_misses)
    attained = finding.goodput.attainment_at_rate
    late, slow = 1 - attained.ttft, 1 - attained.tpot
    is_told = _num_misses(attained) >= MIN_MISSES and guilty.share_of_misses >= NOTEWORTHY
    if is_told and (slow > late if guilty.name in AFTER_FIRST_TOKEN else late > slow):
        return f"{finding.setup.name} misses by: {_guilt(finding, guilty)}"
    return _by_target(finding)


def _num_misses(attained: Attainment) -> float:
    return 0.0 if math.isnan(attained.value) else (1 - attained.value) * attained.num_requests


def _guilt(finding: Finding, phase: Phase) -> str:
    share = f"{phase.name} in {phase.share_of_misses:.0%} of the misses"
    if not finding.setup.is_split and phase.name in AFTER_FIRST_TOKEN:
        return f"{share}; prompts of others hold up its tokens (interference)"
    if phase.name == "admission":
        return f"{share}; all workers have as many requests as they may run, so that others wait at the router"
    if phase.name == "decode":
        return f"{share}; more decode workers would help"
    if phase.name in ("transfer", "decode queue"):
        return f"{share}; the link or the decode workers' memory is short, and more decode workers have more of it"
    if phase.name == "prefill" and _busy(finding, Role.PREFILL) < IDLE:
        return f"{share}; long prompts take that long by themselves"
    if finding.setup.is_split:
        return f"{share}; more prefill workers would help"
    return f"{share}; prompts wait for their turn"


def _by_target(finding: Finding) -> str:
    """From the rates at and beyond the goodput, the nearest that has enough misses."""
    goodput = finding.goodput
    seen = [one for rate, one in goodput.probes if goodput.rate <= rate <= BEYOND * goodput.rate]
    attained = next((one for one in (goodput.attainment_at_rate, *seen) if _num_misses(one) >= MIN_MISSES), None)
    if attained is None:
        return ""
    late, slow = 1 - attained.ttft, 1 - attained.tpot
    if max(late, slow) < CLEARLY * min(late, slow):
        return ""
    split_role = Role.PREFILL if late > slow else Role.DECODE
    role = split_role if finding.setup.is_split else Role.MIXED
    busy = f"; {role} workers are busy {_busy(finding, role):.0%} of the time" if _has_busy(finding, role) else ""
    return f"{finding.setup.name} misses {'TTFT' if late > slow else 'TPOT'} first{busy}"


def _has_busy(finding: Finding, role: Role) -> bool:
    return finding.picture is not None and any(name.startswith(f"{role}-") for name in finding.picture.busy)


def _busy(finding: Finding, role: Role) -> float:
    """The mean of the workers of a role; 1 where it is not known."""
    busy = finding.picture.busy if finding.picture is not None else {}
    found = [share for name, share in busy.items() if name.startswith(f"{role}-")]
    return sum(found) / len(found) if found else 1.0
