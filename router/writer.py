"""One request's answer on its way to the client: tokens to deltas, text and stop strings, times and counts.

Everything is written through `emit`, which may block for as long as the client does not read and raises when it
has had enough. Knows nothing of workers, of deadlines or of gRPC calls.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from pdserve.proto import inference_pb2 as pb
from pdserve.proto.clock import now
from pdserve.proto.types import FinishReason, RequestTiming, SamplingParams, TokenInfo
from pdserve.router.completion import Completion, Ending
from pdserve.router.detokenizer import Detokenizer
from pdserve.router.metrics import RouterMetrics
from pdserve.router.validation import StopOptions

Emit = Callable[[pb.GenerateResponse], Awaitable[None]]
REASONS = {FinishReason.STOP: pb.FINISH_REASON_STOP, FinishReason.LENGTH: pb.FINISH_REASON_LENGTH}


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request. `arrival_s` and `deadline_s` are moments of `proto.clock`."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: StopOptions
    arrival_s: float
    deadline_s: float


class Writer:
    """Owner of what was delivered. `decode` is `None` for a model without a tokenizer: text stays empty."""

    def __init__(
        self, job: Job, decode: Callable[[Sequence[int]], str] | None, metrics: RouterMetrics, emit: Emit
    ) -> None:
        self._job = job
        self._metrics = metrics
        self._emit = emit
        self._text = None if decode is None else Detokenizer(decode, job.stop, job.sampling.min_tokens)
        self._num_tokens = 0
        self._first_token_s: float | None = None
        self._last_token_s: float | None = None
        self._second_token_s: float | None = None

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the completion."""
        return None if self._text is None else self._text.stopped

    async def write(self, tokens: Sequence[TokenInfo]) -> None:
        """One delta for all of `tokens`, or for those up to the one that completed a stop string."""
        text, shown = "", tokens
        if self._text is not None:
            for position, token in enumerate(tokens):
                text += self._text.feed(token.token_id)
                if self._text.stopped is not None:
                    shown = tokens[: position + 1]
                    break
        index = self._num_tokens
        self._note(len(shown), now())
        await self._send(index, shown, text)

    async def flush(self) -> None:
        """The text that was held back; may find a stop string after all."""
        text = "" if self._text is None else self._text.flush()
        if text:
            await self._send(self._num_tokens, (), text)

    async def finish(self, completion: Completion, ending: Ending | None, timing: RequestTiming) -> FinishReason:
        """The last message. `ending` is `None` when a stop string came before any worker's end."""
        stop_text = self.stopped
        reason = FinishReason.STOP if stop_text is not None or ending is None else ending.reason
        num_prompt_tokens, phases = len(self._job.prompt_token_ids), completion.phases
        finished = pb.Finished(
            reason=REASONS[reason],
            usage=pb.Usage(
                prompt_tokens=num_prompt_tokens,
                completion_tokens=self._num_tokens,
                total_tokens=num_prompt_tokens + self._num_tokens,
                transferred_tokens=phases.transferred_tokens,
                recomputed_tokens=phases.recomputed_tokens,
            ),
            timings=_timings(completion.stages_s(self.decode_s(completion)), timing),
            prefill_worker=completion.prefill_id,
            decode_worker=completion.decode_id,
        )
        if stop_text is not None:
            finished.stop_text = stop_text
        elif ending is not None and ending.stop_token_id is not None:
            finished.stop_token_id = ending.stop_token_id
        await self._emit(pb.GenerateResponse(request_id=self._job.request_id, finished=finished))
        return reason

    def timing(self) -> RequestTiming:
        """The request's moments, ending now."""
        arrival_s = self._job.arrival_s
        return RequestTiming(arrival_s, arrival_s, self._first_token_s, self._last_token_s, now(), self._num_tokens)

    def decode_s(self, completion: Completion) -> float:
        """From the decode worker's first token to the last one, as written here."""
        first_s = self._second_token_s if completion.split else self._first_token_s
        return 0.0 if first_s is None or self._last_token_s is None else self._last_token_s - first_s

    def _note(self, num_tokens: int, now_s: float) -> None:
        if self._last_token_s is None:
            self._first_token_s = now_s
            self._metrics.time_to_first_token.observe(now_s - self._job.arrival_s)
        else:
            self._metrics.inter_token_latency.observe((now_s - self._last_token_s) / num_tokens)
        self._last_token_s = now_s
        self._num_tokens += num_tokens
        if self._second_token_s is None and self._num_tokens > 1:
            self._second_token_s = now_s
        self._metrics.generation_tokens.inc(num_tokens)

    async def _send(self, index: int, tokens: Sequence[TokenInfo], text: str) -> None:
        output = pb.TokenOutput(index=index, tokens=[_token(token) for token in tokens], text=text)
        await self._emit(pb.GenerateResponse(request_id=self._job.request_id, output=output))


def _token(token: TokenInfo) -> pb.TokenInfo:
    top = [pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in token.top]
    return pb.TokenInfo(token_id=token.token_id, logprob=token.logprob, top=top)


def _timings(stages_s: Mapping[str, float], timing: RequestTiming) -> pb.RequestTimings:
    """A stage that is not known, or was not gone through, takes no time here."""
    return pb.RequestTimings(
        prefill_queue_ms=stages_s.get("queue", 0.0) * 1e3,
        prefill_ms=stages_s.get("prefill", 0.0) * 1e3,
        transfer_wait_ms=stages_s.get("transfer_wait", 0.0) * 1e3,
        transfer_ms=stages_s.get("transfer", 0.0) * 1e3,
        decode_queue_ms=stages_s.get("decode_queue", 0.0) * 1e3,
        decode_ms=stages_s.get("decode", 0.0) * 1e3,
        ttft_ms=timing.ttft_ms(),
        e2e_ms=timing.e2e_ms(),
    )
