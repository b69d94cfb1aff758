"""Hand-offs of several sizes give a latency, a bandwidth, and the part that comes once."""

from __future__ import annotations

import pytest

from pdserve.cluster.planner.profile import LinkCost, Overheads
from pdserve.cluster.profiling_links import FASTEST_BYTES_PER_S, Handoff, HandoffCost, fit_handoffs
from pdserve.cluster.profiling_profile import surroundings_of
from pdserve.proto.errors import ConfigError

SIZES = (65_536, 524_288, 1_048_576, 2_097_152)


def handoffs(fixed_s: float, latency_s: float, bandwidth: float, extra_s: tuple[float, ...] = (0.0,)) -> list[Handoff]:
    return [
        Handoff(size, fixed_s + latency_s + size / bandwidth + extra, latency_s + size / bandwidth)
        for size in SIZES
        for extra in extra_s
    ]


def test_the_parts_are_told_apart() -> None:
    cost = fit_handoffs(handoffs(0.002, 0.0005, 1e9))
    assert cost.fixed_s == pytest.approx(0.002)
    assert cost.link.latency_s == pytest.approx(0.0005)
    assert cost.link.bandwidth_bytes_per_s == pytest.approx(1e9)


def test_single_hand_offs_that_were_held_up_change_nothing() -> None:
    cost = fit_handoffs(handoffs(0.002, 0.0005, 1e9, extra_s=(0.0, 0.0, 0.0, 0.0, 0.5)))
    assert cost.fixed_s == pytest.approx(0.002)
    assert cost.link.bandwidth_bytes_per_s == pytest.approx(1e9)


def test_bytes_that_take_no_time_are_as_fast_as_is_believed() -> None:
    cost = fit_handoffs([Handoff(size, 0.003, 0.001) for size in SIZES])
    assert cost.link.bandwidth_bytes_per_s == FASTEST_BYTES_PER_S
    assert cost.fixed_s == pytest.approx(0.002)


def test_one_size_gives_no_bandwidth() -> None:
    with pytest.raises(ConfigError, match="raise --budget-s"):
        fit_handoffs([Handoff(1, 0.1, 0.1)] * 3)


def test_the_preferred_link_says_what_comes_once_and_the_others_take_up_the_difference() -> None:
    shm = HandoffCost(LinkCost(latency_s=0.001, bandwidth_bytes_per_s=4e9), 0.002)
    gloo = HandoffCost(LinkCost(latency_s=0.001, bandwidth_bytes_per_s=1e9), 0.005)
    around = surroundings_of({"shm": shm, "gloo": gloo}, Overheads(request_s=0.003), 10.0, 0.1)
    assert around.overheads == Overheads(request_s=0.003, handoff_s=0.002)
    assert around.links["shm"] == shm.link
    assert around.links["gloo"].latency_s == pytest.approx(0.004)
