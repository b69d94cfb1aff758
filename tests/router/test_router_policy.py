"""Policies are functions over loads: who is chosen, and who never is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from router_fakes import LAYOUT, make_load

from pdserve.proto.types import Role
from pdserve.router.candidates import Candidates
from pdserve.router.policy import POLICIES, least_loaded, round_robin, why_nobody
from pdserve.router.view import Pending, WorkerView


def view(worker_id: str, role: Role, pending: Pending = Pending(), **load: object) -> WorkerView:  # noqa: B008
    return WorkerView(make_load(worker_id, role, **load), LAYOUT, pending)


P0, P1 = view("p0", Role.PREFILL), view("p1", Role.PREFILL)
D0, D1 = view("d0", Role.DECODE), view("d1", Role.DECODE)
M0 = view("m0", Role.MIXED)


@pytest.mark.parametrize("policy", POLICIES.values())
def test_half_a_fleet_serves_nobody(policy) -> None:  # type: ignore[no-untyped-def]
    assert policy(Candidates([]), 10, 0) is None
    assert policy(Candidates([P0, P1]), 10, 0) is None
    assert policy(Candidates([D0, D1]), 10, 0) is None


@pytest.mark.parametrize("policy", POLICIES.values())
def test_workers_whose_layouts_differ_are_never_paired(policy) -> None:  # type: ignore[no-untyped-def]
    other = replace(D0, layout=replace(LAYOUT, num_layers=LAYOUT.num_layers + 1))
    assert policy(Candidates([P0, other]), 10, 0) is None
    assert "num_layers" in why_nobody([P0, other])
    placement = policy(Candidates([P0, other, D1]), 10, 0)
    assert placement.decode_id == "d1"


@pytest.mark.parametrize("policy", POLICIES.values())
def test_another_block_size_is_bridged(policy) -> None:  # type: ignore[no-untyped-def]
    other = replace(D0, layout=replace(LAYOUT, block_size=LAYOUT.block_size * 2))
    assert policy(Candidates([P0, other]), 10, 0) is not None


def test_nobody_is_explained() -> None:
    assert why_nobody([]) == "no prefill and no decode worker is ready"
    assert why_nobody([P0]) == "no decode worker is ready"
    assert why_nobody([D0, view("p9", Role.PREFILL, draining=True)]) == "no prefill worker is ready"


@pytest.mark.parametrize("policy", POLICIES.values())
@given(
    turn=st.integers(0, 1000), busy=st.lists(st.integers(0, 5000), min_size=5, max_size=5), drained=st.integers(0, 4)
)
def test_a_draining_worker_is_never_chosen(policy, turn: int, busy: list[int], drained: int) -> None:  # type: ignore[no-untyped-def]
    roles = [Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE, Role.MIXED]
    views = [
        view(f"w{number}", role, queued_tokens=tokens, draining=number == drained)
        for number, (role, tokens) in enumerate(zip(roles, busy, strict=True))
    ]
    placement = policy(Candidates(views), 100, turn)
    assert placement is not None
    assert f"w{drained}" not in (placement.prefill_id, placement.decode_id)
    kinds = {each.worker_id: each.load.role for each in views}
    pair = (kinds[placement.prefill_id], kinds[placement.decode_id])
    assert pair == (Role.PREFILL, Role.DECODE) or (
        pair[0] is Role.MIXED and placement.prefill_id == placement.decode_id
    )


def test_round_robin_visits_every_worker_equally() -> None:
    views = [P0, P1, D0, D1, M0]
    placements = [round_robin(Candidates(views), 10, turn) for turn in range(6)]
    chosen = [placement.decode_id for placement in placements if placement is not None]
    assert sorted(chosen) == ["d0", "d0", "d1", "d1", "m0", "m0"]


def test_least_loaded_takes_the_shortest_queue_on_each_side() -> None:
    views = [
        replace(P0, load=replace(P0.load, queued_tokens=500)),
        P1,
        D0,
        replace(D1, load=replace(D1.load, num_running=3)),
    ]
    placement = least_loaded(Candidates(views), 100, 0)
    assert placement is not None
    assert (placement.prefill_id, placement.decode_id) == ("p1", "d0")


def test_least_loaded_prefers_a_busy_decode_worker_with_room_to_an_idle_one_without() -> None:
    full = view("d0", Role.DECODE, free_blocks=4, reserved_blocks=4)
    busy = view("d1", Role.DECODE, num_running=20)
    placement = least_loaded(Candidates([P0, full, busy]), 100, 0)
    assert placement is not None
    assert placement.decode_id == "d1"


def test_what_this_router_has_sent_counts_before_the_worker_says_so() -> None:
    sent = replace(D0, pending=Pending(num_requests=1, num_blocks=7))
    placement = least_loaded(Candidates([P0, sent, D1]), 100, 0)
    assert placement is not None
    assert placement.decode_id == "d1"
    queued = replace(P0, pending=Pending(num_requests=1, prompt_tokens=100))
    placement = least_loaded(Candidates([queued, P1, D0]), 100, 1)
    assert placement is not None
    assert placement.prefill_id == "p1"


def test_pending_blocks_fill_a_worker_up() -> None:
    promised = view("d0", Role.DECODE, Pending(num_blocks=995))
    assert not promised.has_room(100)
    assert promised.has_room(80)


@pytest.mark.parametrize(
    ("num_running", "queued_tokens", "winner"), [(0, 0, "tie"), (2, 0, "split"), (0, 300, "split")]
)
def test_a_mixed_worker_competes_with_a_pair_under_the_same_costs(
    num_running: int, queued_tokens: int, winner: str
) -> None:
    mixed = view("m0", Role.MIXED, num_running=num_running, queued_tokens=queued_tokens)
    chosen = {least_loaded(Candidates([P0, D0, mixed]), 100, turn).decode_id for turn in range(2)}  # type: ignore[union-attr]
    assert chosen == ({"m0", "d0"} if winner == "tie" else {"d0"})
    busy_pair = [replace(P0, load=replace(P0.load, queued_tokens=1000)), D0]
    placement = least_loaded(Candidates([*busy_pair, mixed]), 100, 0)
    assert placement is not None
    assert placement.prefill_id == placement.decode_id == "m0"
