"""What a set-up costs, by figures that can be added up by hand."""

from __future__ import annotations

from typing import Any

import pytest
from planner_setups import make_profile

from pdserve.cluster.planner.costing import cost_of, energy_of
from pdserve.cluster.planner.findings import Picture, Setup
from pdserve.cluster.planner.fleets import fleets_of, parse_split
from pdserve.cluster.planner.profile import Power, Profile
from pdserve.cluster.planner.setups import Choices, start
from pdserve.proto.types import Role


def setup_of(text: str, **changes: Any) -> tuple[Setup, dict[Role, Profile]]:
    profile = make_profile(**changes)
    (fleet,) = fleets_of([profile], {})
    return start(fleet, parse_split(text), Choices()), dict.fromkeys(Role, profile)


def picture(busy: dict[str, float], rate: float = 10.0) -> Picture:
    """10 requests a second of 1,000 prompt tokens and 100 answer tokens."""
    return Picture(rate, (), (), (), busy, rate * 1000, rate * 100)


def test_of_a_split_each_side_pays_for_its_own_tokens() -> None:
    setup, profiles = setup_of("1P3D", price_per_gpu_hour=3.6)
    cost = cost_of(setup, picture({"prefill-0": 0.5, "decode-0": 0.5}), profiles)
    assert cost is not None
    assert cost.per_hour == pytest.approx(4 * 3.6)
    # 3.6 an hour is 0.001 a second, for 10,000 prompt tokens; thrice that for 1,000 answer tokens.
    assert cost.per_million_input_tokens == pytest.approx(0.1)
    assert cost.per_million_output_tokens == pytest.approx(3.0)
    assert cost.per_million_requests == pytest.approx(400.0)


def test_of_mixed_workers_prompts_pay_for_the_time_that_they_add() -> None:
    setup, profiles = setup_of("2M", price_per_gpu_hour=3.6)
    # 10,000 prompt tokens a second at 0.1 ms each are one worker's time, of 1.6 that are busy.
    cost = cost_of(setup, picture({"mixed-0": 0.8, "mixed-1": 0.8}), profiles)
    assert cost is not None
    assert cost.per_million_input_tokens == pytest.approx(0.2 * 1 / 1.6, rel=0.01)
    whole = cost.per_million_input_tokens * 10_000 + cost.per_million_output_tokens * 1_000
    assert whole / 1e6 == pytest.approx(2 * 0.001)


def test_a_price_that_is_given_is_taken_instead_of_the_profiles() -> None:
    setup, profiles = setup_of("2M", price_per_gpu_hour=3.6)
    cost = cost_of(setup, picture({"mixed-0": 0.8}), profiles, 1.0)
    assert cost is not None
    assert cost.per_hour == 2.0


def test_without_a_price_there_is_no_cost_and_without_power_no_energy() -> None:
    setup, profiles = setup_of("1P1D")
    assert cost_of(setup, picture({}), profiles) is None
    assert energy_of(setup, picture({}), profiles) is None


def test_a_worker_of_several_gpus_is_paid_for_all_of_them() -> None:
    setup, profiles = setup_of("1M", num_gpus=4, tensor_parallel_size=4, price_per_gpu_hour=2.0)
    cost = cost_of(setup, picture({"mixed-0": 0.5}), profiles)
    assert cost is not None
    assert cost.per_hour == 8.0


def test_energy_is_power_by_how_busy_each_worker_was() -> None:
    setup, profiles = setup_of("1P1D", power=Power(idle_w=100.0, prefill_w=700.0, decode_w=300.0))
    energy = energy_of(setup, picture({"prefill-0": 0.5, "decode-0": 1.0}), profiles)
    assert energy is not None
    assert energy.joules_per_request == pytest.approx((0.5 * 700 + 0.5 * 100 + 300) / 10)
    assert energy.joules_per_output_token == pytest.approx((0.5 * 700 + 0.5 * 100 + 300) / 1000)
    assert energy.idle_is_known


def test_energy_without_a_figure_for_idling_says_so() -> None:
    setup, profiles = setup_of("1P1D", power=Power(prefill_w=700.0, decode_w=300.0))
    energy = energy_of(setup, picture({"prefill-0": 0.5, "decode-0": 1.0}), profiles)
    assert energy is not None
    assert energy.joules_per_request == pytest.approx((0.5 * 700 + 300) / 10)
    assert not energy.idle_is_known


def test_a_mixed_worker_draws_what_its_mix_of_work_draws() -> None:
    setup, profiles = setup_of("2M", power=Power(idle_w=0.0, prefill_w=700.0, decode_w=300.0))
    energy = energy_of(setup, picture({"mixed-0": 0.8, "mixed-1": 0.8}), profiles)
    assert energy is not None
    assert energy.joules_per_request == pytest.approx((1.0 * 700 + 0.6 * 300) / 10, rel=0.01)
