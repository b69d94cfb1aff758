"""One completion put together from its workers' events: pure, no I/O, no clock.

Index 0 comes from the prefill side, the rest from the decode side, on two streams that may overtake each
other; a mixed worker sends both. Each worker's own stream is in order: what repeats is dropped, what skips is
a bug and ends the completion. Also keeps which workers may still hold something of the request, so that an
end of any kind tells exactly those. What a worker says of its phases replaces what it said before; a stage
that no worker told of stays unknown. Knows nothing of text, of deadlines or of clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pdserve.proto.errors import InternalError, Overloaded, PdserveError, WorkerLost, rebuild
from pdserve.proto.types import FinishReason, Phases, SequenceEvent, TokenInfo
from pdserve.router.refusals import as_told


@dataclass(frozen=True, slots=True)
class Ending:
    """A worker's normal last word."""

    reason: FinishReason
    stop_token_id: int | None


class Completion:
    """Tokens wait here, coalesced, until `take`; at most `max_buffered_tokens` of them."""

    def __init__(self, prefill_id: str, decode_id: str, max_buffered_tokens: int) -> None:
        self.prefill_id = prefill_id
        self.decode_id = decode_id
        self.max_buffered_tokens = max_buffered_tokens
        self.error: PdserveError | None = None
        self.holders: set[str] = set()
        self._expected = {decode_id: 1, prefill_id: 0}
        self._ready: list[TokenInfo] = []
        self._early: list[TokenInfo] = []
        self._ending: Ending | None = None
        self._told: dict[str, Phases] = {}
        self._has_final_phases = False

    @property
    def split(self) -> bool:
        return self.prefill_id != self.decode_id

    @property
    def has_first(self) -> bool:
        return self._expected[self.prefill_id] > 0

    @property
    def ending(self) -> Ending | None:
        """Set once every token up to the end is here (`take` may still return some)."""
        return self._ending if self.has_first else None

    @property
    def over(self) -> bool:
        return self.error is not None or self._ending is not None

    @property
    def phases(self) -> Phases:
        """What the workers have told so far, added up."""
        return sum(self._told.values(), Phases())

    @property
    def num_from_decode(self) -> int:
        """Tokens after the first that the decode side has sent."""
        return max(0, self._expected[self.decode_id] - 1)

    def stages_s(self, measured_decode_s: float) -> Mapping[str, float]:
        """Seconds by stage, for the stages that it went through and that are known.

        `measured_decode_s` stands in for the decode worker's word where that never came: a stop string ends the
        completion without the workers.
        """
        known = self.phases
        stages: dict[str, float] = {}
        if self.prefill_id in self._told:
            stages |= {"queue": known.prefill_queue_s, "prefill": known.prefill_s}
        if self.split and self.decode_id in self._told:
            stages |= {"transfer_wait": known.transfer_wait_s, "transfer": known.transfer_s}
            stages |= {"decode_queue": known.decode_queue_s}
        if self.num_from_decode > 0:
            stages |= {"decode": known.decode_s if self._has_final_phases else measured_decode_s}
        return stages

    def accept(self, worker_id: str, event: SequenceEvent) -> None:
        """Take in what one worker said. A gap sets `error`; a repetition changes nothing."""
        if self.error is not None or worker_id not in self._expected:
            return
        from_decode = self.split and worker_id == self.decode_id
        if self._ending is not None and from_decode:
            return
        expected = self._expected[worker_id]
        end = event.index + len(event.tokens)
        if event.tokens and end <= expected:
            return
        if event.index > expected and event.error is None:
            self.error = InternalError(f"{worker_id} skipped from token {expected} to {event.index}")
            return
        self._append(from_decode, event.tokens[max(0, expected - event.index) :])
        self._expected[worker_id] = max(expected, end)
        if event.phases is not None:
            self._told[worker_id] = event.phases
            self._has_final_phases = event.finish_reason is not None
        self._conclude(worker_id, event)

    def lose(self, worker_id: str, why: str) -> None:
        """The worker is gone, and with it what it held."""
        self.holders.discard(worker_id)
        if self.error is None and self._needs(worker_id):
            self.error = WorkerLost(f"worker {worker_id} was lost: {why}")

    def fail(self, error: PdserveError) -> None:
        """End it from outside, unless it has ended."""
        if self.error is None and self.ending is None:
            self.error = error

    def take(self) -> list[TokenInfo]:
        """The tokens that are next, in order; empties the buffer."""
        if not self.has_first:
            return []
        taken, self._ready = self._ready, []
        return taken

    def _needs(self, worker_id: str) -> bool:
        """A prefill side matters until its token is here and the decode side has shown that it has the KV."""
        if self.split and worker_id == self.prefill_id:
            return not self.has_first or self._expected[self.decode_id] == 1
        return worker_id in self._expected and self._ending is None

    def _append(self, from_decode: bool, tokens: tuple[TokenInfo, ...]) -> None:
        if from_decode and not self.has_first:
            self._early.extend(tokens)
        else:
            self._ready.extend(tokens)
            if tokens and self._early:
                self._ready.extend(self._early)
                self._early = []
        if len(self._ready) + len(self._early) > self.max_buffered_tokens:
            self.error = Overloaded("the client reads too slowly: its buffer is full")

    def _conclude(self, worker_id: str, event: SequenceEvent) -> None:
        if event.error is not None:
            self.holders.discard(worker_id)
            if self._needs(worker_id):
                self.error = as_told(worker_id, rebuild(event.error.kind, event.error.message))
        elif event.finish_reason is not None:
            self.holders.discard(worker_id)
            if worker_id == self.decode_id:
                self.holders.discard(self.prefill_id)
            self._ending = Ending(event.finish_reason, event.stop_token_id)
        elif self.split and self._expected[self.prefill_id] > 1:
            self.error = InternalError(f"{self.prefill_id} went on after handing over")
