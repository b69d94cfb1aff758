"""The words and figures of a report's tables. A cell has the text to read and the value to sort by.

Numbers keep four digits. Knows nothing of HTML.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pdserve.cluster.planner.findings import Answer, Finding, Setup, at
from pdserve.cluster.planner.goodput import Goodput
from pdserve.cluster.planner.timelapse import SimulationStory
from pdserve.cluster.report_series import Shown, by_role, labels


@dataclass(frozen=True, slots=True)
class Cell:
    """`sort` is the value behind the text; empty where there is none, and for words."""

    text: str
    sort: str = ""
    is_figure: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """`kind` says how it stands out: `split`, `colocated` or nothing."""

    cells: tuple[Cell, ...]
    kind: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    headings: tuple[str, ...]
    rows: tuple[Row, ...]
    remark: str = ""


MISSING = Cell("–")
SIZES = ("GPUs", "tensor parallel", "chunk", "batch", "policy", "profile")


def figure(value: float | None) -> Cell:
    """Four digits, without exponents."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return Cell("∞", "1e308")
    decimals = 0 if value == 0 else min(6, max(0, 3 - math.floor(math.log10(abs(value)))))
    text = f"{value:,.{decimals}f}"
    return Cell(text.rstrip("0").rstrip(".") if "." in text else text, repr(float(value)))


def share(value: float) -> Cell:
    return Cell(f"{100 * value:.1f} %", repr(float(value)))


def words(text: str) -> Cell:
    return Cell(text, is_figure=False)


def findings_table(answer: Answer) -> Table:
    """All set-ups, best first. Columns without figures are left out; what all set-ups share is said once, below."""
    names = labels(answer)
    rows = [
        {
            "set-up": words(names[number].partition(",")[0]),
            **_results(finding),
            "remarks": words(_remarks(answer, number)),
            **_prices(finding),
            **_sizes(finding.setup),
        }
        for number, finding in enumerate(answer.findings)
    ]
    headings = list(rows[0]) if rows else []
    empty = {heading for heading in headings if all(row[heading] == MISSING for row in rows)}
    kept = [heading for heading in headings if heading not in empty]
    same = [heading for heading in SIZES if heading in kept and len(rows) > 1 and _is_same(rows, heading)]
    kept = [heading for heading in kept if heading not in same]
    kinds = {answer.best_split: "split", answer.best_colocated: "colocated"}
    return Table(
        tuple(kept),
        tuple(
            Row(tuple(row[heading] for heading in kept), kinds.get(number, ""), answer.findings[number].goodput.reason)
            for number, row in enumerate(rows)
        ),
        f"All set-ups: {'; '.join(f'{heading} {rows[0][heading].text}' for heading in same)}." if same else "",
    )


def _is_same(rows: list[dict[str, Cell]], heading: str) -> bool:
    return len({row[heading] for row in rows}) == 1


def _results(finding: Finding) -> dict[str, Cell]:
    goodput, picture = finding.goodput, finding.picture
    ttft, tpot = (picture.ttft_ms, picture.tpot_ms) if picture else ((), ())
    return {
        "goodput, req/s": figure(goodput.rate),
        "95 % interval": Cell(interval(goodput), repr(goodput.low)),
        "attained": share(goodput.attainment_at_rate.value),
        "TTFT p50": figure(at(ttft, 0.5) if ttft else None),
        "TTFT p99": figure(at(ttft, 0.99) if ttft else None),
        "TPOT p50": figure(at(tpot, 0.5) if tpot else None),
        "TPOT p99": figure(at(tpot, 0.99) if tpot else None),
    }


def _prices(finding: Finding) -> dict[str, Cell]:
    cost, energy = finding.cost, finding.energy
    return {
        "cost / M input": figure(cost.per_million_input_tokens if cost else None),
        "cost / M output": figure(cost.per_million_output_tokens if cost else None),
        "cost / hour": figure(cost.per_hour if cost else None),
        "J / output token": figure(energy.joules_per_output_token if energy else None),
    }


def _sizes(setup: Setup) -> dict[str, Cell]:
    values = (
        figure(setup.num_gpus),
        figure(setup.tensor_parallel_size),
        words(by_role(setup.max_num_batched_tokens)),
        words(by_role(setup.max_num_seqs)),
        words(setup.policy),
        words(by_role(setup.profiles)) if setup.profiles else MISSING,
    )
    return dict(zip(SIZES, values, strict=True))


def interval(goodput: Goodput) -> str:
    """As in `3.1 – 3.4`."""
    if goodput.failing:
        return MISSING.text
    return f"{figure(goodput.low).text} – {figure(goodput.high).text}"


def _remarks(answer: Answer, number: int) -> str:
    finding = answer.findings[number]
    said = []
    if number == answer.best_split:
        said.append("best split")
    if number == answer.best_colocated:
        said.append("best colocated")
    if finding.setup.name in answer.plateau:
        said.append("on the plateau")
    if finding.goodput.failing:
        said.append(f"infeasible: {finding.goodput.failing}")
    elif not finding.goodput.rate:
        said.append("no rate found")
    elif not finding.is_refined:
        said.append("search stopped early")
    return ", ".join(said)


def phases_table(shown: list[Shown]) -> Table:
    rows = [
        Row(
            (
                words(one.label),
                words(phase.name),
                figure(phase.mean_ms),
                figure(phase.p50_ms),
                figure(phase.p99_ms),
                share(phase.share_of_misses),
            )
        )
        for one in shown
        for phase in one.picture.phases
    ]
    return Table(("set-up", "phase", "mean, ms", "p50, ms", "p99, ms", "misses put down to it"), tuple(rows))


def busy_table(shown: list[Shown]) -> Table:
    """How busy each worker, or each kind of worker, was."""
    rows = [
        Row((words(one.label), words(name), share(busy))) for one in shown for name, busy in one.picture.busy.items()
    ]
    return Table(("set-up", "who", "busy"), tuple(rows))


def classes_table(story: SimulationStory) -> Table:
    rows = [
        Row(
            (
                words(one.target.name),
                figure(one.target.ttft_ms),
                figure(one.target.tpot_ms),
                figure(one.num_requests),
                MISSING if one.attainment is None else share(one.attainment),
                share(one.target.share),
                words("met" if one.is_met else "missed"),
            )
        )
        for one in story.classes
    ]
    return Table(("class", "TTFT, ms", "TPOT, ms", "requests", "attained", "wanted", ""), tuple(rows))


def spreads_table(story: SimulationStory) -> Table:
    rows = [
        Row((words(name), *(figure(ms) for ms in (one.p50_ms, one.p90_ms, one.p99_ms, one.mean_ms, one.max_ms))))
        for name, one in story.spreads.items()
    ]
    return Table(("latency, ms", "p50", "p90", "p99", "mean", "max"), tuple(rows))
