"""The properties that are judged where a request ends or where nothing is left to do; README.md lists all of them.

Those about one step (S1 to S5) are judged by the actor that takes it. Knows nothing of how worlds follow each other.
"""

from __future__ import annotations

from modelcheck.decode_turn import DecodeState
from modelcheck.prefill_turn import PrefillState
from modelcheck.router import RouterState
from modelcheck.system import System
from modelcheck.vocabulary import BlockUse, Fault, Mark, worker_name

EXCUSES = Mark.CANCELLED | Mark.EXPIRED | Mark.CRASHED | Mark.CALL_LOST | Mark.PULLS_LOST | Mark.EXPORT_FAILED
"""What may keep a request from completing. Lost offers, answers and one lost pull may not."""
NEVER = frozenset({"LayoutMismatch", "DuplicateRequest", "CompletionGap"})


def judge_end(system: System, request: int, kind: str, marks: int) -> str:
    """Whether this end names a true cause (S7), and whether there had to be one (L3)."""
    name = system.setting.label(request)
    if not kind:
        return ""
    if kind == "WorkerLost" and not marks & (Mark.CRASHED | Mark.CALL_LOST):
        return f"S7: {name} fails with WorkerLost, though no worker of it died"
    if kind in NEVER or (kind == "InternalError" and not marks & Mark.EXPORT_FAILED):
        return f"S7: {name} fails with {kind}, which nothing has caused"
    if not marks & EXCUSES:
        return f"L3: {name} fails with {kind}, though nothing happened that has to end it"
    return ""


def judge_rest(
    system: System,
    requests: RouterState,
    workers: tuple[PrefillState | DecodeState, ...],
    budget: tuple[int, ...],
    marks: tuple[int, ...],
    timers_are_left: bool,
) -> str:
    """What is wrong in a world in which nothing more happens, or nothing before some timer fires."""
    setting = system.setting
    is_final = setting.timers and not timers_are_left
    waits = "waits for ever" if is_final else "waits until some timer fires"
    nothing_lost = (budget[Fault.LOSS], budget[Fault.DUPLICATE]) == (setting.losses, setting.duplicates)
    for request, entry in enumerate(requests):
        if entry.is_started and not entry.is_over:
            name = setting.label(request)
            if not marks[request] & EXCUSES:
                return f"L3: {name} {waits}, though nothing happened that has to keep it"
            if nothing_lost or is_final:
                return f"L1: {name} {waits}, though every message arrived"
    if nothing_lost or is_final:
        for worker, state in enumerate(workers):
            kept = [index for index, block in enumerate(state.blocks) if block.use is not BlockUse.FREE]
            if kept:
                return (
                    f"L2: block {kept[0]} of {worker_name(worker)} is {state.blocks[kept[0]].use}, and nothing frees it"
                )
    return _left_over(system, workers) if is_final else ""


def _left_over(system: System, workers: tuple[PrefillState | DecodeState, ...]) -> str:
    for worker, state in enumerate(workers):
        name = worker_name(worker)
        if isinstance(state, PrefillState):
            if system.leases[state.leases] or state.sends or state.preparing or state.live:
                return f"L2: something is left on {name}: {system.leases[state.leases]}"
        elif system.reservations[state.reservations] or state.reserved or state.fetches or state.asks or state.live:
            return f"L2: something is left on {name}: {system.reservations[state.reservations]}, {state.reserved}"
    return ""
