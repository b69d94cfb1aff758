"""The answer of `pdserve tune` as tables for people, as plain values for JSON, and as a configuration file.

Knows nothing of how it was found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from pdserve.cluster.planner.findings import Answer, Finding, Setup, at
from pdserve.cluster.planner.profile import Profile
from pdserve.cluster.planner.setup_config import tree_of
from pdserve.cluster.whole_files import write_whole
from pdserve.proto.types import Role

NOTHING = "-"


def plain(answer: Answer) -> dict[str, Any]:
    """For JSON: numbers that are not finite are null, and every set-up has its name."""
    tree = asdict(answer)
    for finding, found in zip(tree["findings"], answer.findings, strict=True):
        finding["setup"] |= {"name": found.setup.name, "num_gpus": found.setup.num_gpus}
        finding["goodput_per_gpu"] = found.goodput.rate / found.setup.num_gpus
    cleaned: dict[str, Any] = _finite(tree)
    return cleaned


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(answer: Answer) -> Table:
    """All set-ups, best first."""
    table = Table(title=f"Set-ups of {answer.question.num_gpus:g} GPUs, {answer.question.workload}")
    has_cost = any(finding.cost for finding in answer.findings)
    has_energy = any(finding.energy for finding in answer.findings)
    figures = ["requests/s (95 %)", "per GPU", "TTFT p50/p99", "TPOT p50/p99"]
    figures += [*(["price M in/out"] if has_cost else []), *(["J/request"] if has_energy else [])]
    table.add_column("set-up", no_wrap=True)
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("chunk", "sequences", "policy"):
        table.add_column(heading)
    for number, finding in enumerate(answer.findings):
        cells = [*_results(finding), *(_costs(finding) if has_cost else []), *(_energy(finding) if has_energy else [])]
        style = "bold" if number == answer.recommended else "" if finding.is_refined else "dim"
        table.add_row(_label(answer, number), *cells, *_sizes(finding), style=style)
    return table


def _label(answer: Answer, number: int) -> str:
    setup = answer.findings[number].setup
    notes = [f"TP{setup.tensor_parallel_size}"] if setup.tensor_parallel_size > 1 else []
    if answer.question.are_profiles_told:
        notes += dict.fromkeys(setup.profiles.values())
    if number == answer.recommended:
        notes.append("<- best")
    return " ".join([setup.name, *notes])


def _results(finding: Finding) -> list[str]:
    goodput, picture = finding.goodput, finding.picture
    if not goodput.rate:
        return [f"0 ({goodput.failing} fails)" if goodput.failing else "not found", "0", NOTHING, NOTHING]
    high = f"{goodput.high:.3g}" if goodput.high < math.inf else "?"
    ttft, tpot = (picture.ttft_ms, picture.tpot_ms) if picture else ((), ())
    return [
        f"{goodput.rate:.3g} ({goodput.low:.3g} to {high})",
        f"{goodput.rate / finding.setup.num_gpus:.3g}",
        f"{at(ttft, 0.5):,.0f}/{at(ttft, 0.99):,.0f}" if ttft else NOTHING,
        f"{at(tpot, 0.5):.3g}/{at(tpot, 0.99):.3g}" if tpot else NOTHING,
    ]


def _costs(finding: Finding) -> list[str]:
    cost = finding.cost
    return [f"{cost.per_million_input_tokens:.3g}/{cost.per_million_output_tokens:.3g}"] if cost else [NOTHING]


def _energy(finding: Finding) -> list[str]:
    energy = finding.energy
    return [f"{energy.joules_per_request:.3g}" + ("" if energy.idle_is_known else "+")] if energy else [NOTHING]


def _sizes(finding: Finding) -> list[str]:
    setup = finding.setup
    chunks = [f"{setup.max_num_batched_tokens[role]}" for role in (Role.PREFILL, Role.MIXED) if role in setup.profiles]
    num_seqs = [f"{setup.max_num_seqs[role]}" for role in (Role.DECODE, Role.MIXED) if role in setup.profiles]
    return ["/".join(chunks), "/".join(num_seqs), setup.policy]


def lines(answer: Answer) -> Iterator[str]:
    """What is said below the table."""
    yield answer.verdict
    yield from (f"  - {reason}" for reason in answer.reasons)
    yield from (f"warning: {warning}" for warning in answer.warnings)
    yield f"{answer.num_requests:,} requests simulated in {answer.took_s:.0f} s"


def _cannot_say(setup: Setup) -> list[str]:
    """What the set-up is beyond what a configuration can tell."""
    degree = setup.tensor_parallel_size
    return [f"a plan only: `pdserve up` cannot start workers of tensor-parallel degree {degree}"] if degree > 1 else []


def write_best(
    answer: Answer, profiles: Mapping[str, Profile], model: str, path: Path, least_timeout_s: float = 0.0
) -> None:
    """The recommended set-up as it was simulated, for `pdserve up -c`.

    Raises:
        ConfigError: the file cannot be written.
    """
    assert answer.recommended is not None
    finding = answer.findings[answer.recommended]
    tree = tree_of(finding.setup, profiles, model, answer.question.targets[0], least_timeout_s)
    head = [
        f"{finding.setup.name}, by pdserve tune; seed {answer.question.seed}",
        f"{answer.question.workload}; {finding.goodput.rate:.4g} requests/s at the targets",
        answer.verdict,
        *_cannot_say(finding.setup),
        *(["router.slo is that of the first class"] if len(answer.question.targets) > 1 else []),
    ]
    comment = "".join(f"# {' '.join(line.split())}\n" for line in head)
    write_whole("--write-config", path, comment + yaml.safe_dump(tree, sort_keys=False))
