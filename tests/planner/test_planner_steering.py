"""Orders to a simulated fleet: a machine is the same in any role, the last order counts, and none is lost silently."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
from planner_setups import BANDWIDTH, HANDOFF_S, KV_BYTES, LATENCY_S, make_config, make_profile

from pdserve.cluster.arrivals import Arrival
from pdserve.cluster.config import PoolConfig
from pdserve.cluster.planner.profile import LinkCost, PrefillRegion, Profile
from pdserve.cluster.planner.simulation import Outcome, simulate
from pdserve.cluster.planner.source import OpenLoop
from pdserve.cluster.planner.steering import Action, Fail, Flip, Script, Start, Steering, Stop
from pdserve.cluster.planner.virtual_router import Record
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import Role, WorkerLoad

PROFILES = {str(role): make_profile() for role in Role}
SLOW_PREFILL = (PrefillRegion(num_samples=0, fixed_s=0.3, per_token_s=0.0, per_pair_s=0.0),)


def steady(num_requests: int = 100, gap_s: float = 0.1, output: int = 8) -> list[Arrival]:
    return [Arrival(number * gap_s, 200, output) for number in range(num_requests)]


def served(
    arrivals: Sequence[Arrival], sizes: tuple[int, int, int], *actions: tuple[float, Action], **options: Any
) -> Outcome:
    config = make_config(*sizes, engine=options.pop("engine", {}), router=options.pop("router", {}))
    profiles = options.pop("profiles", PROFILES)
    steering: Steering = options.pop("steering", None) or Script(actions)
    outcome = simulate(config, profiles, OpenLoop(iter(arrivals)), steering=steering, **options)
    assert len(outcome.records) == len(arrivals)
    assert set(outcome.blocks_left.values()) | set(outcome.handoffs_left.values()) <= {0}
    return outcome


def failures(outcome: Outcome) -> set[str]:
    return {record.failure for record in outcome.records}


def undone(outcome: Outcome) -> list[tuple[float, Action, str]]:
    return [(one.at_s, one.action, one.why) for one in outcome.undone]


def prefilled_by(outcome: Outcome, worker_id: str, after_s: float) -> list[Record]:
    return [one for one in outcome.records if one.prefill_id == worker_id and one.arrival.at_s > after_s]


# Hand-offs that come to nothing.


def test_answers_of_one_token_leave_no_lease_and_let_their_worker_turn() -> None:
    outcome = served(steady(output=1), (2, 1, 0), (5.0, Flip("prefill-1", Role.DECODE)))
    assert failures(outcome) == {""}
    assert outcome.undone == ()
    after = [record for record in outcome.records if record.arrival.at_s > 7.0]
    assert {record.decode_id for record in after} == {"decode-0", "prefill-1"}


# A machine in any role.


def test_a_worker_may_get_a_role_that_no_profile_is_for_and_have_its_old_one_again() -> None:
    profiles = {"prefill": make_profile(), "decode": make_profile()}
    turns = (2.0, Flip("decode-0", Role.MIXED)), (5.0, Flip("decode-0", Role.DECODE))
    outcome = served(steady(), (1, 2, 0), *turns, profiles=profiles)
    assert failures(outcome) == {""}
    assert any(record.prefill_id == "decode-0" for record in outcome.records)
    assert {record.decode_id for record in outcome.records if record.arrival.at_s > 8.0} == {"decode-0", "decode-1"}


def test_all_workers_may_get_roles_that_nobody_had() -> None:
    turns = (2.0, Flip("mixed-0", Role.PREFILL)), (2.0, Flip("mixed-1", Role.DECODE))
    outcome = served(steady(), (0, 0, 2), *turns, profiles={"mixed": make_profile()})
    assert failures(outcome) <= {"", "no prefill and no decode worker is ready"}
    late = [record for record in outcome.records if record.arrival.at_s > 4.0]
    assert {(record.prefill_id, record.decode_id, record.failure) for record in late} == {("mixed-0", "mixed-1", "")}


def test_a_worker_that_turned_and_died_comes_back_on_the_same_machine() -> None:
    profiles = PROFILES | {"decode": make_profile(name="slow", prefill=SLOW_PREFILL)}
    actions = (1.0, Flip("decode-0", Role.PREFILL)), (4.0, Fail("decode-0", back_after_s=1.0))
    outcome = served(steady(), (1, 2, 0), *actions, profiles=profiles)
    took_s = [record.prefilled_s - record.prefill_started_s for record in prefilled_by(outcome, "decode-0", 5.1)]
    assert took_s
    assert min(took_s) == pytest.approx(0.3)


def test_its_links_are_its_machines_too() -> None:
    """Both ends of the way to it are fast, though decode workers' links are slow."""
    slow = {"gloo": LinkCost(latency_s=0.5, bandwidth_bytes_per_s=1e9)}
    profiles = PROFILES | {"decode": make_profile(name="far", links=slow)}
    outcome = served(steady(), (2, 1, 0), (2.0, Flip("prefill-1", Role.DECODE)), profiles=profiles)
    moved_s = {
        name: min(one.admitted_s - one.prefilled_s for one in outcome.records if one.decode_id == name)
        for name in ("decode-0", "prefill-1")
    }
    assert moved_s["decode-0"] > 0.5
    assert moved_s["prefill-1"] == pytest.approx(HANDOFF_S + LATENCY_S + 13 * 16 * KV_BYTES / BANDWIDTH)


# What cannot work is said before anything runs.


def only(*kinds: str) -> Profile:
    return make_profile(links=dict.fromkeys(kinds, LinkCost(latency_s=0.0, bandwidth_bytes_per_s=1e9)))


@pytest.mark.parametrize(
    ("action", "profiles", "message"),
    [
        (
            Start(Role.MIXED),
            {"prefill": make_profile(), "decode": make_profile()},
            "--profile: there is none for mixed",
        ),
        (
            Flip("decode-1", Role.PREFILL),
            PROFILES | {"decode-1": only("shm", "gloo"), "decode": only("gloo"), "prefill": only("shm", "gloo")},
            "",
        ),
        (
            Flip("prefill-0", Role.DECODE),
            PROFILES | {"prefill-0": only("gloo"), "prefill-1": only("shm"), "decode": only("gloo", "shm")},
            r"--flip prefill-0=decode: kv_transfer\.links: none of",
        ),
        (
            Start(Role.PREFILL),
            PROFILES | {"prefill-2": only("shm")},
            r"starting prefill-2: kv_transfer\.links: none of",
        ),
    ],
    ids=["no profile", "all is well", "no link", "no link of its own"],
)
def test_a_role_that_a_script_gives_is_checked_before_anything_runs(
    action: Action, profiles: Any, message: str
) -> None:
    for orders in (Script(), Script([(1e6, action)])):
        with pytest.raises(ConfigError, match=message) if message and orders.left else nullcontext():
            simulate(make_config(2, 2), profiles, OpenLoop(iter(())), steering=orders)


def test_so_is_the_pool_that_it_will_have_when_it_comes_back_in_that_role() -> None:
    small = PoolConfig(replicas=0, engine={"kv_cache_memory_bytes": 1})
    config = make_config().model_copy(update={"mixed": small})
    profiles = dict.fromkeys(Role, make_profile(num_gpus=0))
    simulate(config, profiles, OpenLoop(iter(())))
    with pytest.raises(
        ConfigError, match=r"--flip decode-0=mixed: engine\.kv_cache_memory_bytes: 1 bytes hold no KV block"
    ):
        simulate(config, profiles, OpenLoop(iter(())), steering=Script([(1e6, Flip("decode-0", Role.MIXED))]))


def test_hosts_of_workers_that_are_started_count() -> None:
    profiles = dict.fromkeys(Role, only("shm"))
    assert served([], (1, 1, 0), (1.0, Start(Role.MIXED)), profiles=profiles, workers_per_host=2).records == ()
    with pytest.raises(ConfigError, match=r"starting decode-1: .* different hosts"):
        served([], (1, 1, 0), (1.0, Start(Role.DECODE)), profiles=profiles, workers_per_host=2)


def test_a_controller_that_makes_a_pair_without_a_link_ends_the_simulation_and_not_a_request() -> None:
    class TurnsOne:
        def __init__(self) -> None:
            self.at_s = 1.0

        def next_s(self) -> float:
            return self.at_s

        def act(self, now_s: float, loads: Sequence[WorkerLoad], num_queued: int) -> Sequence[Action]:
            self.at_s = float("inf")
            return (Flip("mixed-0", Role.DECODE),)

    with pytest.raises(ConfigError, match=r"kv_transfer\.links"):
        served(steady(), (1, 1, 1), profiles=PROFILES | {"mixed": only("shm")}, steering=TurnsOne())


# The last order counts.

DRAINS_LONG = [Arrival(0.0, 200, 600)] * 2  # for about 4 s
LATER = [Arrival(8.0 + number * 0.1, 200, 8) for number in range(100)]


def test_a_worker_that_is_told_to_stay_while_it_drains_stays() -> None:
    there, back = Flip("decode-1", Role.PREFILL), Flip("decode-1", Role.DECODE)
    outcome = served([*DRAINS_LONG, *LATER], (1, 2, 0), (1.0, there), (1.5, back))
    assert failures(outcome) == {""}
    assert not prefilled_by(outcome, "decode-1", 0.0)
    assert {record.decode_id for record in outcome.records if record.arrival.at_s > 2.0} == {"decode-0", "decode-1"}
    assert undone(outcome) == [(1.0, there, "a later order took its place")]


def test_a_worker_that_is_told_of_another_role_while_it_drains_gets_that_one() -> None:
    outcome = served(
        [*DRAINS_LONG, *LATER], (1, 2, 0), (1.0, Flip("decode-1", Role.PREFILL)), (1.5, Flip("decode-1", Role.MIXED))
    )
    assert any(one.prefill_id == one.decode_id == "decode-1" for one in outcome.records)
    assert not [one for one in prefilled_by(outcome, "decode-1", 0.0) if one.decode_id != "decode-1"]
    assert [one.at_s for one in outcome.undone] == [1.0]


def test_a_turn_that_has_begun_takes_its_time_again_when_it_is_taken_back() -> None:
    profiles = {str(role): make_profile(flip_s=5.0) for role in Role}
    orders = (1.0, Flip("prefill-1", Role.DECODE)), (4.0, Flip("prefill-1", Role.PREFILL))
    outcome = served(steady(150), (2, 1, 0), *orders, profiles=profiles)
    assert {record.decode_id for record in outcome.records} == {"decode-0"}
    assert min(one.arrival.at_s for one in prefilled_by(outcome, "prefill-1", 1.0)) == pytest.approx(9.0, abs=0.3)
    assert [one.at_s for one in outcome.undone] == [1.0]


def test_a_worker_may_be_told_to_leave_while_it_turns_and_to_stay_while_it_leaves() -> None:
    leaves = served([*DRAINS_LONG, *LATER], (1, 2, 0), (1.0, Flip("decode-1", Role.PREFILL)), (1.5, Stop("decode-1")))
    assert "decode-1" not in leaves.blocks_left
    stays = served([*DRAINS_LONG, *LATER], (1, 2, 0), (1.0, Stop("decode-1")), (1.5, Flip("decode-1", Role.DECODE)))
    assert any(one.decode_id == "decode-1" and one.arrival.at_s > 2.0 for one in stays.records)
    assert undone(stays) == [(1.0, Stop("decode-1"), "a later order took its place")]


@pytest.mark.parametrize("exact", [True, False])
def test_what_did_not_happen_is_told(exact: bool) -> None:
    turn = Flip("decode-1", Role.PREFILL)
    orders: list[tuple[float, Action]] = [
        (0.5, Flip("decode-0", Role.DECODE)),
        (0.6, Fail("nobody")),
        (1.0, turn),
        (1.1, turn),
        (1.2, Fail("decode-1", back_after_s=9.0)),
        (1.3, turn),
        (1.4, Fail("decode-1")),
        (1.5, Flip("decode-0", Role.MIXED)),
    ]
    script = Script([*orders, (500.0, Fail("prefill-0"))])
    outcome = served([Arrival(0.0, 200, 600)] * 4, (1, 2, 0), steering=script, exact=exact)
    assert [(one.at_s, one.why) for one in outcome.undone] == [
        (0.5, "it was a decode worker already"),
        (0.6, "there is no such worker"),
        (1.1, "it was on its way already"),
        (1.0, "it died before"),
        (1.3, "it was not alive then"),
        (1.4, "it was not alive then"),
        (1.5, "it still had requests, or was on its way, when the last request of all had ended"),
    ]
    assert script.left == ((500.0, Fail("prefill-0")),)


def test_nobody_is_steered_after_the_last_request() -> None:
    """Though what was under way then is still followed, to see that everything comes back."""
    outcome = served(steady(10), (1, 1, 0), (20.0, Fail("decode-0")))
    assert outcome.end_s < 20.0
    assert set(outcome.blocks_left) == {"prefill-0", "decode-0"}


# How busy they were.


def test_a_step_that_lasts_longer_than_the_last_request_counts_until_then() -> None:
    fixed = (PrefillRegion(num_samples=0, fixed_s=30.0, per_token_s=0.0, per_pair_s=0.0),)
    profiles = dict.fromkeys(Role, make_profile(prefill=fixed))
    router = {"default_timeout_s": 2.0}
    outcome = served([Arrival(0.0, 100, 5), Arrival(3.0, 100, 5)], (0, 0, 1), profiles=profiles, router=router)
    assert failures(outcome) == {"the deadline passed"}
    assert outcome.end_s == 5.0
    assert outcome.busy_s["mixed-0"] == pytest.approx(5.0, abs=0.01)
    assert 0.99 < outcome.busy["mixed-0"] <= 1.0


def test_a_worker_that_dies_was_busy_until_then() -> None:
    fixed = (PrefillRegion(num_samples=0, fixed_s=30.0, per_token_s=0.0, per_pair_s=0.0),)
    profiles, arrivals = {"mixed": make_profile(prefill=fixed)}, [Arrival(0.0, 100, 5)] * 2
    outcome = served(arrivals, (0, 0, 2), (1.0, Fail("mixed-0")), profiles=profiles)
    assert outcome.end_s > 30.0
    assert outcome.busy_s["mixed-0"] == pytest.approx(1.0, abs=0.01)
