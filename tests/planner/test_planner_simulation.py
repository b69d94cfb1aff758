"""The simulator: its times add up by hand, everything ends and comes back, and production code decides."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from planner_setups import (
    BANDWIDTH,
    CONTEXT_S,
    DECODE_FIXED_S,
    DELIVERY_S,
    HANDOFF_S,
    KV_BYTES,
    LATENCY_S,
    PREFILL_FIXED_S,
    REQUEST_S,
    SEQUENCE_S,
    TOKEN_S,
    make_config,
    make_profile,
    run,
)

from pdserve.cluster.arrivals import Arrival, Lengths, Workload, synthesize
from pdserve.cluster.planner.simulation import Outcome, simulate
from pdserve.cluster.planner.source import OpenLoop
from pdserve.cluster.planner.steering import Fail, Script
from pdserve.engine import scheduler
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.claims import Claims
from pdserve.engine.plan import Limit
from pdserve.engine.scheduler import Draft, Scheduler
from pdserve.engine.sequence import Finish, Sequence
from pdserve.kv_transfer.leases import LeaseTable
from pdserve.kv_transfer.reservation import Effects
from pdserve.kv_transfer.reservations import ReservationTable
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import FinishReason, Role
from pdserve.router import policy
from pdserve.router.admission import Admission
from pdserve.router.unseen import Unseen
from pdserve.router.view import Pending

TRAFFIC = Workload(Lengths(300, 900), Lengths(30, 60), rate=8.0)


def traffic(num_requests: int = 120, seed: int = 0, rate: float = 8.0) -> list[Arrival]:
    workload = Workload(TRAFFIC.prompt, TRAFFIC.output, rate)
    return list(synthesize(workload, num_requests, np.random.default_rng(seed)))


def latencies(outcome: Outcome) -> list[tuple[float | None, float | None]]:
    return [(record.first_token_s, record.end_s) for record in outcome.records]


def decode_s(num_steps: int, context: int) -> float:
    """Of one sequence alone, whose first step attends to `context` tokens."""
    return sum(DECODE_FIXED_S + SEQUENCE_S + CONTEXT_S * (context + step) for step in range(num_steps))


def test_a_lone_request_takes_what_its_parts_add_up_to() -> None:
    outcome = run(make_config(), [Arrival(1.0, 400, 10)])
    (record,) = outcome.records
    prefill_s = PREFILL_FIXED_S + 400 * TOKEN_S
    first_s = 1.0 + REQUEST_S + prefill_s
    assert record.first_token_s == pytest.approx(first_s + DELIVERY_S)
    transfer_s = LATENCY_S + 400 * KV_BYTES / BANDWIDTH
    last_s = first_s + HANDOFF_S + transfer_s + decode_s(9, 401)
    assert record.end_s == pytest.approx(last_s + DELIVERY_S)
    assert record.num_output_tokens == 10
    assert outcome.num_kv_bytes == 400 * KV_BYTES
    assert outcome.busy_s["prefill-0"] == pytest.approx(prefill_s)
    timing = record.timing()
    assert timing.ttft_ms() == pytest.approx((REQUEST_S + prefill_s + DELIVERY_S) * 1e3)


def test_kv_of_a_long_prompt_moves_while_later_chunks_are_computed() -> None:
    """Of 2,048 tokens in chunks of 512 the last chunk is left to move when the prompt is computed."""
    outcome = run(make_config(), [Arrival(0.0, 2048, 2)])
    (record,) = outcome.records
    computed_s = REQUEST_S + 4 * (PREFILL_FIXED_S + 512 * TOKEN_S)
    last_part_s = HANDOFF_S + LATENCY_S + 512 * KV_BYTES / BANDWIDTH
    assert record.end_s == pytest.approx(computed_s + last_part_s + decode_s(1, 2049) + DELIVERY_S)


def test_a_mixed_worker_hands_nothing_off() -> None:
    outcome = run(make_config(0, 0, 1), [Arrival(0.0, 400, 10)])
    (record,) = outcome.records
    assert record.prefill_id == record.decode_id == "mixed-0"
    assert outcome.num_kv_bytes == 0
    prefill_s = PREFILL_FIXED_S + 400 * TOKEN_S
    assert record.end_s == pytest.approx(REQUEST_S + prefill_s + decode_s(9, 401) + DELIVERY_S)


@pytest.mark.parametrize("sizes", [(1, 1, 0), (2, 1, 0), (1, 3, 0), (0, 0, 2), (1, 1, 1)])
def test_every_request_ends_once_and_every_block_comes_back(sizes: tuple[int, int, int]) -> None:
    arrivals = traffic()
    outcome = run(make_config(*sizes), arrivals)
    assert sorted(record.arrival.at_s for record in outcome.records) == [arrival.at_s for arrival in arrivals]
    assert {record.failure for record in outcome.records} == {""}
    assert all(record.num_output_tokens == record.arrival.max_tokens for record in outcome.records)
    assert set(outcome.blocks_left.values()) == set(outcome.handoffs_left.values()) == {0}


def test_the_same_seed_gives_the_same_and_another_one_another() -> None:
    one, again, other = (latencies(run(make_config(), traffic(seed=seed))) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_small_pools_evict_and_still_everything_ends() -> None:
    config = make_config(engine={"num_blocks": 80})
    short = [Arrival(arrival.at_s, min(arrival.num_prompt_tokens, 600), 100) for arrival in traffic(rate=30.0)]
    outcome = run(config, short)
    assert {record.failure for record in outcome.records} == {""}
    assert set(outcome.blocks_left.values()) == set(outcome.handoffs_left.values()) == {0}


def test_under_overload_requests_are_refused_or_miss_their_deadline_and_leave_nothing() -> None:
    config = make_config(router={"max_inflight_requests": 20, "max_queued_requests": 5, "default_timeout_s": 0.7})
    outcome = run(config, traffic(400, rate=200.0))
    failures = {record.failure for record in outcome.records}
    assert "the router's queue is full" in failures
    assert "the deadline passed" in failures
    assert len(outcome.records) == 400
    assert set(outcome.blocks_left.values()) == set(outcome.handoffs_left.values()) == {0}
    assert all(record.timing().last_token_s is None for record in outcome.records if record.failure)
    refused = [record for record in outcome.records if record.failure == "the router's queue is full"]
    assert all(record.end_s == record.arrival.at_s for record in refused)


def test_the_policy_counts_placements_and_not_arrivals() -> None:
    """All but two wait in the router's queue: the last of them has arrived before the third is placed."""
    config = make_config(2, 2, router={"policy": "round_robin", "max_inflight_requests": 2})
    outcome = run(config, [Arrival(0.0, 100, 10)] * 20)
    assert Counter(record.decode_id for record in outcome.records) == {"decode-0": 10, "decode-1": 10}
    assert Counter(record.prefill_id for record in outcome.records) == {"prefill-0": 10, "prefill-1": 10}


def test_a_long_queue_that_nobody_can_serve_ends() -> None:
    config = make_config(router={"max_inflight_requests": 1, "max_queued_requests": 3000})
    steering = Script([(0.5, Fail("decode-0"))])
    arrivals = [Arrival(0.0, 100, 100)] * 2000
    outcome = simulate(config, dict.fromkeys(Role, make_profile()), OpenLoop(iter(arrivals)), steering=steering)
    assert len(outcome.records) == 2000
    assert sum("no decode worker" in record.failure for record in outcome.records) > 1990


def test_what_fits_nowhere_is_refused() -> None:
    outcome = run(make_config(engine={"num_blocks": 20}), [Arrival(0.0, 330, 5), Arrival(0.0, 16, 5)])
    assert sorted(record.failure for record in outcome.records)[1] == (
        "input: the prompt needs more KV blocks than any worker has"
    )


def test_transfers_to_one_worker_wait_for_each_other() -> None:
    """Two prefill workers are done at the same moment; the decode worker takes in one after the other."""
    arrivals = [Arrival(0.0, 500, 2), Arrival(0.0, 500, 2)]
    bytes_s = 500 * KV_BYTES / BANDWIDTH
    one, two = sorted(record.end_s or math.inf for record in run(make_config(2, 1), arrivals).records)
    apart = [record.end_s or math.inf for record in run(make_config(2, 2), arrivals).records]
    assert apart[0] == pytest.approx(apart[1])
    assert two - apart[0] == pytest.approx(bytes_s, rel=0.2)
    assert one == pytest.approx(apart[0])


def one_sequence_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler lets nobody in while anybody runs."""
    admit = Scheduler._admit

    def patched(self: Scheduler, draft: Any) -> Limit:
        return Limit.SEQS if self.num_running else admit(self, draft)

    monkeypatch.setattr(Scheduler, "_admit", patched)


def other_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(policy.POLICIES, "least_loaded", policy.round_robin)


def strict_admission(monkeypatch: pytest.MonkeyPatch) -> None:
    init = Admission.__init__

    def patched(self: Admission, max_inflight: int, max_queued: int) -> None:
        init(self, 2, max_queued)

    monkeypatch.setattr(Admission, "__init__", patched)


def one_hand_off_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    on_room = ReservationTable.on_room

    def patched(self: ReservationTable, num_free_blocks: int, now_s: float) -> Effects:
        is_busy = any(entry.block_ids for entry in self.reservations.values())
        return () if is_busy else on_room(self, num_free_blocks, now_s)

    monkeypatch.setattr(ReservationTable, "on_room", patched)


def one_decode_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those with one token to go only the oldest is in a step."""
    decodes = Scheduler._schedule_decodes

    def patched(self: Scheduler, draft: Draft) -> None:
        decodes(self, draft)
        draft.budget += len(draft.scheduled[1:])
        del draft.scheduled[1:]

    monkeypatch.setattr(Scheduler, "_schedule_decodes", patched)


def answers_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    end = Finish(FinishReason.LENGTH, None)

    def patched(sequence: Sequence, index: int, token_id: int, max_model_len: int) -> Finish | None:
        return end if index == 2 else None

    monkeypatch.setattr(scheduler, "finish", patched)


def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockPool, "can_take", lambda self, num_blocks: num_blocks + 300 <= self.num_free)


def dear_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = Claims.needed_blocks
    monkeypatch.setattr(Claims, "needed_blocks", lambda *given: needed(*given) + 300)


def leases_that_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LeaseTable, "release", lambda *given: ())


def nothing_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unseen, "pending", Pending())


CHANGES = [
    one_sequence_at_a_time,
    one_decode_at_a_time,
    answers_of_three,
    small_pool,
    dear_claims,
    other_policy,
    strict_admission,
    nothing_unseen,
    one_hand_off_at_a_time,
    leases_that_last,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_production_code_changes_the_simulation_and_both_modes_alike(
    change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scheduler, pool, claims, policy, admission, what is unseen and both tables of a hand-off are written once."""
    config, profiles = make_config(2, 2, engine={"num_blocks": 400}), dict.fromkeys(Role, make_profile())
    arrivals = [Arrival(one.at_s, min(one.num_prompt_tokens, 1000), one.max_tokens) for one in traffic(rate=25.0)]
    before = latencies(simulate(config, profiles, OpenLoop(iter(arrivals))))
    change(monkeypatch)
    exact, fast = (
        latencies(simulate(config, profiles, OpenLoop(iter(arrivals)), exact=exact)) for exact in (True, False)
    )
    assert exact == fast != before


def test_steps_that_nobody_measured_are_counted() -> None:
    profile = make_profile()
    single = profile.domain.decode_batch.model_copy(update={"largest": 1})
    narrow = profile.domain.model_copy(update={"decode_batch": single})
    outcome = run(make_config(), traffic(), domain=narrow)
    assert outcome.extrapolation.num_outside > 0
    assert any("decode batch" in line for line in outcome.extrapolation.summary())


def test_a_role_without_a_profile_and_workers_without_a_common_link_are_refused() -> None:
    profile = make_profile()
    with pytest.raises(ConfigError, match="there is none for decode workers"):
        simulate(make_config(), {Role.PREFILL: profile}, OpenLoop(iter(())))
    with pytest.raises(ConfigError, match=r"kv_transfer\.links"):
        run(make_config(), [], links={})


def test_a_conversation_waits_for_its_answers() -> None:
    """A closed loop: each turn comes after the end of the one before."""

    class Turns:
        def __init__(self, num_turns: int) -> None:
            self.left = num_turns
            self.at_s = 0.0
            self.ends: list[float] = []

        def next_arrival_s(self) -> float:
            return self.at_s if self.left else math.inf

        def pop(self) -> Arrival:
            arrival = Arrival(self.at_s, 100, 5)
            self.at_s = math.inf
            return arrival

        def ended(self, arrival: Arrival, now_s: float) -> None:
            self.ends.append(now_s)
            self.left -= 1
            self.at_s = now_s + 2.0

    turns = Turns(4)
    outcome = simulate(make_config(), dict.fromkeys(Role, make_profile()), turns)
    starts = [record.arrival.at_s for record in outcome.records]
    assert starts == pytest.approx([0.0, *(end + 2.0 for end in turns.ends[:-1])])


def percentile(outcomes: Iterable[float], share: float) -> float:
    return float(np.percentile(list(outcomes), share))


def test_more_prefill_workers_shorten_the_queue_for_the_first_token() -> None:
    arrivals = traffic(300, rate=20.0)
    ttfts = [
        percentile((record.timing().ttft_ms() or math.inf for record in run(make_config(p, 2), arrivals).records), 99)
        for p in (1, 2, 4)
    ]
    assert ttfts[0] > ttfts[1] > ttfts[2]


@pytest.mark.timeout(30)
def test_years_without_a_request_take_no_time() -> None:
    """Workers with nothing to look after rest: a billion sweeps would be seen."""
    years = [Arrival(at_s, 100, 4) for at_s in (0.0, 1e9, 3e9)]
    outcome = run(make_config(), years)
    assert [record.failure for record in outcome.records] == ["", "", ""]
    first, *_, last = (record.timing().ttft_ms() for record in outcome.records)
    assert first == pytest.approx(last, rel=1e-3)
