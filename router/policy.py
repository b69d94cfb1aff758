"""Which decode worker and which prefill worker a request goes to: pure functions over what the fleet looks like.

A policy returns a `Placement` with its reason, or `None` when nobody can serve. Knows nothing of connections or of
time. The caller offers live workers only; draining ones are left out by `Candidates`.

A mixed worker is its own prefill and decode side. It competes with every (prefill, decode) pair under the same
two costs: it pays its own prefill backlog and its own running sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pdserve.proto.errors import InvalidRequest, Unavailable
from pdserve.proto.types import Role
from pdserve.router.candidates import Candidates, Group
from pdserve.router.view import WorkerView


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill_id == decode_id` means one mixed worker does both."""

    prefill_id: str
    decode_id: str
    reason: str


Policy = Callable[[Candidates, int, int], Placement | None]
"""`policy(candidates, prompt_tokens, turn)`: only workers whose pool could hold the prompt and its first token."""


def can_serve(candidates: Candidates) -> bool:
    """Whether there is a mixed worker, or a prefill and a decode worker that can exchange KV."""
    if any(candidates.groups(Role.MIXED)):
        return True
    return any(any(candidates.feeders(group.layout)) for group in candidates.groups(Role.DECODE))


def why_nobody(views: Sequence[WorkerView]) -> str:
    """Why no request can be placed, in a few words."""
    live = [view for view in views if not view.load.draining]
    sides = {role: [view for view in live if view.load.role is role] for role in Role}
    for decode in sides[Role.DECODE]:
        for prefill in sides[Role.PREFILL]:
            obstacles = decode.layout.obstacles(prefill.layout)
            if obstacles:
                return f"{prefill.worker_id} and {decode.worker_id} cannot exchange KV: {', '.join(obstacles)}"
    missing = [str(role) for role in (Role.PREFILL, Role.DECODE) if not sides[role]]
    return f"no {' and no '.join(missing)} worker is ready" if missing else "no worker can take the request now"


def round_robin(candidates: Candidates, prompt_tokens: int, turn: int) -> Placement | None:
    """The `turn`-th decode side, then the `turn`-th prefill side that can feed it. Blind to load."""
    num_tokens = prompt_tokens + 1
    decodes: list[tuple[str, WorkerView, list[str]]] = []
    for group in candidates.groups(Role.DECODE):
        feeders = sorted(_ids(candidates.feeders(group.layout), num_tokens))
        if feeders:
            decodes += [(name, view, feeders) for name, view in _able(group, num_tokens)]
    for group in candidates.groups(Role.MIXED):
        decodes += [(name, view, [name]) for name, view in _able(group, num_tokens)]
    if not decodes:
        return None
    decode_id, _, prefill_ids = sorted(decodes, key=lambda one: one[0])[turn % len(decodes)]
    return Placement(prefill_ids[turn % len(prefill_ids)], decode_id, f"turn {turn}")


def _able(group: Group, num_tokens: int) -> Iterator[tuple[str, WorkerView]]:
    return ((view.worker_id, view) for view in group.views.values() if view.could_hold(num_tokens))


def _ids(groups: Iterator[Group], num_tokens: int) -> Iterator[str]:
    return (name for group in groups for name, _ in _able(group, num_tokens))


def least_loaded(candidates: Candidates, prompt_tokens: int, turn: int) -> Placement | None:
    """A decode side with room before one without; then the least work ahead of this request on both sides.

    Work ahead is counted in requests like this one: prefill backlog in units of its own prompt, plus one for each
    sequence on the decode side. The sum is least where both parts are, so that each side is looked through from its
    least loaded worker on. Ties go round by `turn`.
    """
    for with_room in (True, False):
        sides = [
            _best_pair(candidates, group, prompt_tokens, turn, with_room) for group in candidates.groups(Role.DECODE)
        ]
        sides += [_best_mixed(group, prompt_tokens, turn, with_room) for group in candidates.groups(Role.MIXED)]
        found = [side for side in sides if side is not None]
        if found:
            least = min(side.ahead for side in found)
            equals = [side for side in found if side.ahead == least]
            side = equals[turn % len(equals)]
            reason = f"{side.ahead:.1f} requests of work ahead" + ("" if with_room else ", no decode worker has room")
            return Placement(side.prefill.worker_id, side.decode.worker_id, reason)
    return None


@dataclass(frozen=True, slots=True)
class _Side:
    """A pair, or a mixed worker twice; `ahead` is the work ahead of the request, in requests like it."""

    prefill: WorkerView
    decode: WorkerView
    ahead: float


def _best_pair(candidates: Candidates, group: Group, prompt_tokens: int, turn: int, with_room: bool) -> _Side | None:
    """The least loaded decode worker of the group, and the least loaded prefill worker that can feed it."""
    num_tokens = prompt_tokens + 1
    if with_room and not group.may_have_room(num_tokens):
        return None
    decode = _first(
        group, group.by_num_sequences.ascending(turn), num_tokens, lambda view: view.has_room(num_tokens) is with_room
    )
    feeders = [
        _first(feeder, feeder.by_backlog_tokens.ascending(turn), num_tokens, lambda view: True)
        for feeder in candidates.feeders(group.layout)
    ]
    prefill = min((view for view in feeders if view is not None), key=lambda view: view.backlog_tokens, default=None)
    if prefill is None or decode is None:
        return None
    return _Side(prefill, decode, prefill.backlog_tokens / max(1, prompt_tokens) + decode.num_sequences)


def _first(
    group: Group, order: Iterator[tuple[int, int]], num_tokens: int, suits: Callable[[WorkerView], bool]
) -> WorkerView | None:
    views = (group.views[slot] for slot, _ in order)
    return next((view for view in views if view.could_hold(num_tokens) and suits(view)), None)


def _best_mixed(group: Group, prompt_tokens: int, turn: int, with_room: bool) -> _Side | None:
    """Looks along both orders at once: what comes after has at least the sum of the two numbers just seen ahead of it
    (the threshold algorithm of Fagin, Lotem and Naor, 2001)."""
    num_tokens, unit = prompt_tokens + 1, max(1, prompt_tokens)
    if with_room and not group.may_have_room(num_tokens):
        return None
    best, least = None, math.inf
    orders = zip(group.by_num_sequences.ascending(turn), group.by_backlog_tokens.ascending(turn), strict=True)
    for (busy_slot, num_sequences), (late_slot, backlog_tokens) in orders:
        for slot in (busy_slot, late_slot):
            view = group.views[slot]
            ahead = view.backlog_tokens / unit + view.num_sequences
            if ahead < least and view.could_hold(num_tokens) and view.has_room(num_tokens) is with_room:
                best, least = view, ahead
        if least <= num_sequences + backlog_tokens / unit:
            break
    return None if best is None else _Side(best, best, least)


def place(policy: Policy, candidates: Candidates, prompt_tokens: int, turn: int) -> Placement:
    """Where a request goes. Raises Unavailable, or InvalidRequest for what fits nowhere."""
    placement = policy(candidates, prompt_tokens, turn)
    if placement is not None:
        return placement
    if policy(candidates, 0, turn) is not None:
        raise InvalidRequest("input", "the prompt needs more KV blocks than any worker has")
    raise Unavailable(why_nobody(candidates.views))


POLICIES: dict[str, Policy] = {"round_robin": round_robin, "least_loaded": least_loaded}
