"""Public tables of step times to profiles: Splitwise's measurements and AIConfigurator's predictions, both CSV.

Splitwise (Mutinifni/splitwise-sim, data/perf_model.csv): milliseconds of runs of a whole batch of equal requests; the
prompt phase is one prefill step, and a token's time is that of a decode step half-way through the output.
AIConfigurator: predicted milliseconds of one prefill or decode step of equal requests. Knows nothing of the product's
own measurements.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pdserve.cluster.planner.fit import StepFit, fit_steps
from pdserve.cluster.planner.profile import Overheads, Power, describe_fit
from pdserve.cluster.planner.public_facts import Conversion, Kind, StepCosts, assemble
from pdserve.cluster.planner.step_sample import StepSample
from pdserve.cluster.planner.step_shape import StepShape, chunk_pairs
from pdserve.proto.errors import ConfigError

SPLITWISE_COLUMNS = (
    "model",
    "hardware",
    "prompt_size",
    "batch_size",
    "token_size",
    "peak_power",
    "average_power",
    "prompt_time",
    "token_time",
    "e2e_time",
    "tensor_parallel",
)
AICONFIGURATOR_COLUMNS = ("model", "phase", "batch_size", "context_or_isl_tokens", "predicted_ms")

LONGEST_RUN_BY_PHASES = 1.1
"""A run that took longer than its phases times this did not run as one batch: it did not fit."""

LARGE_PROMPT_TOKENS = 1024
"""Prompt phases from here on draw what they draw."""

HANDOFF_S = {"a100-80gb": 0.008, "h100-80gb": 0.005, "h100-80gb-pcap": 0.005}
"""What a hand-off adds that streaming does not hide: Splitwise (ISCA'24), section VI."""

SYSTEMS = {"a100_sxm": "a100-80gb", "h100_sxm": "h100-80gb", "h200_sxm": "h200"}
"""AIConfigurator's names of GPUs, as its files carry them."""

SYSTEM_PART = re.compile(rf"(?<![a-z0-9])({'|'.join(SYSTEMS)})(?![a-z0-9])", re.IGNORECASE)
DEGREE_PART = re.compile(r"(?<![a-z0-9])tp([1-9]\d{0,2})(?![a-z0-9])", re.IGNORECASE)

DERIVED_HARDWARE = frozenset({"h100-80gb-pcap"})
"""Not measured: prompt times are exactly 1.3 times those of the GPU without the cap, all other times equal them."""


@dataclass(frozen=True, slots=True)
class _Run:
    """One row of Splitwise's table."""

    prompt_tokens: int
    batch_size: int
    output_tokens: int
    prompt_s: float
    token_s: float
    total_s: float
    peak_power: float
    average_power: float

    @property
    def ran_as_one(self) -> bool:
        return self.total_s <= LONGEST_RUN_BY_PHASES * (self.prompt_s + (self.output_tokens - 1) * self.token_s)

    @property
    def num_decode_steps(self) -> float:
        """Some runs stopped at an end-of-sequence token; the total says after how many."""
        return min(self.output_tokens - 1.0, max(0.0, (self.total_s - self.prompt_s) / self.token_s))


def splitwise_profiles(lines: Iterable[str], name: str) -> tuple[Conversion, ...]:
    """One profile for each model, hardware and tensor-parallel degree of the table.

    Raises:
        ConfigError: naming the file, the line and the column.
    """
    runs: dict[tuple[str, str, int], list[_Run]] = defaultdict(list)
    for row in _rows(lines, name, SPLITWISE_COLUMNS):
        kind = (row.text("model"), row.text("hardware"), row.count("tensor_parallel"))
        runs[kind].append(
            _Run(
                prompt_tokens=row.count("prompt_size"),
                batch_size=row.count("batch_size"),
                output_tokens=row.count("token_size"),
                prompt_s=row.seconds("prompt_time"),
                token_s=row.seconds("token_time"),
                total_s=row.seconds("e2e_time"),
                peak_power=row.number("peak_power"),
                average_power=row.number("average_power"),
            )
        )
    return tuple(_splitwise_profile(Kind(*key, name), kind_runs) for key, kind_runs in runs.items())


def _splitwise_profile(kind: Kind, runs: Sequence[_Run]) -> Conversion:
    sound = [run for run in runs if run.ran_as_one]
    fit = fit_steps(list(_run_samples(sound)))
    dropped = sorted({(run.batch_size, run.prompt_tokens) for run in runs if not run.ran_as_one})
    left_out = [
        f"left out: batch {batch_size} of {prompt_tokens} tokens did not run as one batch"
        for batch_size, prompt_tokens in dropped
    ]
    origin = "Splitwise (ISCA'24), Mutinifni/splitwise-sim data/perf_model.csv, MIT."
    if kind.hardware in DERIVED_HARDWARE:
        origin += " Derived by its authors from the GPU without a power cap, prompt times 1.3 times as long."
    return _conversion(
        kind,
        fit,
        "predicted" if kind.hardware in DERIVED_HARDWARE else "measured",
        origin,
        overheads=Overheads(handoff_s=HANDOFF_S.get(kind.hardware, 0.0)),
        longest_run_tokens=max(run.prompt_tokens for run in sound),
        power=_power(kind, sound),
        left_out=left_out,
    )


def _run_samples(runs: Iterable[_Run]) -> Iterator[StepSample]:
    """A prefill and a decode step of each run. Repeats of a run keep one shape."""
    repeats: dict[tuple[int, int, int], list[_Run]] = defaultdict(list)
    for run in runs:
        repeats[run.batch_size, run.prompt_tokens, run.output_tokens].append(run)
    for (batch_size, prompt_tokens, _), equal in repeats.items():
        half_way = statistics.median(run.num_decode_steps for run in equal) / 2
        shape = StepShape(0, 0.0, batch_size, round(batch_size * (prompt_tokens + half_way)))
        for run in equal:
            yield _prefill_sample(batch_size, prompt_tokens, run.prompt_s)
            yield StepSample(shape, run.token_s)


def _power(kind: Kind, runs: Sequence[_Run]) -> Power | None:
    """Watts by the table's shares of the TDP; None where it has none, shown as 0."""
    peaks = [run.peak_power for run in runs if run.batch_size * run.prompt_tokens >= LARGE_PROMPT_TOKENS]
    peaks = [share for share in peaks if share > 0]
    averages = [run.average_power for run in runs if run.average_power > 0]
    if not peaks or not averages:
        return None
    tdp_w, degree = kind.gpu.tdp_w, kind.tensor_parallel_size
    # Nearly all of a run is decoding, and the prompt phase is its peak.
    return Power(
        idle_w=kind.gpu.power[0] * degree if kind.gpu.power else None,
        prefill_w=statistics.median(peaks) * tdp_w * degree,
        decode_w=statistics.median(averages) * tdp_w * degree,
    )


def aiconfigurator_profiles(lines: Iterable[str], name: str) -> tuple[Conversion, ...]:
    """One profile for each model of a table of predictions. What it was predicted for is in the file's name alone.

    Raises:
        ConfigError: naming the file, the line and the column; or the name says no GPU or degree that is known.
    """
    samples: dict[str, list[StepSample]] = defaultdict(list)
    for row in _rows(lines, name, AICONFIGURATOR_COLUMNS):
        batch_size, tokens = row.count("batch_size"), row.count("context_or_isl_tokens")
        phase, seconds = row.text("phase"), row.seconds("predicted_ms")
        if phase == "prefill":
            sample = _prefill_sample(batch_size, tokens, seconds)
        elif phase == "decode":
            sample = StepSample(StepShape(0, 0.0, batch_size, batch_size * tokens), seconds)
        else:
            raise ConfigError(f"{row.where}: phase: {phase!r} is neither prefill nor decode")
        samples[row.text("model")].append(sample)
    hardware, tensor_parallel_size = _predicted_for(name)
    origin = f"Predicted by AIConfigurator for vLLM with bf16, not measured; {name}."
    return tuple(
        _conversion(Kind(model, hardware, tensor_parallel_size, name), fit_steps(of_model), "predicted", origin)
        for model, of_model in samples.items()
    )


def _predicted_for(name: str) -> tuple[str, int]:
    """GPU and tensor-parallel degree. A guess would give wrong memory, links and steps without a word."""
    system, degree = SYSTEM_PART.search(name), DEGREE_PART.search(name)
    if system is None or degree is None:
        raise ConfigError(
            f"{name}: the table does not say of which GPU and tensor-parallel degree it is; say so in the file's name, "
            f"as in aic_h200_sxm_vllm_bf16_tp1.csv; systems: {', '.join(SYSTEMS)}"
        )
    return SYSTEMS[system[1].lower()], int(degree[1])


def _conversion(
    kind: Kind,
    fit: StepFit,
    source: Literal["measured", "predicted"],
    origin: str,
    *,
    overheads: Overheads | None = None,
    longest_run_tokens: int = 0,
    power: Power | None = None,
    left_out: Sequence[str] = (),
) -> Conversion:
    costs = StepCosts(fit.prefill, fit.decode, fit.domain, source, origin)
    profile = assemble(kind, costs, overheads=overheads, longest_run_tokens=longest_run_tokens, power=power)
    thin = [f"thin: {words}" for words in fit.thin]
    return Conversion(profile, (*left_out, *describe_fit(profile), *thin))


def _prefill_sample(batch_size: int, tokens: int, seconds: float) -> StepSample:
    return StepSample(StepShape(batch_size * tokens, batch_size * chunk_pairs(tokens, 0), 0, 0), seconds)


@dataclass(frozen=True, slots=True)
class _Row:
    """A row by column name; what cannot be read stops the conversion with file, line and column."""

    where: str
    values: dict[str, str]

    def text(self, column: str) -> str:
        return self.values[column].strip()

    def number(self, column: str) -> float:
        try:
            value = float(self.values[column])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ConfigError(f"{self.where}: {column}: {self.values[column]!r} is not a number")
        return value

    def count(self, column: str) -> int:
        value = self.number(column)
        if not 1 <= value <= 1e9 or value != int(value):
            raise ConfigError(f"{self.where}: {column}: {self.values[column]!r} is not a whole number above 0")
        return int(value)

    def seconds(self, column: str) -> float:
        value = self.number(column)
        if value <= 0:
            raise ConfigError(f"{self.where}: {column}: {self.values[column]!r} is not a time in milliseconds")
        return value / 1e3


def _rows(lines: Iterable[str], name: str, columns: Sequence[str]) -> Iterator[_Row]:
    reader = csv.DictReader(lines)
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise ConfigError(f"{name}: the header has no column {missing[0]}")
    is_empty = True
    for values in reader:
        is_empty = False
        where = f"{name}: line {reader.line_num}"
        if None in values or None in values.values():
            raise ConfigError(f"{where}: does not have the {len(reader.fieldnames or ())} columns of the header")
        yield _Row(where, values)
    if is_empty:
        raise ConfigError(f"{name}: holds no rows")
