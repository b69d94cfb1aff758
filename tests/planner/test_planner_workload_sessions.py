"""Conversations: what a turn holds, when it comes, and that neither depends on how others fare."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.cluster.arrivals import HASH_BLOCK_TOKENS, Arrival
from pdserve.cluster.planner.sessions import Sessions
from pdserve.cluster.planner.source import Source, drain
from pdserve.cluster.planner.workload import parse_workload
from pdserve.cluster.planner.workload_spec import WorkloadSpec

TALK = {"kind": "sessions", "prompt": "60/300", "output": "200/500", "mean_turns": 4, "think_s": "5/30", "rate": 2}


def talk(**changes: object) -> WorkloadSpec:
    return parse_workload({**TALK, **changes})


def serve(
    source: Source, service_s: Callable[[Arrival], float], num_requests: int
) -> tuple[list[Arrival], dict[tuple[int, int], float]]:
    """Requests as they come when each takes its service time; and when each turn of each session ended."""
    running: list[tuple[float, int, Arrival]] = []
    arrivals: list[Arrival] = []
    ends: dict[tuple[int, int], float] = {}
    turns: dict[int, int] = defaultdict(int)
    while len(arrivals) < num_requests:
        if running and running[0][0] <= source.next_arrival_s():
            now_s, _, arrival = heapq.heappop(running)
            assert arrival.session is not None
            ends[arrival.session, turns[arrival.session]] = now_s
            turns[arrival.session] += 1
            source.ended(arrival, now_s)
        elif source.next_arrival_s() < math.inf:
            arrival = source.pop()
            arrivals.append(arrival)
            heapq.heappush(running, (arrival.at_s + service_s(arrival), len(arrivals), arrival))
        else:
            break
    return arrivals, ends


def by_session(arrivals: list[Arrival]) -> dict[int, list[Arrival]]:
    found: dict[int, list[Arrival]] = defaultdict(list)
    for arrival in arrivals:
        assert arrival.session is not None
        found[arrival.session].append(arrival)
    return found


def test_a_prompt_is_all_that_was_said_so_far_and_a_new_message() -> None:
    source = talk(prompt=60, output=200, turns="fixed", prefixes=1024).source(seed=1)
    sessions = by_session(serve(source, lambda arrival: 1.0, 600)[0])
    begun = [turns for turns in sessions.values() if turns[0].num_history_tokens == 0]
    assert len(begun) > 50
    for turns in begun:
        assert [turn.num_prompt_tokens for turn in turns] == [1084, 1344, 1604, 1864][: len(turns)]
        assert [turn.num_history_tokens for turn in turns] == [0, 1284, 1544, 1804][: len(turns)]
        assert {turn.max_tokens for turn in turns} == {200}


def test_ids_are_those_of_full_blocks_and_go_on_where_the_last_turn_ended() -> None:
    source = talk(prefixes="1024,600").source(seed=1)
    sessions = by_session(serve(source, lambda arrival: 1.0, 2000)[0])
    owners: dict[int, set[int]] = defaultdict(set)
    for number, turns in sessions.items():
        for early, late in pairwise(turns):
            assert late.prefix_ids[: len(early.prefix_ids)] == early.prefix_ids
        for turn in turns:
            assert len(turn.prefix_ids) == turn.num_prompt_tokens // HASH_BLOCK_TOKENS
            for prefix_id in turn.prefix_ids:
                owners[prefix_id].add(number)
    shared = {prefix_id: len(names) for prefix_id, names in owners.items() if len(names) > 1}
    # Two blocks of the one system prompt and one of the other, of which Zipf's first comes twice as often.
    assert len(shared) == 3
    assert sorted(shared.values())[-1] == pytest.approx(2 * sorted(shared.values())[0], rel=0.2)


def test_a_turn_comes_a_think_time_after_the_answer_whatever_that_took() -> None:
    gaps: list[list[float]] = []
    for service_s in (0.0, 7.0):
        arrivals, ends = serve(talk().source(seed=3), lambda arrival, s=service_s: s, 1500)  # type: ignore[misc]
        sessions = by_session(arrivals)
        found = {
            (number, turn): late.at_s - ends[number, turn]
            for number in range(40, 100)
            for turn, late in enumerate(sessions[number][1:4])
        }
        gaps.append([found[key] for key in sorted(found)])
    size = min(map(len, gaps))
    assert size > 50
    assert gaps[0][:20] == pytest.approx(gaps[1][:20])


@given(st.lists(st.floats(0, 60), min_size=3, max_size=11), st.integers(0, 3))
def test_what_a_session_holds_does_not_depend_on_the_order_in_which_others_end(
    service_times_s: list[float], seed: int
) -> None:
    """Whatever the service times: every session starts at the same moment and says the same things."""
    workload = talk(prefixes="600x3", classes="a:1,b:2")
    usual = by_session(serve(workload.source(seed=seed), lambda arrival: 0.0, 300)[0])

    def service_s(arrival: Arrival) -> float:
        assert arrival.session is not None
        return service_times_s[(7 * arrival.session + arrival.num_prompt_tokens) % len(service_times_s)]

    other = by_session(serve(workload.source(seed=seed), service_s, 300)[0])
    in_both = usual.keys() & other.keys()
    assert len(in_both) > 20
    for number in in_both:
        assert usual[number][0] == other[number][0]
        size = min(len(usual[number]), len(other[number]))
        one, two = ([replace(turn, at_s=0.0) for turn in found[number][:size]] for found in (usual, other))
        assert one == two


def test_ends_at_one_moment_may_be_told_in_any_order() -> None:
    orders: list[list[Arrival]] = []
    for direction in (1, -1):
        source = talk().source(seed=5)
        first = [source.pop() for _ in range(50)]
        for arrival in first[::direction]:
            source.ended(arrival, first[-1].at_s)
        orders.append([source.pop() for _ in range(100)])
    assert orders[0] == orders[1]


def test_turns_come_at_the_rate_asked_for_from_the_first_second_on() -> None:
    """A run that began without sessions in progress would begin at a quarter of it."""
    workload = talk()
    counts = np.zeros(10)
    for seed in range(30):
        for arrival in drain(workload.source(seed=seed)):
            if arrival.at_s >= 100:
                break
            counts[int(arrival.at_s / 10)] += 1
    assert counts.mean() / 300 == pytest.approx(2.0, rel=0.06)
    assert (counts / 300).tolist() == pytest.approx([2.0] * 10, rel=0.2)


def test_while_nothing_is_answered_only_new_sessions_speak() -> None:
    source = talk().source(rate=20.0, seed=0)
    assert isinstance(source, Sessions)
    slow = serve(source, lambda arrival: 1e6, 2000)[0]
    assert len(by_session(slow)) == 2000
    assert source.num_live >= 2000


def test_memory_is_that_of_the_sessions_that_live() -> None:
    source = talk().source(seed=0)
    assert isinstance(source, Sessions)
    most = 0
    for number, _ in enumerate(drain(source)):
        most = max(most, source.num_live)
        if number == 20_000:
            break
    # Little's law: half a session starts in a second, and thinks three times, 13 s in the mean.
    assert most < 70


@pytest.mark.parametrize("turns", ["geometric", "fixed"])
def test_sessions_have_their_mean_number_of_turns(turns: str) -> None:
    source = talk(turns=turns).source(seed=2)
    sessions = by_session(serve(source, lambda arrival: 0.0, 20_000)[0])
    begun = [len(found) for found in sessions.values() if found[0].num_history_tokens == 0][:-100]
    assert np.mean(begun) == pytest.approx(4.0, rel=0.04)
    assert np.var(begun) == pytest.approx(4.0 * 3.0 if turns == "geometric" else 0.0, rel=0.15, abs=0.01)


def test_a_conversation_that_outgrows_the_context_drops_its_history() -> None:
    workload = talk(prompt=100, output=300, mean_turns=12, turns="fixed", prefixes=512)
    sessions = by_session(serve(workload.for_model(2048).source(seed=0), lambda arrival: 1.0, 2000)[0])
    whole = next(turns for turns in sessions.values() if turns[0].num_history_tokens == 0 and len(turns) == 12)
    grown = [612, 1012, 1412]
    assert [turn.num_prompt_tokens for turn in whole] == grown * 4
    assert [turn.num_history_tokens > 0 for turn in whole] == [False, True, True] * 4
    assert len({turn.prefix_ids[0] for turn in whole}) == 1
    assert len({turn.prefix_ids[1] for turn in whole if len(turn.prefix_ids) > 1}) == 4


def test_two_rates_bring_the_same_new_sessions() -> None:
    workload = talk(turns="fixed", mean_turns=1)
    slow, fast = (list(drain(workload.source(rate=rate, seed=4, num_requests=200))) for rate in (1.0, 10.0))
    assert [(a.num_prompt_tokens, a.max_tokens) for a in slow] == [(a.num_prompt_tokens, a.max_tokens) for a in fast]
    assert [a.at_s for a in slow] == pytest.approx([10 * a.at_s for a in fast])


def test_a_class_is_a_sessions_own() -> None:
    source = talk(classes="a:1,b:1").source(seed=2)
    sessions = by_session(serve(source, lambda arrival: 0.0, 2000)[0])
    assert all(len({turn.slo_class for turn in turns}) == 1 for turns in sessions.values())
    assert {turns[0].slo_class for turns in sessions.values()} == {"a", "b"}
