"""What a simulation amounts to, in the report of real load, a table of its workers, and what limits both.

The same sums judge both, so that a simulation and a cluster can be laid side by side. Knows nothing of how either ran.
"""

from __future__ import annotations

import math

from rich.table import Table

from pdserve.client import Timings
from pdserve.cluster.load import LoadResult, RequestRecord
from pdserve.cluster.load_report import LoadReport, summarize
from pdserve.cluster.planner.picture import Seen
from pdserve.cluster.planner.simulation import Outcome
from pdserve.cluster.planner.virtual_router import Record
from pdserve.cluster.planner.workload_spec import WorkloadSpec
from pdserve.cluster.workload_files import share_beyond
from pdserve.proto.types import SLO


def report_of(outcome: Outcome, slo: SLO) -> LoadReport:
    """The simulation as if it had been measured by clients."""
    records = sorted(outcome.records, key=lambda record: record.arrival.at_s)
    loads = tuple(_as_measured(record) for record in records)
    return summarize(LoadResult(loads, 0.0, outcome.end_s, num_capped=0, num_clipped=0), slo)


def _as_measured(record: Record) -> RequestRecord:
    failed = record.failure or None
    return RequestRecord(
        timing=record.timing(),
        num_prompt_tokens=record.arrival.num_prompt_tokens,
        phases=None if failed else phases_of(record),
        error_code=failed,
        error_message=record.failure,
    )


def was_handed_off(record: Record) -> bool:
    """Whether another worker went on with it: an answer of one token is over with the prompt."""
    return record.prefill_id != record.decode_id and record.num_output_tokens > 1


def phases_of(record: Record) -> Timings:
    """Where the time of a request that ended well went, at its workers."""
    assert record.first_token_s is not None
    assert record.end_s is not None
    is_split = was_handed_off(record)
    decode_began_s = record.decode_started_s if is_split else record.first_token_s
    return Timings(
        prefill_queue_ms=(record.prefill_started_s - record.queued_s) * 1e3,
        prefill_ms=(record.prefilled_s - record.prefill_started_s) * 1e3,
        transfer_ms=(record.admitted_s - record.prefilled_s) * 1e3 if is_split else 0.0,
        decode_queue_ms=(record.decode_started_s - record.admitted_s) * 1e3 if is_split else 0.0,
        decode_ms=(record.end_s - decode_began_s) * 1e3,
    )


def seen_of(record: Record, target: int) -> Seen:
    """One request for a `Picture`, judged by the target of that index. One that failed has no latencies."""
    arrival, timing, num_output = record.arrival, record.timing(), record.num_output_tokens
    end_s = math.inf if record.end_s is None else record.end_s
    if record.failure:
        return Seen(arrival.at_s, end_s, arrival.num_prompt_tokens, num_output, target, None, None)
    phases = phases_of(record)
    phases_ms = (
        (record.queued_s - arrival.at_s) * 1e3,
        phases.prefill_queue_ms,
        phases.prefill_ms,
        phases.transfer_ms,
        phases.decode_queue_ms,
        phases.decode_ms,
    )
    ttft_ms, tpot_ms = timing.ttft_ms(), timing.tpot_ms()
    return Seen(arrival.at_s, end_s, arrival.num_prompt_tokens, num_output, target, ttft_ms, tpot_ms, phases_ms)


def render_workers(outcome: Outcome) -> Table:
    """How busy each worker's engine was."""
    table = Table(title="Workers")
    table.add_column("worker")
    table.add_column("busy", justify="right")
    for name, share in outcome.busy.items():
        table.add_row(name, f"{share:.0%}")
    return table


def cut_notes(whole: WorkloadSpec, longest: int) -> tuple[str, ...]:
    """A line, if any of the workload's requests are longer than so many tokens."""
    cut = share_beyond(whole, longest)
    return (f"{cut:.1%} of the requests are longer than {longest:,} tokens and were cut to it",) if cut else ()


def beyond_notes(outcome: Outcome) -> tuple[str, ...]:
    """A line for each figure in which steps of the simulation were beyond what the profile's were measured at."""
    return tuple(f"beyond what was measured: {line}" for line in outcome.extrapolation.summary())
