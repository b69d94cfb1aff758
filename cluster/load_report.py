"""What a run of load amounts to: latency percentiles, throughput, goodput, errors, phases.

Pure sums over records. TTFT counts from the scheduled send time; TPOT is per request, (last - first)/(n - 1); ITL is
every gap between tokens as they arrived, zero within one message. Failed requests count in attainment (as
missed) and in the errors, not in the latency percentiles. Goodput is requests per second that met both targets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from pdserve.cluster.load import LATE_S, LoadResult, RequestRecord
from pdserve.proto.types import SLO


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles (linear interpolation) of one kind of latency, in milliseconds."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    max_ms: float


@dataclass(frozen=True, slots=True)
class LoadReport:
    """One run. Spreads are `None` when nothing was measured; rates are over `duration_s`, the tail included."""

    num_requests: int
    num_completed: int
    duration_s: float
    offered_rate: float
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens: int
    output_tokens: int
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2e: Spread | None
    slo_ttft_ms: float
    slo_tpot_ms: float
    goodput_per_s: float
    attainment: float
    errors: dict[str, int]
    first_error: str
    phase_means_ms: dict[str, float]
    max_send_lag_ms: float
    num_late: int
    num_capped: int
    num_clipped: int
    num_skipped: int


def summarize(result: LoadResult, slo: SLO, num_skipped: int = 0) -> LoadReport:
    """The report of a run judged by `slo`."""
    records = result.records
    completed = [record for record in records if record.error_code is None]
    failed = [record for record in records if record.error_code is not None]
    duration_s = max(result.end_s - result.start_s, 1e-9)
    planned_s = max((record.timing.scheduled_s for record in records), default=result.start_s) - result.start_s
    num_good = sum(record.timing.meets(slo) for record in completed)
    output_tokens = sum(record.timing.num_output_tokens for record in records)
    lags_s = [record.timing.sent_s - record.timing.scheduled_s for record in records]
    return LoadReport(
        num_requests=len(records),
        num_completed=len(completed),
        duration_s=duration_s,
        offered_rate=len(records) / planned_s if planned_s > 0 else 0.0,
        requests_per_s=len(completed) / duration_s,
        output_tokens_per_s=output_tokens / duration_s,
        prompt_tokens=sum(record.num_prompt_tokens for record in records),
        output_tokens=output_tokens,
        ttft=spread(record.timing.ttft_ms() for record in completed),
        tpot=spread(record.timing.tpot_ms() for record in completed),
        itl=_itl(completed),
        e2e=spread(record.timing.e2e_ms() for record in completed),
        slo_ttft_ms=slo.ttft_ms,
        slo_tpot_ms=slo.tpot_ms,
        goodput_per_s=num_good / duration_s,
        attainment=num_good / len(records) if records else 0.0,
        errors=dict(sorted(Counter(record.error_code or "" for record in failed).items())),
        first_error=failed[0].error_message if failed else "",
        phase_means_ms=_phase_means(completed),
        max_send_lag_ms=max(lags_s, default=0.0) * 1e3,
        num_late=sum(lag_s > LATE_S for lag_s in lags_s),
        num_capped=result.num_capped,
        num_clipped=result.num_clipped,
        num_skipped=num_skipped,
    )


def spread(values_ms: Iterable[float | None]) -> Spread | None:
    """Percentiles of the values that exist."""
    known = np.array([value for value in values_ms if value is not None], dtype=np.float64)
    return _spread_of(known)


def _spread_of(known: np.ndarray) -> Spread | None:
    if known.size == 0:
        return None
    p50, p90, p99 = (float(value) for value in np.percentile(known, [50, 90, 99]))
    return Spread(p50, p90, p99, float(known.mean()), float(known.max()))


def _itl(records: list[RequestRecord]) -> Spread | None:
    gaps = [np.diff(np.array(record.token_times_s)) for record in records if len(record.token_times_s) > 1]
    return _spread_of(np.concatenate(gaps) * 1e3) if gaps else None


def _phase_means(records: list[RequestRecord]) -> dict[str, float]:
    """Mean time of each phase as the cluster reported it; waiting for room on decode belongs to transfer."""
    phases = [record.phases for record in records if record.phases is not None]
    if not phases:
        return {}
    sums = {
        "queue": sum(phase.prefill_queue_ms + phase.decode_queue_ms for phase in phases),
        "prefill": sum(phase.prefill_ms for phase in phases),
        "transfer": sum(phase.transfer_wait_ms + phase.transfer_ms for phase in phases),
        "decode": sum(phase.decode_ms for phase in phases),
    }
    return {name: total / len(phases) for name, total in sums.items()}


def render(report: LoadReport, judged_by: str | None = None) -> list[Table]:
    """The report for people. `judged_by` says by what goodput was, where not by the report's own targets."""
    latency = Table(title="Latency from the scheduled send time (ms)")
    for heading in ("", "p50", "p90", "p99", "mean", "max"):
        latency.add_column(heading, justify="left" if not heading else "right")
    for name in ("ttft", "tpot", "itl", "e2e"):
        row: Spread | None = getattr(report, name)
        if row is not None:
            cells = (row.p50_ms, row.p90_ms, row.p99_ms, row.mean_ms, row.max_ms)
            latency.add_row(name.upper(), *(f"{cell:,.1f}" for cell in cells))
    totals = Table(title="Load", show_header=False)
    totals.add_column()
    totals.add_column(justify="right")
    for label, value in _total_rows(report, judged_by):
        totals.add_row(label, value)
    return [latency, totals]


def _total_rows(report: LoadReport, judged_by: str | None) -> list[tuple[str, str]]:
    judge = judged_by or f"TTFT <= {report.slo_ttft_ms:g} ms, TPOT <= {report.slo_tpot_ms:g} ms"
    rows = [
        ("requests completed", f"{report.num_completed:,} of {report.num_requests:,}"),
        ("duration", f"{report.duration_s:,.1f} s"),
        ("offered", f"{report.offered_rate:,.2f} requests/s"),
        ("throughput", f"{report.requests_per_s:,.2f} requests/s, {report.output_tokens_per_s:,.1f} tokens/s"),
        (
            f"goodput ({judge})",
            f"{report.goodput_per_s:,.2f} requests/s, {report.attainment:.1%} attained",
        ),
    ]
    rows += [(f"mean {name}", f"{mean_ms:,.1f} ms") for name, mean_ms in report.phase_means_ms.items()]
    rows += [(f"failed with {code}", f"{count:,}") for code, count in report.errors.items()]
    for label, count in (
        ("held back by --max-concurrency", report.num_capped),
        (f"sent more than {LATE_S * 1e3:.0f} ms late (at most {report.max_send_lag_ms:,.0f} ms)", report.num_late),
        ("cut to the model's context", report.num_clipped),
        ("empty trace rows skipped", report.num_skipped),
    ):
        rows += [(label, f"{count:,}")] if count else []
    return rows
