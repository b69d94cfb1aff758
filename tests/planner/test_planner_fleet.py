"""A simulated fleet: unequal workers, hosts, deaths, flips, coming and going; and prompts that begin alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from planner_setups import BANDWIDTH, KV_BYTES, PREFILL_FIXED_S, TOKEN_S, make_config, make_profile

from pdserve.cluster.arrivals import Arrival, Lengths, Workload, synthesize
from pdserve.cluster.planner.profile import Contention, DecodeRegion, LinkCost, PrefillRegion, Slowdown
from pdserve.cluster.planner.simulation import Outcome, simulate
from pdserve.cluster.planner.source import OpenLoop
from pdserve.cluster.planner.steering import Action, Fail, Flip, Script, Start, Stop
from pdserve.cluster.planner.timelapse import Timelapse
from pdserve.cluster.planner.virtual_router import Record
from pdserve.cluster.planner.workload import parse_workload
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import Role, WorkerLoad

PROFILES = {str(role): make_profile() for role in Role}
SLOW_DECODE = (DecodeRegion(num_samples=0, fixed_s=0.02, per_sequence_s=0.005, per_context_token_s=0.0),)


def traffic(num_requests: int = 200, rate: float = 8.0, seed: int = 0) -> list[Arrival]:
    return list(
        synthesize(Workload(Lengths(300, 900), Lengths(30, 60), rate), num_requests, np.random.default_rng(seed))
    )


def served(arrivals: Sequence[Arrival], sizes: tuple[int, int, int] = (1, 1, 0), **options: Any) -> Outcome:
    profiles = options.pop("profiles", PROFILES)
    engine = options.pop("engine", {})
    return simulate(make_config(*sizes, engine=engine), profiles, OpenLoop(iter(arrivals)), **options)


def script(*actions: tuple[float, Action]) -> Script:
    return Script(actions)


def assert_clean(outcome: Outcome, num_requests: int) -> None:
    assert len(outcome.records) == num_requests
    assert set(outcome.blocks_left.values()) == set(outcome.handoffs_left.values()) == {0}


def test_a_slower_worker_of_a_role_gets_fewer_requests() -> None:
    profiles = PROFILES | {"decode-1": make_profile(name="slow", decode=SLOW_DECODE)}
    outcome = served(traffic(rate=20.0), (1, 2, 0), profiles=profiles)
    placed = Counter(record.decode_id for record in outcome.records)
    assert placed["decode-1"] < 0.6 * placed["decode-0"]
    assert_clean(outcome, 200)


def test_different_profiles_may_have_one_name() -> None:
    fixed = (PrefillRegion(num_samples=0, fixed_s=10.0, per_token_s=0.0, per_pair_s=0.0),)
    profiles = {"prefill": make_profile(), "prefill-1": make_profile(prefill=fixed), "decode": make_profile()}
    outcome = served([Arrival(0.0, 500, 5), Arrival(0.0, 500, 5)], (2, 1, 0), profiles=profiles)
    assert sorted(outcome.busy_s.values())[1:] == pytest.approx([PREFILL_FIXED_S + 500 * TOKEN_S, 10.0])


@pytest.mark.parametrize(("num_gpus", "failure"), [(0.0, "input"), (1.0, "")])
def test_a_worker_without_a_gpu_has_the_pool_that_its_engine_is_given(num_gpus: float, failure: str) -> None:
    profile = make_profile(num_gpus=num_gpus)
    engine = {"kv_cache_memory_bytes": 30 * 16 * KV_BYTES}
    arrivals = [Arrival(0.0, 480 - 8, 5), Arrival(0.0, 480 + 8, 5)]
    records = served(arrivals, (0, 0, 1), profiles={"mixed": profile}, engine=engine).records
    assert sorted(record.failure.partition(":")[0] for record in records) == ["", failure]


def test_a_pool_without_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.kv_cache_memory_bytes: 1 bytes hold no KV block"):
        served([], profiles=dict.fromkeys(Role, make_profile(num_gpus=0)), engine={"kv_cache_memory_bytes": 1})


def slowdown(beside_prefill: float, beside_decode: float) -> Slowdown:
    return Slowdown(beside_prefill=beside_prefill, beside_decode=beside_decode)


def beside_each_other(num_workers: int, **options: Any) -> list[float]:
    """How long two requests that nearly only decode take on two of these workers, half a step apart."""
    contention = Contention(prefill=slowdown(0.0, 0.0), decode=slowdown(0.0, 0.5))
    profile = make_profile(contention=contention)
    arrivals = [Arrival(1.0, 16, 500), Arrival(1.004, 16, 500)]
    outcome = served(arrivals, (0, 0, num_workers), profiles={"mixed": profile}, **options)
    assert len({record.decode_id for record in outcome.records}) == 2
    assert {record.failure for record in outcome.records} == {""}
    return [(record.end_s or 0.0) - record.arrival.at_s for record in outcome.records]


def test_workers_of_one_host_slow_each_other_down_and_those_of_different_hosts_do_not() -> None:
    far = beside_each_other(2, workers_per_host=1)
    near = beside_each_other(2)
    assert near == pytest.approx([took_s * 1.5 for took_s in far], rel=0.02)
    # Of two others on the host one computes: half of the price.
    assert beside_each_other(3) == pytest.approx([took_s * 1.25 for took_s in far], rel=0.02)


@pytest.mark.parametrize(("beside_prefill", "slower"), [(0.0, 1.0), (0.8, 1.8)])
def test_company_that_prefills_has_a_price_of_its_own(beside_prefill: float, slower: float) -> None:
    """One answer beside one long prompt in small chunks that is computed all the while."""
    contention = Contention(prefill=slowdown(0.0, 0.0), decode=slowdown(beside_prefill, 5.0))
    profiles = dict.fromkeys(Role, make_profile(contention=contention, max_model_len=100_000))
    arrivals = [Arrival(0.0, 16, 100), Arrival(0.05, 50_000, 1)]
    alone, _ = served(arrivals, (0, 0, 2), profiles=profiles, workers_per_host=1).records
    beside, _ = served(arrivals, (0, 0, 2), profiles=profiles).records
    assert alone.decode_id == beside.decode_id
    alone_ms, beside_ms = alone.timing().tpot_ms(), beside.timing().tpot_ms()
    assert alone_ms is not None
    assert beside_ms == pytest.approx(alone_ms * slower, rel=0.1)


def test_a_dead_worker_is_no_company() -> None:
    gone = beside_each_other(3, steering=script((0.5, Fail("mixed-2"))))
    assert gone == pytest.approx(beside_each_other(2), rel=1e-9)


@pytest.mark.parametrize("sizes", [(2, 2, 0), (0, 0, 3), (1, 1, 1)])
def test_standing_changes_nothing_among_workers_that_slow_each_other_down(sizes: tuple[int, int, int]) -> None:
    contention = Contention(prefill=slowdown(0.3, 0.1), decode=slowdown(0.2, 0.7))
    profiles = dict.fromkeys(Role, make_profile(contention=contention))
    steering = [(6.0, Fail(f"{'mixed' if sizes[2] else 'decode'}-0", 1.0))]
    exact, fast = (
        served(
            traffic(rate=20.0), sizes, profiles=profiles, exact=exact, workers_per_host=3, steering=script(*steering)
        )
        for exact in (True, False)
    )
    assert (fast.records, fast.busy_s, fast.num_steps) == (exact.records, exact.busy_s, exact.num_steps)
    assert fast.busy_s != served(traffic(rate=20.0), sizes, steering=script(*steering)).busy_s


def test_workers_on_other_hosts_use_the_links_that_reach_them() -> None:
    links = {
        "shm": LinkCost(latency_s=0.0, bandwidth_bytes_per_s=1e15),
        "gloo": LinkCost(latency_s=0.0, bandwidth_bytes_per_s=BANDWIDTH),
    }
    profiles = {str(role): make_profile(links=links) for role in Role}
    arrivals = [Arrival(0.0, 500, 5)]
    near = served(arrivals, profiles=profiles).records[0]
    far = served(arrivals, profiles=profiles, workers_per_host=1).records[0]
    assert near.end_s is not None
    assert far.end_s == pytest.approx(near.end_s + 500 * KV_BYTES / BANDWIDTH, rel=0.05)


def test_hosts_without_a_link_between_them_are_refused_before_anything_runs() -> None:
    profiles = {
        str(role): make_profile(links={"shm": LinkCost(latency_s=0.0, bandwidth_bytes_per_s=1e9)}) for role in Role
    }
    with pytest.raises(ConfigError, match="different hosts"):
        served(traffic(5), profiles=profiles, workers_per_host=1)


def test_requests_of_a_dead_decode_worker_end_and_its_successor_serves() -> None:
    outcome = served(traffic(), (1, 1, 0), steering=script((10.0, Fail("decode-0", back_after_s=2.0))))
    lost = [record for record in outcome.records if record.failure == "worker decode-0 was lost"]
    refused = [record for record in outcome.records if record.failure.startswith("no decode worker")]
    assert lost
    assert all(record.end_s == 10.0 for record in lost)
    assert refused
    assert all(10.0 <= record.arrival.at_s < 12.1 for record in refused)
    late = [record for record in outcome.records if record.arrival.at_s > 12.1]
    assert late
    assert {record.failure for record in late} == {""}
    assert_clean(outcome, 200)


def test_a_dead_prefill_worker_takes_only_those_with_it_that_nobody_decodes_yet() -> None:
    outcome = served(traffic(rate=20.0), (2, 2, 0), steering=script((5.0, Fail("prefill-0"))))
    around = [
        record
        for record in outcome.records
        if record.prefill_id == "prefill-0" and record.arrival.at_s < 5.0 < (record.end_s or 0.0)
    ]
    ended_well = [record for record in around if not record.failure]
    assert ended_well
    lost = [record for record in outcome.records if record.failure]
    assert {record.failure for record in lost} <= {"worker prefill-0 was lost"}
    assert all(record.prefill_id == "prefill-0" for record in lost)
    assert all(record.prefill_id == "prefill-1" for record in outcome.records if record.arrival.at_s > 5.0)
    assert_clean(outcome, 200)


@pytest.mark.parametrize("worker_id", ["prefill-0", "decode-0", "decode-1", "mixed-0"])
@pytest.mark.parametrize("at_s", [0.5, 3.0, 3.3])
def test_whoever_dies_whenever_nothing_hangs_and_no_block_is_lost(worker_id: str, at_s: float) -> None:
    actions = script((at_s, Fail(worker_id, 0.3)), (at_s + 0.1, Fail("prefill-1", 0.5)))
    outcome = served(traffic(rate=25.0), (2, 2, 1), steering=actions, engine={"num_blocks": 300})
    assert_clean(outcome, 200)


def test_a_worker_that_turns_loses_nobody_and_then_serves_the_other_side() -> None:
    outcome = served(traffic(rate=12.0), (2, 1, 0), steering=script((5.0, Flip("prefill-1", Role.DECODE))))
    assert {record.failure for record in outcome.records} == {""}
    before = [record for record in outcome.records if record.arrival.at_s < 5.0]
    after = [record for record in outcome.records if record.arrival.at_s > 7.5]
    assert {record.decode_id for record in before} == {"decode-0"}
    assert {record.prefill_id for record in after} == {"prefill-0"}
    assert {record.decode_id for record in after} == {"decode-0", "prefill-1"}
    first = min(record.arrival.at_s for record in outcome.records if record.decode_id == "prefill-1")
    assert first > 5.0 + make_profile().flip_s
    assert_clean(outcome, 200)


def test_a_worker_turns_back_when_it_is_told_soon_after() -> None:
    profiles = {str(role): make_profile(flip_s=20.0) for role in Role}
    actions = script((5.0, Flip("prefill-1", Role.DECODE)), (27.0, Flip("prefill-1", Role.PREFILL)))
    outcome = served(traffic(350, rate=5.0), (2, 1, 0), profiles=profiles, steering=actions)
    decodes = [record.arrival.at_s for record in outcome.records if record.decode_id == "prefill-1"]
    prefills = [record.arrival.at_s for record in outcome.records if record.prefill_id == "prefill-1"]
    assert 25.0 < min(decodes) < max(decodes) < 27.5
    again = [at_s for at_s in prefills if at_s > 6.0]
    assert 47.0 < min(again) < 50.0
    assert_clean(outcome, 350)


def test_a_worker_that_is_started_serves_when_it_is_up() -> None:
    actions = script((3.0, Start(Role.DECODE)), (3.0, Start(Role.PREFILL)))
    outcome = served(traffic(rate=12.0), (1, 1, 0), steering=actions)
    for side in ("prefill", "decode"):
        first = min(record.arrival.at_s for record in outcome.records if getattr(record, f"{side}_id") == f"{side}-1")
        assert 3.0 + make_profile().startup_s < first < 14.0
    assert_clean(outcome, 200)


@pytest.mark.parametrize("worker_id", ["prefill-1", "decode-1", "mixed-0"])
@pytest.mark.parametrize("at_s", [2.0, 5.003, 7.7])
def test_a_worker_that_is_stopped_ends_what_it_has_and_leaves(worker_id: str, at_s: float) -> None:
    sizes = (0, 0, 2) if worker_id == "mixed-0" else (2, 2, 0)
    outcome = served(traffic(rate=20.0), sizes, steering=script((at_s, Stop(worker_id))))
    assert {record.failure for record in outcome.records} == {""}
    used = [r.arrival.at_s for r in outcome.records if worker_id in (r.prefill_id, r.decode_id)]
    assert 0.0 < max(used) < at_s + 0.1
    assert worker_id not in outcome.blocks_left
    assert_clean(outcome, 200)


def test_a_worker_that_is_stopped_waits_for_a_request_on_its_way_to_it() -> None:
    outcome = served([Arrival(1.0, 100, 5)], (0, 0, 1), steering=script((1.001, Stop("mixed-0"))))
    assert [record.failure for record in outcome.records] == [""]
    assert not outcome.blocks_left


def test_a_controller_sees_the_routers_queue() -> None:
    class StartsForTheQueue:
        def __init__(self) -> None:
            self.at_s = 0.5
            self.queued: list[int] = []

        def next_s(self) -> float:
            return self.at_s

        def act(self, now_s: float, loads: Sequence[WorkerLoad], num_queued: int) -> Sequence[Action]:
            self.at_s = now_s + 0.5
            self.queued.append(num_queued)
            return (Start(Role.MIXED),) if num_queued > 5 and len(loads) < 2 else ()

    steering = StartsForTheQueue()
    config = make_config(0, 0, 1, router={"max_inflight_requests": 3, "max_queued_requests": 500})
    outcome = simulate(config, PROFILES, OpenLoop(iter(traffic(rate=20.0))), steering=steering)
    assert max(steering.queued) > 5
    assert {record.decode_id for record in outcome.records} >= {"mixed-0", "mixed-1"}


def test_a_controller_sees_the_loads_and_acts_on_them() -> None:
    class TurnsWhenBusy:
        """Turns a prefill worker when more than five sequences decode."""

        def __init__(self) -> None:
            self.at_s = 0.5
            self.turned_s: float | None = None

        def next_s(self) -> float:
            return self.at_s

        def act(self, now_s: float, loads: Sequence[WorkerLoad], num_queued: int) -> Sequence[Action]:
            self.at_s = now_s + 0.5
            busy = [load for load in loads if load.role is Role.DECODE and load.num_running > 5]
            if not busy or self.turned_s is not None:
                return ()
            self.turned_s = now_s
            return (Flip("prefill-1", Role.DECODE),)

    steering = TurnsWhenBusy()
    outcome = served(traffic(rate=40.0), (2, 1, 0), steering=steering)
    assert steering.turned_s is not None
    assert any(record.decode_id == "prefill-1" for record in outcome.records)
    assert_clean(outcome, 200)


def test_what_cannot_be_done_is_ignored() -> None:
    actions = script((1.0, Fail("nobody")), (1.0, Flip("decode-0", Role.DECODE)), (1e9, Fail("decode-0")))
    assert served(traffic(), steering=actions).records == served(traffic()).records


def conversations(**options: Any) -> Outcome:
    source = parse_workload("sessions?prompt=120&output=60&rate=2&mean_turns=5&think_s=2").source(2.0, 0, 150)
    return simulate(make_config(1, 1), PROFILES, source, **options)


def test_prefix_caches_find_what_was_said_before() -> None:
    cold, warm = conversations(), conversations(are_prompts_shared=True)
    assert cold.num_prefix_hit_tokens == 0
    assert warm.num_prefix_hit_tokens > 0.3 * warm.num_prefix_query_tokens
    assert warm.busy_s["prefill-0"] < 0.8 * cold.busy_s["prefill-0"]
    assert warm.num_kv_bytes < 0.7 * cold.num_kv_bytes  # what the decode worker holds is not sent again
    assert_clean(warm, len(warm.records))


def test_a_shared_system_prompt_is_computed_once() -> None:
    written = "synthetic?prompt=50&output=10&rate=5"
    parsed = parse_workload({**_fields(written), "prefixes": {"tokens": [1024], "share": 1.0}})
    warm = simulate(make_config(1, 1), PROFILES, parsed.source(5.0, 0, 60), are_prompts_shared=True)
    hit = warm.num_prefix_hit_tokens / warm.num_prefix_query_tokens
    assert hit == pytest.approx(1024 / 1074 * 59 / 60, abs=0.03)


def _fields(written: str) -> dict[str, Any]:
    kind, _, rest = written.partition("?")
    return {"kind": kind, **{key: float(value) for key, value in (pair.split("=") for pair in rest.split("&"))}}


@pytest.mark.parametrize("num_blocks", [None, 150])
def test_standing_changes_nothing_with_prefix_caches_either(num_blocks: int | None) -> None:
    config = make_config(1, 1, engine={"num_blocks": num_blocks} if num_blocks else {})
    outcomes = []
    for exact in (True, False):
        source = parse_workload("sessions?prompt=120&output=60&rate=4&mean_turns=4&think_s=1").source(4.0, 1, 120)
        outcomes.append(simulate(config, PROFILES, source, exact=exact, are_prompts_shared=True))
    exactly, fast = outcomes
    assert fast.records == exactly.records
    assert fast.num_prefix_hit_tokens == exactly.num_prefix_hit_tokens > 0


def test_records_can_be_taken_as_they_come_and_a_lapse_is_recorded() -> None:
    taken: list[Record] = []
    lapse = Timelapse(interval_s=0.5)
    outcome = served(traffic(), on_record=taken.append, lapse=lapse)
    assert outcome.records == ()
    assert len(taken) == 200
    story = lapse.lapse()
    assert len(story.at_s) > 20
    running = {track.worker_id: track.num_running for track in story.tracks}
    assert max(number or 0 for number in running["decode-0"]) > 0
