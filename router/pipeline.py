"""The life of one request, from checked parameters to its one terminal outcome.

    arrived   -> QUEUED | ADMITTED   `Admission`: full -> Overloaded, the same id twice -> DuplicateRequest
    ADMITTED  -> PLACED              policy over the last loads; nobody -> Unavailable
    PLACED    -> EXPECTED            `Expect` to the decode worker: destination first (not for a mixed worker)
    EXPECTED  -> PREFILLING          `Prefill` to the prefill worker, naming the decode worker
    PREFILLING -> STREAMING          index 0 from the prefill worker, then 1.. from the decode worker
    STREAMING -> FINISHED            a worker's last word, or a stop string; Finished is written
    anything  -> ended with an error refused, deadline, client gone, worker lost, reader too slow, router going

Whatever the end, it happens once; every worker that may still hold something of the request is sent `Abort`
(after its outstanding call has returned, so that an abort never overtakes what it aborts), and the next queued
request starts. Aborts run in the pipeline's own tasks with their own deadline: neither a cancelled client nor a
passed deadline stops them. Each admission is an attempt of its own: workers remember what was aborted, and a client
may use its id again.

Knows nothing of gRPC servers, of validation or of how workers are found.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from pdserve.proto.clock import now
from pdserve.proto.errors import DeadlineExceeded, Unavailable
from pdserve.proto.types import HandoffId, WorkerRequest
from pdserve.router.admission import Admission, Verdict
from pdserve.router.completion import Completion, Ending
from pdserve.router.connection import WorkerConnection
from pdserve.router.fleet import Fleet
from pdserve.router.inbox import Inbox
from pdserve.router.metrics import RouterMetrics
from pdserve.router.policy import Policy, place
from pdserve.router.view import Pending
from pdserve.router.writer import Emit, Job, Writer

LOG = logging.getLogger("pdserve.router")
MAX_ATTEMPT = (1 << 32) - 1  # what the wire carries; it wraps


@dataclass(slots=True)
class _Run:
    """One admitted request's moving parts."""

    id: HandoffId
    job: Job
    inbox: Inbox
    legs: dict[str, WorkerConnection]
    calls: dict[str, asyncio.Task[None]]
    told: set[str] = field(default_factory=set)  # workers that an abort is on its way to, or has reached


class Pipeline:
    """Owner of admission, of the requests in flight and of the aborts under way."""

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        admission: Admission,
        metrics: RouterMetrics,
        *,
        epoch: int,
        decode: Callable[[Sequence[int]], str] | None,
        max_buffered_tokens: int,
        first_turn: int = 0,
    ) -> None:
        """`first_turn`: where the policy starts to go round; routers that start alike must not all start alike here."""
        self.draining = False
        self._fleet = fleet
        self._policy = policy
        self._admission = admission
        self._metrics = metrics
        self._epoch = epoch
        self._decode = decode
        self._max_buffered_tokens = max_buffered_tokens
        self._attempts = itertools.count()
        self._turn = first_turn
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._runs: dict[str, _Run] = {}
        self._aborts: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_inflight(self) -> int:
        return self._admission.num_inflight

    @property
    def num_queued(self) -> int:
        return self._admission.num_queued

    async def generate(self, job: Job, emit: Emit) -> None:
        """Run `job` to its end, writing deltas and one Finished; any other end is raised."""
        if self.draining:
            raise Unavailable("the router is draining")
        verdict = self._admission.arrive(job.request_id, now(), job.deadline_s)
        self._idle.clear()
        try:
            async with asyncio.timeout(job.deadline_s - now()):
                if verdict is Verdict.QUEUED:
                    await self._turn_comes(job.request_id)
                await self._serve(job, emit)
        except TimeoutError as error:
            raise DeadlineExceeded("the deadline passed") from error
        finally:
            self._leave(job.request_id)

    async def drain(self, grace_s: float) -> None:
        """Refuse what comes, let what is here end; after `grace_s` end it with Unavailable."""
        self.draining = True
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Unavailable("the router is draining"))
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        for run in list(self._runs.values()):
            run.inbox.fail(Unavailable("the router is shutting down"))

    async def close(self) -> None:
        """Wait for the aborts under way; each has its own deadline."""
        while self._aborts:
            await asyncio.wait(self._aborts)

    async def _turn_comes(self, request_id: str) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future
        try:
            await future
        finally:
            del self._waiting[request_id]

    def _leave(self, request_id: str) -> None:
        successor = self._admission.leave(request_id, now())
        if successor is not None and not self._waiting[successor].done():
            self._waiting[successor].set_result(None)
        if self._admission.num_inflight + self._admission.num_queued == 0:
            self._idle.set()

    async def _serve(self, job: Job, emit: Emit) -> None:
        run = self._place(job)
        self._runs[job.request_id] = run
        try:
            await self._start(run)
            await self._stream(run, emit)
        finally:
            del self._runs[job.request_id]
            self._release(run)

    def _place(self, job: Job) -> _Run:
        """Choose the workers and listen to them. Raises Unavailable, or InvalidRequest for what fits nowhere."""
        turn, self._turn = self._turn, self._turn + 1
        placement = place(self._policy, self._fleet.candidates, len(job.prompt_token_ids), turn)
        LOG.debug("%s -> %s, %s: %s", job.request_id, placement.prefill_id, placement.decode_id, placement.reason)
        id = HandoffId(job.request_id, next(self._attempts) & MAX_ATTEMPT, self._epoch)
        completion = Completion(placement.prefill_id, placement.decode_id, self._max_buffered_tokens)
        inbox = Inbox(completion)
        legs = {name: self._fleet.connection(name) for name in (placement.decode_id, placement.prefill_id)}
        for name, leg in legs.items():
            prompt_tokens = len(job.prompt_token_ids) if name == placement.prefill_id else 0
            leg.attach(id, inbox, Pending(1, prompt_tokens, leg.info.layout.num_blocks(len(job.prompt_token_ids) + 1)))
        run = _Run(id, job, inbox, legs, {})
        inbox.on_error = partial(self._abort, run, "the request has failed")
        return run

    async def _start(self, run: _Run) -> None:
        """`Expect`, then `Prefill`; raises what the worker answered."""
        completion = run.inbox.completion
        prefill, decode = run.legs[completion.prefill_id], run.legs[completion.decode_id]
        if completion.split:
            await self._call(run, decode, partial(decode.expect, self._request(run), prefill.info))
        hand_off_to = decode.info if completion.split else None
        await self._call(run, prefill, partial(prefill.prefill, self._request(run), hand_off_to))
        self._metrics.prompt_tokens.inc(len(run.job.prompt_token_ids))

    def _request(self, run: _Run) -> WorkerRequest:
        timeout_s = max(0.0, run.job.deadline_s - now())
        return WorkerRequest(run.id, run.job.prompt_token_ids, run.job.sampling, timeout_s)

    async def _call(self, run: _Run, leg: WorkerConnection, call: Callable[[], Coroutine[None, None, None]]) -> None:
        """The worker may hold something as soon as it is called, and a call under way is not torn down."""
        completion = run.inbox.completion
        if completion.error is not None:
            raise completion.error
        completion.holders.add(leg.worker_id)
        task = asyncio.create_task(call())
        task.add_done_callback(_look_at)
        run.calls[leg.worker_id] = task
        try:
            await asyncio.shield(task)
        finally:
            # It may have been counted as lost meanwhile; what it took in after that, it holds until it is told.
            if completion.error is not None and leg.worker_id not in run.told:
                completion.holders.add(leg.worker_id)

    async def _stream(self, run: _Run, emit: Emit) -> None:
        completion = run.inbox.completion
        writer = Writer(run.job, self._decode, self._metrics, emit)
        while True:
            # Tokens that arrived before an error are the client's; the error comes after them.
            tokens, ending, error = completion.take(), completion.ending, completion.error
            if tokens:
                await writer.write(tokens)
            if error is not None and writer.stopped is None:
                raise error
            if ending is not None and writer.stopped is None:
                await writer.flush()
            if ending is not None or writer.stopped is not None:
                await self._finish(run, writer, ending)
                return
            await run.inbox.wait()

    async def _finish(self, run: _Run, writer: Writer, ending: Ending | None) -> None:
        """A stop string may have ended it while a worker still runs: that worker is told before the client is."""
        self._abort(run, "finished")
        completion = run.inbox.completion
        timing = writer.timing()
        reason = await writer.finish(completion, ending, timing)
        self._metrics.finished(timing, completion.stages_s(writer.decode_s(completion)), reason)

    def _release(self, run: _Run) -> None:
        """Stop listening and tell every worker that may hold something. Runs on every end, without awaiting."""
        for leg in run.legs.values():
            leg.detach(run.id)
        self._abort(run, "the request has ended")

    def _abort(self, run: _Run, reason: str) -> None:
        holders = run.inbox.completion.holders
        for worker_id in sorted(holders):
            task = asyncio.create_task(self._abort_leg(run, run.legs[worker_id], reason))
            self._aborts.add(task)
            task.add_done_callback(self._aborts.discard)
        run.told |= holders
        holders.clear()

    async def _abort_leg(self, run: _Run, leg: WorkerConnection, reason: str) -> None:
        await asyncio.wait([run.calls[leg.worker_id]])
        await leg.abort(run.id, reason)


def _look_at(call: asyncio.Task[None]) -> None:
    """Who waits for a call may be gone when it fails; asyncio complains of exceptions that nobody looked at."""
    if not call.cancelled():
        call.exception()
