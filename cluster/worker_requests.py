"""One worker's requests: accepted, worked on by the roles and the engine, ended, and what routers are told of them.

    accepted --turns of the engine--> events ... --finish | error | redeemed--> ended, exactly once

Runs on one event loop; what touches the engine is posted to its thread. A turn of the engine comes back as
`turn_ended`: its tokens become events, its computed parts go to the prefill role, its load goes out with the events,
all in one message. Knows nothing of gRPC, of links or of how the worker was put together; which requests it gets is
the router's decision.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable

from pdserve.cluster.live_requests import LiveRequests
from pdserve.cluster.output_hub import OutputHub, OutputStream
from pdserve.cluster.worker_load import worker_load
from pdserve.decode_worker.role import DecodeRole
from pdserve.engine.loop import Command
from pdserve.engine.plan import SequenceStep
from pdserve.engine.sequence import Sequence
from pdserve.engine.turn import Turn
from pdserve.prefill_worker.role import PrefillRole
from pdserve.proto.clock import now
from pdserve.proto.errors import DeadlineExceeded, InternalError, PdserveError, StaleReference, Unavailable, WrongRole
from pdserve.proto.types import (
    EventError,
    HandoffId,
    Phases,
    SequenceEvent,
    WorkerInfo,
    WorkerLoad,
    WorkerRef,
    WorkerRequest,
)

logger = logging.getLogger(__name__)
DEADLINE_GRACE_S = 1.0


class WorkerRequests:
    """Owner of live requests, output streams and roles. The roles are mounted after construction: they need it."""

    def __init__(
        self,
        info: WorkerInfo,
        check: Callable[[WorkerRequest, bool], None],
        post: Callable[[Command], None],
        quarantine_budget_blocks: int,
        quarantine_patience_s: float,
    ) -> None:
        """`check(request, hand_off)` raises InvalidRequest for what the engine could never finish."""
        self.info = info
        self.prefill_role: PrefillRole | None = None
        self.decode_role: DecodeRole | None = None
        self._check = check
        self._post = post
        self._quarantine_budget_blocks = quarantine_budget_blocks
        self._quarantine_patience_s = quarantine_patience_s
        self._within_budget_s: float | None = None  # when it last was
        self._hub = OutputHub()
        self._live = LiveRequests()
        self._turn: Turn | None = None
        self._last_step_s = 0.0
        self._is_ending = False

    @property
    def worker_id(self) -> str:
        return self.info.worker.worker_id

    @property
    def is_idle(self) -> bool:
        return not self._live.all()

    # What routers and peers ask.

    def require_generation(self, generation: int) -> None:
        """A message for an earlier life of this worker must not touch this one.

        Raises:
            StaleReference: it is for another one.
        """
        if generation != self.info.worker.generation:
            raise StaleReference("addressed to another generation of this worker")

    def prefill(self, request: WorkerRequest, hand_off_to: WorkerRef | None) -> None:
        """Accept a prompt. Repeating an accepted request changes nothing."""
        if not self._is_new(request):
            return
        self._check(request, hand_off_to is not None)
        if hand_off_to is not None:
            role = self.require_prefill()
            self._accept(request)
            role.prefill(request, hand_off_to)
        else:
            self.require_decode()
            self._accept(request)
            sequence = Sequence(request, now())
            self._post(lambda engine: engine.add(sequence))

    def expect(self, request: WorkerRequest, source: WorkerRef) -> None:
        """Accept the decode leg of a request whose KV will come from `source`."""
        role = self.require_decode()
        if not self._is_new(request):
            return
        self._check(request, False)
        role.expect(request, source)
        self._accept(request)

    def abort(self, handoff: HandoffId, reason: str) -> None:
        """Stop work on a request and free its blocks, wherever it is. Nothing more is accepted under its id."""
        self._live.abort(handoff)
        self._post(lambda engine: engine.abort(handoff))
        if self.prefill_role is not None:
            self.prefill_role.abort(handoff, reason)
        if self.decode_role is not None:
            self.decode_role.abort(handoff, reason)

    def require_prefill(self) -> PrefillRole:
        if self.prefill_role is None:
            raise WrongRole(f"{self.worker_id} does not prefill for others; it is a {self.info.role} worker")
        return self.prefill_role

    def require_decode(self) -> DecodeRole:
        if self.decode_role is None:
            raise WrongRole(f"{self.worker_id} does not decode; it is a {self.info.role} worker")
        return self.decode_role

    def open_stream(self, epoch: int) -> OutputStream:
        """A router's stream; one that comes while another is open means that the router has given that one up."""
        self._abort_epoch(epoch)
        return self._hub.open(epoch, self.load_now())

    def close_stream(self, epoch: int, stream: OutputStream) -> None:
        """A router's stream ended: nobody will read its sequences' tokens, so they end too."""
        if self._hub.close(epoch, stream):
            self._abort_epoch(epoch)

    def _abort_epoch(self, epoch: int) -> None:
        for handoff in self._live.of_epoch(epoch):
            self.abort(handoff, "the router's output stream ended")

    def load_now(self) -> WorkerLoad:
        """The load after the last turn."""
        assert self._turn is not None, "the first turn precedes the server's readiness"
        return worker_load(self.info, self._turn, self._last_step_s)

    # What the engine, the clock and the fleet report.

    def turn_ended(self, turn: Turn) -> None:
        self._turn = turn
        if turn.step is not None:
            self._last_step_s = turn.step.duration_s
            for part in turn.step.parts:
                self.require_prefill().part_computed(part)
            for step in turn.step.sequences:
                self._on_sequence(step)
        if self.decode_role is not None:
            self.decode_role.turn_ended(turn)
        self._hub.flush(self.load_now())

    def peer_gone(self, worker_id: str, generation: int) -> None:
        """A peer process died: end what waits for it, and let go of its memory."""
        if self.prefill_role is not None:
            self.prefill_role.peer_gone(worker_id, generation)
        if self.decode_role is not None:
            self.decode_role.peer_gone(worker_id, generation)

    def sweep(self) -> None:
        """Deadlines of everything, also while nothing else happens."""
        now_s = now()
        for handoff in self._live.overdue(now_s):
            self.fail(handoff, DeadlineExceeded("the deadline passed"))
        if self.prefill_role is not None:
            self.prefill_role.sweep(now_s)
        if self.decode_role is not None:
            self.decode_role.sweep(now_s)
        self._check_quarantine(now_s)

    def _check_quarantine(self, now_s: float) -> None:
        """A wire that never falls idle eats the pool: past the budget the worker gives up, to be replaced.

        Not at once: a long prompt that is cancelled on its way exceeds the budget for as long as its wire takes to end.
        """
        quarantined = self.load_now().quarantined_blocks
        budget = min(self._quarantine_budget_blocks, self.info.num_blocks // 2)
        if quarantined <= budget or self._within_budget_s is None:
            self._within_budget_s = now_s
        elif now_s - self._within_budget_s > self._quarantine_patience_s:
            raise InternalError(f"{quarantined} blocks are in quarantine, {budget} are allowed")

    def crashed(self, error: BaseException) -> str:
        """A bug ends the worker: its state can no longer be trusted. Tells every request; an opaque id for the log."""
        opaque = secrets.token_hex(6)
        logger.error("crashed (%s)", opaque, exc_info=error)
        self._is_ending = True
        for handoff in self._live.all():
            self.fail(handoff, InternalError(f"{self.worker_id}: internal error {opaque}"))
        return opaque

    def stop(self) -> None:
        """Accept nothing more."""
        self._is_ending = True

    def _on_sequence(self, step: SequenceStep) -> None:
        """Tell the router what a step did for a sequence."""
        sequence, handoff = step.sequence, step.sequence.request.id
        if handoff not in self._live:
            return  # it ended while the step ran: nothing is said after the last word
        if step.error is not None:
            self.fail(handoff, step.error)
            return
        assert step.token is not None
        ends = step.finish is not None or step.handed_off
        begins = step.position == (1 if sequence.num_transferred_tokens else 0)  # its first token from this worker
        event = SequenceEvent(
            id=handoff,
            index=step.position,
            tokens=(step.token,),
            finish_reason=step.finish.reason if step.finish else None,
            stop_token_id=step.finish.stop_token_id if step.finish else None,
            phases=self._phases(sequence) if ends or begins else None,
        )
        self._hub.emit(event)
        if step.finish is not None:
            self.end(handoff)

    def _phases(self, sequence: Sequence) -> Phases:
        """Where its time went so far, as far as this worker knows."""
        if self.decode_role is None:
            return sequence.phases
        return sequence.phases + self.decode_role.transfer_phases(sequence.request.id)

    # Requests' ends.

    def _is_new(self, request: WorkerRequest) -> bool:
        """False for a repeated accept.

        Raises:
            StaleReference: nobody would read its tokens, or it was aborted already.
            Unavailable: the worker is ending.
        """
        if self._is_ending:
            raise Unavailable(f"{self.worker_id} is ending")
        self._hub.require(request.id.epoch)
        return self._live.is_new(request.id)

    def _accept(self, request: WorkerRequest) -> None:
        self._live.accept(request.id, now() + request.timeout_s + DEADLINE_GRACE_S)

    def end(self, handoff: HandoffId) -> None:
        """The last word on it is said, or its KV is redeemed."""
        self._live.end(handoff)
        if self.prefill_role is not None:
            self.prefill_role.finished(handoff)
        if self.decode_role is not None:
            self.decode_role.finished(handoff)

    def fail(self, handoff: HandoffId, error: PdserveError) -> None:
        """End a request here with an error; the router hears of it at once."""
        if not self._live.end(handoff):
            return  # it ended already
        self.abort(handoff, error.message)
        self._hub.emit(SequenceEvent(id=handoff, index=0, error=EventError(type(error).__name__, error.message)))
        if self._turn is not None:
            self._hub.flush(self.load_now())
