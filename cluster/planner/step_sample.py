"""What a fit is made from: timed steps of like shape. Knows nothing of how they were timed."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.cluster.planner.step_shape import ALONE, Company, StepShape


@dataclass(frozen=True, slots=True)
class StepSample:
    """Timed steps of like shape: their mean, and how many they are.

    `company` is the share of that time in which the machine's other workers computed, by what they did.
    """

    shape: StepShape
    duration_s: float
    company: Company = ALONE
    num_steps: int = 1

    @property
    def is_mixed(self) -> bool:
        return self.shape.num_prefill_tokens > 0 and self.shape.num_decodes > 0
