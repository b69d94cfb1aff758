"""What must be true of a run: of each answer, of each failure's reason, and of what is left when all is calm.

Judges what clients were told against the model's own words, not against what the cluster thinks it did.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from simulation.client import Try
from simulation.engine import BAD_LOGITS
from simulation.model import text_of
from simulation.router import SimRouter
from simulation.worker import SimWorker

from pdserve.proto import inference_pb2 as pb

if TYPE_CHECKING:
    from simulation.world import World

GRACE_S = 1.0
CLOCK_TOLERANCE = 0.03
# Tasks that a living process may have when nothing is going on.
LASTING = frozenset({"fleet", "watch_peers", "SimWorker._sweep", "_Stream._read", "serve Outputs", "serve Watch"})
# What each end may come from. Any of the kinds that are on for the seed will do.
SILENCES = frozenset(
    {
        "loss",
        "stragglers",
        "cuts",
        "resets",
        "crashes",
        "freezes",
        "slowness",
        "lazy threads",
        "router crashes",
        "wire hangs",
    }
)
NEVER_WITHOUT_FAULTS = (
    *("leases lapsed", "fetches failed", "corruptions detected", "offers repeated"),
    *("calls without an answer", "streams broken", "workers that failed closed"),
)
CAUSES: dict[str, frozenset[str]] = {
    "WorkerLost": SILENCES,
    "TransferFailed": SILENCES | {"wire breaks", "corruption"},
    "CorruptKV": frozenset({"corruption", "wire hangs"}),
    "Unavailable": SILENCES,
    "Overloaded": frozenset({"tight admission", "slow readers"}),
    "InternalError": frozenset({"bad logits", "wire hangs"}),
}


def judge(world: World) -> None:
    """Everything that can be said at the end, as violations."""
    for attempt in world.clients.tries:
        for problem in (*attempt.problems, *_answer(world, attempt), *_ending(world, attempt)):
            world.trace.violate(attempt.router, f"{attempt.name} {problem}")
    if not world.scenario.has_faults:
        world.trace.count("seeds without faults")
        for name in NEVER_WITHOUT_FAULTS:
            if world.trace.counts[name]:
                world.trace.violate("the end", f"{name}: {world.trace.counts[name]}, though nothing went wrong")
    for problem in leftovers(world):
        world.trace.violate("the end", problem)
    for problem in _tasks(world):
        world.trace.violate("the end", problem)


def leftovers(world: World) -> list[str]:
    """What living processes still hold."""
    owners: list[SimWorker | SimRouter] = [*world.workers.values(), *world.routers.values()]
    return [problem for owner in owners if not owner.process.is_dead for problem in owner.problems()]


def _answer(world: World, attempt: Try) -> Iterator[str]:
    """Each token, the text and the last message."""
    request = attempt.request
    right = world.model.completion(request.request_id, request.sampling)
    stop = _stop(right, request.stop_strings)
    text = text_of(right)
    if stop is not None:
        num_tokens, length = stop
        right, text = right[:num_tokens], text[:length]
    if attempt.token_ids != right[: len(attempt.token_ids)]:
        yield f"got the tokens {attempt.token_ids}, not {right}"
    if not text.startswith(attempt.text):
        yield f"got the text {attempt.text!r}, not {text!r}"
    if attempt.end != "finished":
        return
    finished = attempt.finished
    if finished is None:
        yield "ended without a last message"
        return
    if len(attempt.token_ids) != len(right) or attempt.text != text:
        yield f"finished with {len(attempt.token_ids)} of {len(right)} tokens, {attempt.text!r} of {text!r}"
    sampling = request.sampling
    is_stopped = stop is not None or (
        len(right) > sampling.min_tokens and bool(right) and right[-1] in sampling.stop_token_ids
    )
    if finished.reason != (pb.FINISH_REASON_STOP if is_stopped else pb.FINISH_REASON_LENGTH):
        yield f"finished with reason {finished.reason}"
    usage = finished.usage
    if (usage.prompt_tokens, usage.completion_tokens) != (len(request.prompt), len(right)):
        yield f"was told a wrong usage: {usage}"


def _stop(tokens: list[int], stop_strings: tuple[str, ...]) -> tuple[int, int] | None:
    """Tokens up to the first stop string, and letters before it; one letter for each token."""
    text = text_of(tokens)
    found = [(place + len(stop), place) for stop in stop_strings if (place := text.find(stop)) >= 0]
    return min(found, default=None)


def _ending(world: World, attempt: Try) -> Iterator[str]:
    """Ended once, in time, and for a reason that there was."""
    if attempt.end == "router died":
        return
    if not attempt.end:
        yield "never ended"
        return
    if attempt.end_s > attempt.deadline_s + GRACE_S:
        yield f"ended {attempt.end_s - attempt.deadline_s:.2f} s after its deadline"
    if attempt.end == "finished":
        return
    if attempt.finished is not None and attempt.end != "cancelled":
        yield f"finished and then ended with {attempt.end}"
    if attempt.end == "cancelled":
        if attempt.request.cancel_after_s is None:
            yield "was cancelled by nobody"
        return
    yield from _reason(world, attempt)


def _reason(world: World, attempt: Try) -> Iterator[str]:
    """Whether what it was told can be true."""
    scenario, message = world.scenario, attempt.error.message if attempt.error else ""
    told = f"was told {attempt.end}: {message}"
    if attempt.end == "DeadlineExceeded":
        if attempt.end_s < attempt.deadline_s - CLOCK_TOLERANCE * attempt.request.timeout_s:
            yield f"{told}, {attempt.deadline_s - attempt.end_s:.2f} s before its deadline"
        if not scenario.has_faults and not scenario.kinds & {"short deadlines", "tight admission", "slow readers"}:
            yield f"{told}, though nothing went wrong"
        return
    if attempt.end == "Overloaded" and "deadline_unmeetable" in message:
        return
    # Who reads another's memory by itself reads on after the lease is lost; the digests tell.
    is_late_read = attempt.end == "CorruptKV" and world.trace.counts["leases lapsed"] > 0
    if not is_late_read and not CAUSES.get(attempt.end, frozenset()) & scenario.kinds:
        yield f"{told}, of which there was no cause"
    lost = re.search(r"worker (\w+) was lost|(\w+) did not answer|(\w+) is gone", message)
    place = next(filter(None, lost.groups())) if lost else ""
    if place and place not in world.disturbed and not scenario.kinds & {"loss", "stragglers", "resets"}:
        yield f"{told}, but nothing happened to {place}"
    died = re.search(r"(\w+) died before", message)
    if died and died.group(1) not in {worker_id for worker_id, _ in world.deaths}:
        yield f"{told}, but it did not die"
    if attempt.end == "InternalError":
        has_failed_closed = world.trace.counts["workers that failed closed"] > 0 and "internal error" in message
        if message != BAD_LOGITS and not has_failed_closed:
            yield f"{told}"


def _tasks(world: World) -> Iterator[str]:
    for process, task in world.loop.tasks_of_the_living():
        name = task.get_name()
        if task.done():
            if not task.cancelled() and task._log_traceback:
                yield f"{process.name}: nobody looked at the failure of {name}: {task.exception()!r}"
        elif name not in LASTING and not name.startswith("worker "):
            yield f"{process.name}: the task {name} is left"
