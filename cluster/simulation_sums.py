"""What a simulation amounts to beyond the report of real load: each SLO class by its own targets, cost and energy.

Sums are over the whole run, its start and its end included. Prices and watts are the profiles'; what they do not know
is not made up. Knows nothing of how a simulation ran.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table

from pdserve.cluster.config import ClusterConfig
from pdserve.cluster.load_report import LoadReport
from pdserve.cluster.planner.costing import cost_of, energy_of
from pdserve.cluster.planner.findings import ClassReport, Cost, Energy, Picture, Setup, Target
from pdserve.cluster.planner.profile import Profile
from pdserve.cluster.planner.simulation import Outcome
from pdserve.cluster.tune_targets import GENERAL, target_of
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import SLO, Role


@dataclass(frozen=True, slots=True)
class Spent:
    """At the rate that the simulation had; `None` where a profile does not know it or workers of a role differ."""

    cost: Cost | None
    energy: Energy | None


def check_known(targets: Sequence[Target], classes: frozenset[str | None]) -> None:
    """
    Raises:
        ConfigError: targets of a class that the workload has not.
    """
    for target in targets:
        if target.name != GENERAL and target.name not in classes:
            known = ", ".join(sorted(name for name in classes if name is not None)) or "none"
            raise ConfigError(f"--slo: no request is of the class {target.name}; classes of the workload: {known}")


def classes_of(outcome: Outcome, targets: Sequence[Target]) -> tuple[ClassReport, ...]:
    """Every class by its own targets; requests of no named class are of the general one."""
    seen, good = [0] * len(targets), [0] * len(targets)
    slos = [SLO(target.ttft_ms, target.tpot_ms) for target in targets]
    for record in outcome.records:
        index = target_of(targets, record.arrival.slo_class)
        seen[index] += 1
        good[index] += not record.failure and record.timing().meets(slos[index])
    return tuple(ClassReport(*counted) for counted in zip(targets, seen, good, strict=True))


def judged_by_classes(report: LoadReport, classes: Sequence[ClassReport]) -> LoadReport:
    """The same report, its goodput that of requests which met the targets of their own class."""
    num_good = sum(one.num_good for one in classes)
    return replace(
        report,
        goodput_per_s=num_good / report.duration_s,
        attainment=num_good / report.num_requests if report.num_requests else 0.0,
    )


def class_fields(one: ClassReport) -> dict[str, Any]:
    """For JSON."""
    return asdict(one.target) | {
        "num_requests": one.num_requests,
        "attainment": one.attainment,
        "is_met": one.is_met,
    }


def spent_of(outcome: Outcome, config: ClusterConfig, by_role: Mapping[Role, Profile]) -> Spent:
    """What the workers of these profiles cost and drew, from the first moment to the end of the last request."""
    end_s = max(outcome.end_s, 1e-9)
    done = [record for record in outcome.records if not record.failure]
    if not done:
        return Spent(None, None)
    engines = {role: config.engine_for(role) for role in by_role}
    setup = Setup(
        num_workers={role: config.replicas(role) for role in by_role},
        max_num_batched_tokens={role: engine.max_num_batched_tokens for role, engine in engines.items()},
        max_num_seqs={role: engine.max_num_seqs for role, engine in engines.items()},
        policy=config.router.policy,
    )
    picture = Picture(
        rate=len(done) / end_s,
        ttft_ms=(),
        tpot_ms=(),
        phases=(),
        busy=outcome.busy,
        prompt_tokens_per_s=sum(record.arrival.num_prompt_tokens for record in done) / end_s,
        output_tokens_per_s=sum(record.num_output_tokens for record in done) / end_s,
    )
    return Spent(cost_of(setup, picture, by_role), energy_of(setup, picture, by_role))


def render_classes(classes: Sequence[ClassReport]) -> Table:
    table = Table(title="SLO classes")
    for heading in ("class", "TTFT, TPOT (ms)", "requests", "attained", "wanted"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for one in classes:
        attained, target = "-" if one.attainment is None else f"{one.attainment:.1%}", one.target
        limits, wanted = f"{target.ttft_ms:g}, {target.tpot_ms:g}", f"{target.share:.1%}"
        cells = (target.name, limits, f"{one.num_requests:,}", attained, wanted)
        table.add_row(*cells, style="" if one.is_met else "red")
    return table


def spent_lines(spent: Spent) -> tuple[str, ...]:
    """Cost and energy in words, as far as they are known."""
    lines = []
    if (cost := spent.cost) is not None:
        lines.append(
            f"cost {cost.per_hour:.3g} an hour, {cost.per_million_requests:,.4g} a million requests; a million input "
            f"tokens {cost.per_million_input_tokens:.3g}, output tokens {cost.per_million_output_tokens:.3g}"
        )
    if (energy := spent.energy) is not None:
        less = "" if energy.idle_is_known else " and what idle workers draw, which the profile does not know"
        lines.append(f"energy {energy.joules_per_request:,.3g} J a request{less}")
    return tuple(lines)
