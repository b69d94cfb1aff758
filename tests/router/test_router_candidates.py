"""The kept orders choose what looking at everybody would choose, however the fleet changes."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from router_fakes import LAYOUT, make_load

from pdserve.proto.types import Role
from pdserve.router.candidates import Candidates
from pdserve.router.policy import can_serve, least_loaded
from pdserve.router.view import Pending, WorkerView

OTHER = replace(LAYOUT, num_layers=LAYOUT.num_layers + 1)
PROMPT_TOKENS = 40

VIEWS = st.builds(
    lambda name, role, layout, queued, running, free, total, sent, draining: WorkerView(
        make_load(
            f"w{name}",
            role,
            queued_tokens=queued,
            num_running=running,
            free_blocks=min(free, total),
            total_blocks=total,
            draining=draining,
        ),
        layout,
        Pending(sent, sent * 10, sent),
    ),
    st.integers(0, 7),
    st.sampled_from(list(Role)),
    st.sampled_from([LAYOUT, LAYOUT, OTHER]),
    st.integers(0, 3).map(lambda number: number * 50),
    st.integers(0, 4),
    st.sampled_from([0, 2, 3, 9]),
    st.sampled_from([2, 20, 20]),
    st.integers(0, 1),
    st.sampled_from([False, False, True]),
)


def key_of_the_best(views: list[WorkerView]) -> tuple[bool, float] | None:
    """Whether nobody has room, and the least work ahead, by looking at every pair."""
    live = [view for view in views if not view.load.draining and view.could_hold(PROMPT_TOKENS + 1)]
    prefills = [view for view in live if view.load.role is Role.PREFILL]
    sides = [(view, view) for view in live if view.load.role is Role.MIXED]
    for decode in live:
        if decode.load.role is Role.DECODE:
            sides += [(prefill, decode) for prefill in prefills if prefill.layout == decode.layout]
    return min((key_of(*side) for side in sides), default=None)


def key_of(prefill: WorkerView, decode: WorkerView) -> tuple[bool, float]:
    ahead = prefill.backlog_tokens / PROMPT_TOKENS + decode.num_sequences
    return not decode.has_room(PROMPT_TOKENS + 1), ahead


@settings(max_examples=300)
@given(st.lists(st.tuples(VIEWS, st.booleans()), max_size=20), st.integers(0, 100))
def test_the_choice_is_the_one_that_looking_at_everybody_would_make(
    changes: list[tuple[WorkerView, bool]], turn: int
) -> None:
    candidates, current = Candidates(), dict[str, WorkerView]()
    for view, is_gone in changes:
        if is_gone:
            candidates.remove(view.worker_id)
            current.pop(view.worker_id, None)
        else:
            candidates.put(view)
            current[view.worker_id] = view
    assert candidates.views == [current[worker_id] for worker_id in sorted(current)]
    placement = least_loaded(candidates, PROMPT_TOKENS, turn)
    best = key_of_the_best(list(current.values()))
    assert (placement is None) == (best is None)
    if placement is not None:
        assert can_serve(candidates)
        assert key_of(current[placement.prefill_id], current[placement.decode_id]) == best


def test_equally_loaded_workers_are_chosen_in_turn() -> None:
    roles = [("p", Role.PREFILL), ("d", Role.DECODE)]
    views = [WorkerView(make_load(f"{name}{number}", role), LAYOUT) for name, role in roles for number in range(3)]
    candidates = Candidates(views)
    placements = [least_loaded(candidates, PROMPT_TOKENS, turn) for turn in range(6)]
    pairs = [(placement.prefill_id, placement.decode_id) for placement in placements if placement is not None]
    assert sorted(pairs) == sorted([(f"p{number}", f"d{number}") for number in range(3)] * 2)


def test_a_choice_among_a_thousand_looks_at_a_few() -> None:
    looked_at: list[str] = []

    class Watched(WorkerView):
        def could_hold(self, num_tokens: int) -> bool:
            looked_at.append(self.worker_id)
            return WorkerView.could_hold(self, num_tokens)

    for roles in ((Role.PREFILL, Role.DECODE), (Role.MIXED,)):
        views = [
            Watched(make_load(f"{role}{number}", role, num_running=number % 40, queued_tokens=number % 7 * 100), LAYOUT)
            for role in roles
            for number in range(512)
        ]
        candidates = Candidates(views)
        looked_at.clear()
        assert least_loaded(candidates, PROMPT_TOKENS, 1) is not None
        assert len(looked_at) < 60
