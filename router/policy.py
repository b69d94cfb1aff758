"""Which decode worker and which prefill worker a request goes to: pure functions over loads.

A policy sees what each worker last said about itself plus what this router has sent it since (`Pending`),
and returns a `Placement` with its reason, or `None` when nobody can serve. Knows nothing of connections or
of time. The caller offers live workers only; draining ones are left out here.

A mixed worker is its own prefill and decode side. It competes with every (prefill, decode) pair under the same
two costs: it pays its own prefill backlog and its own running sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pdserve.proto.errors import InvalidRequest, Unavailable
from pdserve.proto.types import KVLayout, Role, WorkerLoad


@dataclass(frozen=True, slots=True)
class Pending:
    """Sent to a worker by this router, and not yet visible in the worker's own load."""

    num_requests: int = 0
    prompt_tokens: int = 0
    num_blocks: int = 0


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One live worker as a policy sees it. `load.role` is what it does now."""

    load: WorkerLoad
    layout: KVLayout
    pending: Pending = Pending()

    @property
    def worker_id(self) -> str:
        return self.load.worker_id

    @property
    def num_sequences(self) -> int:
        return self.load.num_running + self.load.num_waiting + self.pending.num_requests

    @property
    def backlog_tokens(self) -> int:
        return self.load.queued_tokens + self.pending.prompt_tokens

    def has_room(self, num_tokens: int) -> bool:
        spare_blocks = self.load.free_blocks - self.load.reserved_blocks - self.pending.num_blocks
        return spare_blocks >= self.layout.num_blocks(num_tokens)


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill_id == decode_id` means one mixed worker does both."""

    prefill_id: str
    decode_id: str
    reason: str


Policy = Callable[[Sequence[WorkerView], int, int], Placement | None]


def pairs(views: Sequence[WorkerView]) -> Iterator[tuple[WorkerView, WorkerView]]:
    """Every (prefill, decode) pair that can exchange KV, and every mixed worker with itself; none draining."""
    live = [view for view in views if not view.load.draining]
    prefills = [view for view in live if view.load.role is Role.PREFILL]
    for decode in live:
        if decode.load.role is Role.MIXED:
            yield decode, decode
        elif decode.load.role is Role.DECODE:
            yield from ((prefill, decode) for prefill in prefills if not decode.layout.obstacles(prefill.layout))


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


def round_robin(views: Sequence[WorkerView], prompt_tokens: int, turn: int) -> Placement | None:
    """The `turn`-th decode side, then the `turn`-th prefill side that can feed it. Blind to load."""
    possible = list(pairs(views))
    if not possible:
        return None
    decode_ids = sorted({decode.worker_id for _, decode in possible})
    decode_id = decode_ids[turn % len(decode_ids)]
    prefill_ids = sorted(prefill.worker_id for prefill, decode in possible if decode.worker_id == decode_id)
    prefill_id = prefill_ids[turn % len(prefill_ids)]
    return Placement(prefill_id, decode_id, f"turn {turn}")


def least_loaded(views: Sequence[WorkerView], prompt_tokens: int, turn: int) -> Placement | None:
    """A decode side with room before one without; then the least work ahead of this request on both sides.

    Work ahead is counted in requests like this one: prefill backlog in units of its own prompt, plus one for each
    sequence on the decode side. Ties go round by `turn`. The sum is least where both parts are, so that each side is
    looked through once.
    """
    live = [view for view in views if not view.load.draining]
    prefills = [view for view in live if view.load.role is Role.PREFILL]
    sides = [view for view in live if view.load.role is not Role.PREFILL]
    feeders: dict[KVLayout, WorkerView | None] = {}
    best: tuple[bool, float, int] | None = None
    chosen: tuple[WorkerView, WorkerView] | None = None
    for index, decode in enumerate(sides):
        prefill = decode if decode.load.role is Role.MIXED else None
        if decode.load.role is Role.DECODE:
            if decode.layout not in feeders:
                feeders[decode.layout] = _least_backlog(prefills, decode.layout, turn)
            prefill = feeders[decode.layout]
        if prefill is None:
            continue
        ahead = prefill.backlog_tokens / max(1, prompt_tokens) + decode.num_sequences
        cost = (not decode.has_room(prompt_tokens + 1), ahead, (index - turn) % len(sides))
        if best is None or cost < best:
            best, chosen = cost, (prefill, decode)
    if best is None or chosen is None:
        return None
    full, ahead, _ = best
    reason = f"{ahead:.1f} requests of work ahead" + (", no decode worker has room" if full else "")
    return Placement(chosen[0].worker_id, chosen[1].worker_id, reason)


def _least_backlog(prefills: Sequence[WorkerView], layout: KVLayout, turn: int) -> WorkerView | None:
    """Of those that can feed a decode worker of this layout."""
    fitting = [view for view in prefills if not layout.obstacles(view.layout)]
    if not fitting:
        return None
    num = len(fitting)
    return fitting[min(range(num), key=lambda index: (fitting[index].backlog_tokens, (index - turn) % num))]


def place(policy: Policy, views: Sequence[WorkerView], prompt_tokens: int, turn: int) -> Placement:
    """Where a request goes. Raises Unavailable, or InvalidRequest for what fits nowhere."""
    num_tokens = prompt_tokens + 1
    roomy = [view for view in views if view.layout.num_blocks(num_tokens) <= view.load.total_blocks]
    placement = policy(roomy, prompt_tokens, turn)
    if placement is not None:
        return placement
    if policy(views, prompt_tokens, turn) is not None:
        raise InvalidRequest("input", "the prompt needs more KV blocks than any worker has")
    raise Unavailable(why_nobody(views))


POLICIES: dict[str, Policy] = {"round_robin": round_robin, "least_loaded": least_loaded}
