"""KV between simulated workers: one part at a time on each way, in order, and nobody waits for what is free."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pdserve.cluster.planner.profile import LinkCost
from pdserve.cluster.planner.virtual_links import VirtualLinks

COST = LinkCost(latency_s=0.25, bandwidth_bytes_per_s=100.0)


def ends(*parts: tuple[str, int, float]) -> list[float]:
    """When the parts arrive; each as `p0 d1`, its bytes and when it is asked for."""
    links = VirtualLinks()
    found = []
    for pair, num_bytes, now_s in parts:
        source, target = pair.split()
        found.append(links.send(source, target, COST, num_bytes, now_s))
    return found


def test_a_part_takes_latency_and_bytes_by_bandwidth() -> None:
    assert ends(("p0 d0", 100, 2.0)) == [3.25]


def test_parts_from_one_worker_and_to_one_worker_follow_each_other() -> None:
    assert ends(("p0 d0", 100, 0.0), ("p0 d1", 100, 0.0), ("p1 d1", 100, 0.5)) == [1.25, 2.25, 3.25]


def test_a_part_that_waits_for_its_target_keeps_nobody_else_out() -> None:
    """`d0` is busy for 10 s; until then `p1` has time for `d1`, but not to overtake its own part to `d0`."""
    busy, waiting = ("p0 d0", 1000, 0.0), ("p1 d0", 300, 0.0)
    assert ends(busy, waiting, ("p1 d1", 200, 1.0), ("p1 d0", 100, 1.0)) == [10.25, 13.25, 3.25, 14.25]


def test_what_does_not_fit_before_a_part_that_waits_goes_behind_it() -> None:
    assert ends(("p0 d0", 200, 0.0), ("p1 d0", 100, 0.0), ("p1 d1", 201, 0.0)) == [2.25, 3.25, 5.26]


sends = st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 500), st.floats(0.0, 3.0))


@given(st.lists(sends, max_size=40))
def test_nobody_sends_or_receives_two_parts_at_once_and_a_pair_keeps_its_order(
    parts: list[tuple[int, int, int, float]],
) -> None:
    links, now_s = VirtualLinks(), 0.0
    spans: dict[str, list[tuple[float, float]]] = {}
    arrivals: dict[tuple[int, int], list[float]] = {}
    for source, target, num_bytes, gap_s in parts:
        now_s += gap_s
        end_s = links.send(f"p{source}", f"d{target}", COST, num_bytes, now_s)
        began_s = end_s - COST.latency_s - num_bytes / COST.bandwidth_bytes_per_s
        assert began_s >= now_s - 1e-9
        arrivals.setdefault((source, target), []).append(end_s)
        for name in (f"p{source}", f"d{target}"):
            spans.setdefault(name, []).append((began_s, end_s - COST.latency_s))
    for found in spans.values():
        assert all(one[1] <= other[0] + 1e-9 for one, other in itertools.pairwise(sorted(found)))
    assert all(ends_s == sorted(ends_s) for ends_s in arrivals.values())
