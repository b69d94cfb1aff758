"""What a set-up costs at a rate: money by what its GPUs are rented for, energy by how long they computed.

On a mixed worker both kinds of tokens share a GPU. Its steps are paid for by decoding, which needs them anyway, and
what prompts add to them by the prompts. Knows nothing of how a rate was found. A worker without GPUs counts as one GPU.
"""

from __future__ import annotations

from collections.abc import Mapping

from pdserve.cluster.planner.findings import Cost, Energy, Picture, Setup
from pdserve.cluster.planner.profile import Profile
from pdserve.cluster.planner.step_model import StepModel
from pdserve.cluster.planner.step_shape import StepShape, chunk_pairs
from pdserve.proto.types import Role

S_PER_HOUR = 3600.0
MILLION = 1e6


def cost_of(
    setup: Setup, picture: Picture, profiles: Mapping[Role, Profile], price_per_gpu_hour: float | None = None
) -> Cost | None:
    """`None` where a price is not known. A given price is for the GPUs of all roles."""
    per_hour_of: dict[Role, float] = {}
    for role, num in setup.num_workers.items():
        price = profiles[role].price_per_gpu_hour if price_per_gpu_hour is None else price_per_gpu_hour
        if price is None:
            return None
        per_hour_of[role] = num * (profiles[role].num_gpus or 1.0) * price
    mixed = per_hour_of.get(Role.MIXED, 0.0)
    prefill_share = _prefill_share(setup, picture, profiles) if mixed else 0.0
    input_per_hour = per_hour_of.get(Role.PREFILL, 0.0) + mixed * prefill_share
    per_hour = sum(per_hour_of.values())
    return Cost(
        per_hour=per_hour,
        per_million_requests=_per_million(per_hour, picture.rate),
        per_million_input_tokens=_per_million(input_per_hour, picture.prompt_tokens_per_s),
        per_million_output_tokens=_per_million(per_hour - input_per_hour, picture.output_tokens_per_s),
    )


def energy_of(setup: Setup, picture: Picture, profiles: Mapping[Role, Profile]) -> Energy | None:
    """`None` where the power of a role is not known."""
    watts, idle_is_known = 0.0, True
    for role in setup.num_workers:
        power = profiles[role].power
        if power is None:
            return None
        busy = _busy(picture, role)
        prefill_share = {Role.PREFILL: 1.0, Role.DECODE: 0.0}.get(role, _prefill_share(setup, picture, profiles))
        busy_w = prefill_share * power.prefill_w + (1 - prefill_share) * power.decode_w
        idle_is_known &= power.idle_w is not None
        watts += sum(share * busy_w + (1 - share) * (power.idle_w or 0.0) for share in busy)
    return Energy(
        joules_per_request=watts / picture.rate,
        joules_per_output_token=watts / max(picture.output_tokens_per_s, 1e-9),
        idle_is_known=idle_is_known,
    )


def _per_million(per_hour: float, per_s: float) -> float:
    return per_hour / S_PER_HOUR / max(per_s, 1e-9) * MILLION


def _busy(picture: Picture, role: Role) -> list[float]:
    return [share for name, share in picture.busy.items() if name.startswith(f"{role}-")]


def _prefill_share(setup: Setup, picture: Picture, profiles: Mapping[Role, Profile]) -> float:
    """Of the time that mixed workers compute: what the prompts add, by the slope of the profile at the chunk's size.

    Prompts are spread over prefill and mixed workers as their busy time is.
    """
    busy = sum(_busy(picture, Role.MIXED))
    if Role.MIXED not in setup.num_workers or busy <= 0:
        return 0.0
    prefill_busy = sum(_busy(picture, Role.PREFILL))
    if prefill_busy:
        # How the router shared prompts out is not in the picture; by numbers of workers is near enough for a price.
        num_prefill, num_mixed = setup.num_workers.get(Role.PREFILL, 0), setup.num_workers[Role.MIXED]
        prompt_tokens_per_s = picture.prompt_tokens_per_s * num_mixed / (num_mixed + num_prefill)
    else:
        prompt_tokens_per_s = picture.prompt_tokens_per_s
    model, chunk = StepModel(profiles[Role.MIXED]), setup.max_num_batched_tokens[Role.MIXED]
    whole = model.duration_s(StepShape(chunk, chunk_pairs(chunk, 0), 0, 0))
    least = model.duration_s(StepShape(1, chunk_pairs(1, 0), 0, 0))
    token_s = (whole - least) / max(1, chunk - 1)
    return min(1.0, prompt_tokens_per_s * token_s / busy)
