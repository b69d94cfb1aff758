"""What a worker costs in money and in watts: nothing that is measured, so that whoever knows it says it.

Fills in the fields of a profile that `tune` and `simulate` compute cost and energy from. Knows neither currencies nor
where the figures come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import typer

from pdserve.cluster.planner.profile import Power, Profile
from pdserve.proto.errors import ConfigError

PricePerGpuHour: TypeAlias = Annotated[
    float | None, typer.Option(help="Money for an hour of one GPU, or of one worker where these have no GPU.")
]
PowerIdleW: TypeAlias = Annotated[float | None, typer.Option(help="Watts of one worker that does nothing.")]
PowerPrefillW: TypeAlias = Annotated[float | None, typer.Option(help="Watts of one worker in steps of prefill.")]
PowerDecodeW: TypeAlias = Annotated[float | None, typer.Option(help="Watts of one worker in steps of decode.")]


@dataclass(frozen=True, slots=True)
class Prices:
    """As given: `None` is not known. Power comes with the watts of both phases or not at all.

    Raises:
        ConfigError: naming the option.
    """

    price_per_gpu_hour: float | None = None
    power_idle_w: float | None = None
    power_prefill_w: float | None = None
    power_decode_w: float | None = None

    def __post_init__(self) -> None:
        for option, value in (
            ("--price-per-gpu-hour", self.price_per_gpu_hour),
            ("--power-idle-w", self.power_idle_w),
            ("--power-prefill-w", self.power_prefill_w),
            ("--power-decode-w", self.power_decode_w),
        ):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{option}: {value!r} is neither 0 nor a positive number")
        watts = self.power_idle_w, self.power_prefill_w, self.power_decode_w
        if watts != (None, None, None) and None in watts[1:]:
            missing = "--power-prefill-w" if self.power_prefill_w is None else "--power-decode-w"
            raise ConfigError(f"{missing}: is missing; power needs the watts of prefill and of decode")

    def filled_in(self, profile: Profile) -> Profile:
        """The profile with what was given; the rest stays as it is."""
        changes: dict[str, object] = {}
        if self.price_per_gpu_hour is not None:
            changes["price_per_gpu_hour"] = self.price_per_gpu_hour
        if self.power_prefill_w is not None and self.power_decode_w is not None:
            changes["power"] = Power(
                idle_w=self.power_idle_w, prefill_w=self.power_prefill_w, decode_w=self.power_decode_w
            )
        if changes:
            changes["origin"] = f"{profile.origin} Given, not measured: {', '.join(changes)}."
        return profile.model_copy(update=changes)
