"""A simulated router: the real admission and policy over loads that are as old as a real router's.

A request's life is the pipeline's, without I/O: admitted, queued or refused, then placed, expected, prefilled and
streamed; it ends once, with its last token or with a reason. Knows nothing of how workers work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pdserve.cluster.arrivals import Arrival
from pdserve.cluster.planner.clock import Clock
from pdserve.cluster.planner.prompts import Prompts
from pdserve.cluster.planner.timelapse import WorkerSample
from pdserve.cluster.planner.virtual_worker import VirtualWorker
from pdserve.engine.plan import SequenceStep
from pdserve.proto.errors import PdserveError
from pdserve.proto.types import HandoffId, RequestTiming, SamplingParams, WorkerRequest
from pdserve.router.admission import Admission, Verdict
from pdserve.router.candidates import Candidates
from pdserve.router.policy import Policy, place
from pdserve.router.unseen import Unseen
from pdserve.router.view import Pending, WorkerView


@dataclass(slots=True)
class Record:
    """What became of one request. `failure` is empty for one that ended well. Times are the simulation's."""

    arrival: Arrival
    prefill_id: str = ""
    decode_id: str = ""
    queued_s: float = 0.0
    prefill_started_s: float = 0.0
    prefilled_s: float = 0.0
    first_token_s: float | None = None
    admitted_s: float = 0.0
    decode_started_s: float = 0.0
    end_s: float | None = None
    num_output_tokens: int = 0
    failure: str = ""

    def timing(self) -> RequestTiming:
        """As its client saw it."""
        last_s = None if self.failure else self.end_s
        at_s = self.arrival.at_s
        return RequestTiming(at_s, at_s, self.first_token_s, last_s, self.end_s, self.num_output_tokens)


@dataclass(slots=True)
class _Run:
    record: Record
    request: WorkerRequest
    legs: tuple[VirtualWorker, ...] = ()  # the decode side first
    is_decoding: bool = False  # its decode side has sent a token


class VirtualRouter:
    """Owner of the requests in flight. `on_end` is called once for each that arrived."""

    def __init__(
        self,
        clock: Clock,
        policy: Policy,
        admission: Admission,
        timeout_s: float,
        prompts: Prompts,
        on_end: Callable[[Record], None],
    ) -> None:
        self._clock = clock
        self._policy = policy
        self._admission = admission
        self._timeout_s = timeout_s
        self._prompts = prompts
        self._on_end = on_end
        self._workers: dict[str, VirtualWorker] = {}
        self._unseen: dict[str, Unseen] = {}
        self._candidates = Candidates()
        self._stale: dict[str, None] = {}  # workers whose view has changed since the last placement
        self._runs: dict[HandoffId, _Run] = {}
        self._ids: dict[str, HandoffId] = {}
        # In order, for all have the same time: one event, for the first of them, does. With their places in line.
        self._deadlines: deque[tuple[float, int, HandoffId]] = deque()
        self._is_deadline_set = False
        self._num_arrived = self._num_placed = 0
        self._successors: deque[str] = deque()  # of requests that have just ended, to be placed in this order

    @property
    def num_live(self) -> int:
        return len(self._runs)

    @property
    def num_queued(self) -> int:
        return self._admission.num_queued

    @property
    def num_inflight(self) -> int:
        return self._admission.num_inflight

    def samples(self) -> Iterator[WorkerSample]:
        """What each worker last said."""
        for worker in self._workers.values():
            if not worker.has_load:
                continue
            load = worker.load
            used_blocks = load.total_blocks - load.free_blocks
            counts = (load.num_waiting, load.num_running, used_blocks, load.total_blocks)
            yield WorkerSample(worker.worker_id, load.role, *counts)

    def arrive(self, arrival: Arrival) -> None:
        """A client asks now."""
        now_s = self._clock.now_s
        self._num_arrived += 1
        name = str(self._num_arrived)
        id = HandoffId(name, 0, 0)
        prompt = self._prompts.of(arrival)
        request = WorkerRequest(id, prompt, SamplingParams(max_tokens=arrival.max_tokens), self._timeout_s)
        run = _Run(Record(arrival), request)
        try:
            verdict = self._admission.arrive(name, now_s, now_s + self._timeout_s)
        except PdserveError as error:
            run.record.end_s = now_s
            self._end(run, error.message)
            return
        self._runs[id], self._ids[name] = run, id
        self._deadlines.append((now_s + self._timeout_s, self._clock.number(), id))
        self._set_deadline()
        if verdict is Verdict.ADMITTED:
            self._place(run)

    # What workers say.

    def joined(self, worker: VirtualWorker) -> None:
        self._workers[worker.worker_id] = worker
        self._unseen[worker.worker_id] = Unseen()

    def lost(self, worker: VirtualWorker) -> None:
        """Requests that need it end."""
        self.left(worker)
        for run in [run for run in self._runs.values() if _needs(run, worker)]:
            self._give_up(run, f"worker {worker.worker_id} was lost")

    def left(self, worker: VirtualWorker) -> None:
        """It has drained: nobody needs it."""
        del self._workers[worker.worker_id], self._unseen[worker.worker_id]
        self._stale.pop(worker.worker_id, None)
        self._candidates.remove(worker.worker_id)

    def needs(self, worker: VirtualWorker) -> bool:
        """Whether a request would end if that worker were lost."""
        return any(_needs(run, worker) for run in self._runs.values())

    def token(self, worker: VirtualWorker, step: SequenceStep) -> None:
        """The first token of a worker for a request, or the last one."""
        run = self._runs.get(step.sequence.request.id)
        if run is None:
            return
        record, seen_s = run.record, self._clock.now_s + worker.overheads.token_s
        if step.position == 0:
            record.first_token_s = seen_s
            record.queued_s = step.sequence.arrival_s
            record.prefill_started_s = step.sequence.first_scheduled_s or 0.0
            record.prefilled_s = self._clock.now_s
        elif step.position == 1:
            run.is_decoding = True
        if step.finish is not None:
            record.num_output_tokens = step.position + 1
            record.admitted_s = step.sequence.arrival_s
            record.decode_started_s = step.sequence.first_scheduled_s or 0.0
            self._leave(run, "", seen_s)
            if worker is not run.legs[0]:  # its first token was its last: nothing will be handed off
                run.legs[0].abort(run.request.id, "finished")

    def load_arrived(self, worker: VirtualWorker) -> None:
        worker_id = worker.worker_id
        self._stale[worker_id] = None
        self._unseen[worker_id].load_arrived()

    def failed(self, handoff: HandoffId, message: str) -> None:
        run = self._runs.get(handoff)
        if run is not None:
            self._give_up(run, message)

    # A request's life.

    def _place(self, run: _Run) -> None:
        prompt_tokens = len(run.request.prompt_token_ids)
        self._num_placed += 1
        try:
            for worker_id in self._stale:
                self._candidates.put(self._view(self._workers[worker_id]))
            self._stale.clear()
            placement = place(self._policy, self._candidates, prompt_tokens, self._num_placed)
            prefill, decode = self._workers[placement.prefill_id], self._workers[placement.decode_id]
            prefill.engine.scheduler.check(run.request, prefill is not decode)
            decode.engine.scheduler.check(run.request)
        except PdserveError as error:
            self._leave(run, error.message, self._clock.now_s)
            return
        run.legs = (decode,) if prefill is decode else (decode, prefill)
        run.record.prefill_id, run.record.decode_id = placement.prefill_id, placement.decode_id
        for worker in run.legs:
            share = prompt_tokens if worker is prefill else 0
            num_blocks = worker.info.layout.num_blocks(prompt_tokens + 1)
            self._unseen[worker.worker_id].place(run.request.id, Pending(1, share, num_blocks))
            self._stale[worker.worker_id] = None
        overheads = prefill.overheads
        delay_s = overheads.request_s + overheads.tokenize_s_per_token * prompt_tokens
        if prefill is not decode:
            self._clock.after(delay_s / 2, self._expect, run, prefill, decode)
        self._clock.after(delay_s, self._prefill, run, prefill, decode)

    def _expect(self, run: _Run, prefill: VirtualWorker, decode: VirtualWorker) -> None:
        if run.request.id in self._runs:
            decode.expect(run.request, prefill.info.worker)
            self._unseen[decode.worker_id].acknowledged(run.request.id)

    def _prefill(self, run: _Run, prefill: VirtualWorker, decode: VirtualWorker) -> None:
        if run.request.id in self._runs:
            prefill.prefill(run.request, None if prefill is decode else decode.info.worker)
            self._unseen[prefill.worker_id].acknowledged(run.request.id)

    def _view(self, worker: VirtualWorker) -> WorkerView:
        return WorkerView(worker.load, worker.info.layout, self._unseen[worker.worker_id].pending)

    def _set_deadline(self) -> None:
        """Of the oldest request that has not ended."""
        while self._deadlines and self._deadlines[0][2] not in self._runs:
            self._deadlines.popleft()
        if self._deadlines and not self._is_deadline_set:
            moment_s, number, _ = self._deadlines[0]
            self._clock.at_place(moment_s, number, self._deadline, number)
            self._is_deadline_set = True

    def _deadline(self, number: int) -> None:
        self._is_deadline_set = False
        if self._deadlines and self._deadlines[0][1] == number:
            run = self._runs.get(self._deadlines.popleft()[2])
            if run is not None:
                self._give_up(run, "the deadline passed")
        self._set_deadline()

    def _give_up(self, run: _Run, failure: str) -> None:
        self._leave(run, failure, self._clock.now_s)
        for worker in run.legs:
            if self._is_here(worker):
                worker.abort(run.request.id, failure)

    def _leave(self, run: _Run, failure: str, end_s: float) -> None:
        id = run.request.id
        del self._runs[id], self._ids[id.request_id]
        for worker in run.legs:
            if self._is_here(worker):
                self._unseen[worker.worker_id].forget(id)
                self._stale[worker.worker_id] = None
        run.record.end_s = end_s
        successor = self._admission.leave(id.request_id, self._clock.now_s)
        self._end(run, failure)
        if successor is not None:
            self._successors.append(successor)
            if len(self._successors) == 1:
                self._place_successors()

    def _place_successors(self) -> None:
        """One that nobody can take ends, and so makes room for another one."""
        while self._successors:
            self._place(self._runs[self._ids[self._successors[0]]])
            self._successors.popleft()

    def _is_here(self, worker: VirtualWorker) -> bool:
        """A worker that died is not the one that came in its place."""
        return self._workers.get(worker.worker_id) is worker

    def _end(self, run: _Run, failure: str) -> None:
        run.record.failure = failure
        self._prompts.answered(run.record.arrival, run.request.prompt_token_ids, run.record.num_output_tokens)
        self._on_end(run.record)


def _needs(run: _Run, worker: VirtualWorker) -> bool:
    """One that its decode worker has shown to have does not need its prefill worker."""
    return worker in run.legs and (worker is run.legs[0] or not run.is_decoding)
