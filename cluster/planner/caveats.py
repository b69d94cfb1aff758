"""What must be known before a plan is believed: where its figures come from, and what it could not look at.

Knows nothing of how an answer was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pdserve.cluster.planner.findings import Finding
from pdserve.cluster.planner.profile import Profile
from pdserve.cluster.planner.search import Searched
from pdserve.cluster.planner.setups import Choices
from pdserve.proto.types import Role

MAX_EXTRAPOLATIONS = 5
LARGE_ERROR = 0.15
MOST_EFFORT = "thorough"
ROUTER_TOKENS_PER_S = 12_000.0
"""Of one process on one core (`bench/scale.py --only process`)."""


def caveats(
    searched: Searched,
    findings: Sequence[Finding],
    best: int | None,
    profiles: Mapping[str, Profile],
    choices: Choices,
    effort: str = "",
) -> tuple[str, ...]:
    """A line each, the gravest first. `best` is the finding that is recommended; `effort` names what was spent."""
    used = [profiles[name] for name in dict.fromkeys(name for one in findings for name in one.setup.profiles.values())]
    lines = [line for profile in used for line in _of_profile(profile, findings)]
    beyond = searched.extrapolated
    lines += [f"beyond what was measured: {line}" for line in beyond[:MAX_EXTRAPOLATIONS]]
    if len(beyond) > MAX_EXTRAPOLATIONS:
        lines.append(f"beyond what was measured: {len(beyond) - MAX_EXTRAPOLATIONS} more figures")
    if best is not None:
        lines += _of_best(findings[best], choices)
    more = "--max-requests" if effort == MOST_EFFORT else f"--effort {MOST_EFFORT}"
    unfinished = [one.setup.name for one in findings if one.is_refined and one.goodput.is_spent]
    if unfinished:
        lines.append(
            f"{', '.join(dict.fromkeys(unfinished))}: the requests to simulate were spent before the interval was "
            f"narrow; {more} narrows it"
        )
    if searched.least_requests:
        lines.append(
            "runs were too short to show that every set-up keeps up; rates at which it may do so counted as too high; "
            f"--max-requests {searched.least_requests} makes them long enough"
        )
    if searched.num_left_out:
        lines.append(
            f"{searched.num_left_out} set-ups were left out by a guess from mean lengths; {more} or --splits tries more"
        )
    return tuple(lines)


def _of_profile(profile: Profile, findings: Sequence[Finding]) -> list[str]:
    lines = []
    if profile.source == "predicted":
        lines.append(f"{profile.name}: its step times are predicted, not measured ({profile.origin})")
    is_mixed = any(one.setup.profiles.get(Role.MIXED) == profile.name for one in findings)
    if is_mixed and not profile.mixed.num_samples:
        lines.append(
            f"{profile.name}: nobody measured mixed steps; prefill and decode are added up, so that colocated set-ups "
            "come out worse than they are"
        )
    regions = (*profile.prefill, *profile.decode)
    worst = max((region.p95_error or 0.0 for region in regions), default=0.0)
    if worst > LARGE_ERROR:
        lines.append(f"{profile.name}: its steps are off by up to {worst:.0%} (p95 of its worst region)")
    return lines


def _of_best(finding: Finding, choices: Choices) -> list[str]:
    setup, lines = finding.setup, []
    tokens_per_s = 0.0 if finding.picture is None else finding.picture.output_tokens_per_s
    if tokens_per_s > ROUTER_TOKENS_PER_S:
        lines.append(
            f"the router is not part of the simulation, and {tokens_per_s:,.0f} tokens/s are more than one router "
            f"process delivers (about {ROUTER_TOKENS_PER_S:,.0f}, docs/scale.md)"
        )
    if setup.tensor_parallel_size > 1:
        lines.append(
            f"this version cannot start workers of tensor-parallel degree {setup.tensor_parallel_size}; "
            "the configuration is a plan only"
        )
    for role in (Role.PREFILL, Role.MIXED):
        if setup.max_num_batched_tokens.get(role) == choices.chunk_sizes[-1] and len(choices.chunk_sizes) > 1:
            lines.append(
                f"{role} workers do best with the largest chunk that was tried, {choices.chunk_sizes[-1]}; "
                "--chunk-sizes tries larger ones"
            )
    return lines
