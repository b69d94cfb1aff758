"""What was measured of a worker to its profile, and what a reader should know of how good it is. Pure.

Knows nothing of how anything was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pdserve.cluster.planner.contention_fit import as_if_alone
from pdserve.cluster.planner.fit import StepFit, fit_steps
from pdserve.cluster.planner.profile import Contention, LinkCost, Overheads, Profile, describe_fit
from pdserve.cluster.planner.step_model import StepModel
from pdserve.cluster.planner.step_sample import StepSample
from pdserve.cluster.planner.step_shape import ALONE
from pdserve.cluster.profiling_links import HandoffCost
from pdserve.cluster.profiling_samples import Timing, bias_of, gap_of, samples_of, undisturbed
from pdserve.proto.errors import ConfigError

FORMAT = 1
LARGE_BIAS = 0.03
LARGE_LOSS = 0.2


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose profile it is. `num_gpus` is of one worker."""

    name: str
    model: str
    hardware: str
    num_gpus: float
    kv_bytes_per_token: int
    kv_capacity_tokens: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Everything of a profile that no step tells; `contention` counts where they do not tell it."""

    links: Mapping[str, LinkCost]
    overheads: Overheads
    startup_s: float
    flip_s: float
    contention: Contention | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """A profile with what there is to say about it: `fit` by region, `notes` on the whole, `warnings` to act on."""

    profile: Profile
    fit: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def surroundings_of(
    handoffs: Mapping[str, HandoffCost], overheads: Overheads, startup_s: float, flip_s: float
) -> Surroundings:
    """One fixed part of a hand-off for all links, that of the first; the others' latencies take up the difference."""
    fixed_s = next((cost.fixed_s for cost in handoffs.values()), 0.0)
    links = {
        kind: LinkCost(
            latency_s=max(0.0, cost.link.latency_s + cost.fixed_s - fixed_s),
            bandwidth_bytes_per_s=cost.link.bandwidth_bytes_per_s,
        )
        for kind, cost in handoffs.items()
    }
    return Surroundings(links, overheads.model_copy(update={"handoff_s": fixed_s}), startup_s, flip_s)


def profile_of(identity: Identity, timings: Sequence[Timing], around: Surroundings, origin: str) -> Finding:
    """
    Raises:
        ConfigError: too little was measured for a fit.
    """
    samples = samples_of(timings)
    try:
        fit = fit_steps(samples)
    except ConfigError as error:
        raise ConfigError(f"{error.message} ({len(timings)} steps were recorded); raise --budget-s") from error
    notes = list(_notes(timings, samples))
    if fit.contention is None and around.contention is not None:
        fit = _with_contention(samples, around.contention)
        notes.append("these steps do not tell what company costs a step: that is the base's")
    profile = Profile(
        format=FORMAT,
        name=identity.name,
        model=identity.model,
        hardware=identity.hardware,
        source="measured",
        origin=origin,
        num_gpus=identity.num_gpus,
        kv_bytes_per_token=identity.kv_bytes_per_token,
        kv_capacity_tokens=identity.kv_capacity_tokens,
        max_model_len=identity.max_model_len,
        prefill=fit.prefill,
        decode=fit.decode,
        decode_bend=fit.decode_bend,
        mixed=fit.mixed,
        domain=fit.domain,
        links=dict(around.links),
        overheads=around.overheads,
        contention=fit.contention,
        startup_s=around.startup_s,
        flip_s=around.flip_s,
    )
    warnings = [*_warnings(fit, profile, samples), *_disturbance(timings)]
    return Finding(profile, describe_fit(profile), tuple(notes), tuple(warnings))


def _with_contention(samples: Sequence[StepSample], contention: Contention) -> StepFit:
    """What steps take alone where it is known what company costs them."""
    alone = [replace(as_if_alone(sample, contention), company=ALONE) for sample in samples]
    return replace(fit_steps(alone), contention=contention)


def _notes(timings: Sequence[Timing], samples: Sequence[StepSample]) -> tuple[str, ...]:
    kept = len(undisturbed(timings))
    notes = [f"{len(timings):,} steps, {kept / len(timings):.0%} of them undisturbed; {len(samples):,} distinct ones"]
    gap = gap_of(timings)
    if gap is not None:
        per_sequence = f"{gap.per_sequence_s * 1e6:+.1f} us for each sequence"
        notes.append(f"a decode step's period is its duration and {gap.fixed_s * 1e6:.0f} us, {per_sequence}")
    return tuple(notes)


def _warnings(fit: StepFit, profile: Profile, samples: Sequence[StepSample]) -> tuple[str, ...]:
    warnings = [f"thin: {line}" for line in fit.thin]
    model = StepModel(profile)
    for phase, chosen in (
        ("prefill", [one for one in samples if not one.shape.num_decodes]),
        ("decode", [one for one in samples if not one.shape.num_prefill_tokens]),
        ("mixed", [one for one in samples if one.shape.num_decodes and one.shape.num_prefill_tokens]),
    ):
        bias = bias_of(model, chosen)
        if abs(bias) > LARGE_BIAS:
            warnings.append(
                f"{phase} steps: the model is {bias:+.1%} off their sum; measure on quiet cores, and longer"
            )
    return tuple(warnings)


def _disturbance(timings: Sequence[Timing]) -> tuple[str, ...]:
    lost = 1.0 - len(undisturbed(timings)) / max(1, len(timings))
    if lost <= LARGE_LOSS:
        return ()
    return (f"{lost:.0%} of the steps had to wait for their core: other processes disturb it, better measure again",)
