"""Response messages to results: the client's half of the streaming contract, checked.

Knows the messages and nothing of how they arrive. What the server must keep (and `CompletionFold` refuses
otherwise): deltas gapless and in order from index 0, one request id, exactly one `Finished`, and it is last.
"""

from __future__ import annotations

from pdserve.client.results import Completion, Delta, ModelInfo, Timings, Usage
from pdserve.proto import inference_pb2 as pb
from pdserve.proto.errors import InternalError
from pdserve.proto.types import FinishReason, TokenInfo

FINISH_REASONS = {pb.FINISH_REASON_STOP: FinishReason.STOP, pb.FINISH_REASON_LENGTH: FinishReason.LENGTH}


class CompletionFold:
    """Adds up one stream. Owned by the stream that feeds it."""

    def __init__(self) -> None:
        self.request_id = ""
        self.tokens: list[TokenInfo] = []
        self.texts: list[str] = []
        self.finished: pb.Finished | None = None

    def add(self, response: pb.GenerateResponse | None) -> Delta | None:
        """The delta this message carries, or `None` for the final one. gRPC hands over `None` for unreadable bytes.

        Raises:
            InternalError: the server broke the streaming contract.
        """
        if response is None:
            raise self._broken("bytes that are no message came")
        if self.finished is not None:
            raise self._broken("an event came after the final one")
        if self.request_id and response.request_id != self.request_id:
            raise self._broken(f"an event of request {response.request_id!r} came")
        self.request_id = response.request_id
        event = response.WhichOneof("event")
        if event == "output":
            return self._add_output(response.output)
        if event == "finished":
            self._add_finished(response.finished)
            return None
        raise self._broken("a message without an event came")

    def completion(self) -> Completion:
        """The whole answer; to be called when the stream has ended well.

        Raises:
            InternalError: the stream ended without its final event.
        """
        if self.finished is None:
            raise self._broken("the stream ended without its final event")
        finished, tokens = self.finished, tuple(self.tokens)
        match finished.WhichOneof("stop_match"):
            case "stop_text":
                stop_match: str | int | None = finished.stop_text
            case "stop_token_id":
                stop_match = finished.stop_token_id
            case _:
                stop_match = None
        return Completion(
            request_id=self.request_id,
            text=self.text,
            token_ids=tuple(token.token_id for token in tokens),
            finish_reason=FINISH_REASONS[finished.reason],
            stop_match=stop_match,
            usage=usage_from_wire(finished.usage),
            timings=timings_from_wire(finished.timings),
            prefill_worker=finished.prefill_worker,
            decode_worker=finished.decode_worker,
            logprobs=_logprobs(tokens),
        )

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def _add_output(self, output: pb.TokenOutput) -> Delta:
        if output.tokens and output.index != len(self.tokens):
            raise self._broken(f"token {len(self.tokens)} was due and token {output.index} came")
        tokens = tuple(_token_from_wire(token) for token in output.tokens)
        delta = Delta(len(self.tokens), tuple(token.token_id for token in tokens), output.text, _logprobs(tokens))
        self.tokens.extend(tokens)
        if output.text:
            self.texts.append(output.text)
        return delta

    def _add_finished(self, finished: pb.Finished) -> None:
        if finished.reason not in FINISH_REASONS:
            raise self._broken(f"the final event has no known reason ({finished.reason})")
        if finished.HasField("usage") and finished.usage.completion_tokens != len(self.tokens):
            raise self._broken(f"{finished.usage.completion_tokens} tokens were counted, {len(self.tokens)} came")
        self.finished = finished

    def _broken(self, what: str) -> InternalError:
        return InternalError(f"malformed answer to request {self.request_id!r}: {what}")


def usage_from_wire(message: pb.Usage) -> Usage:
    return Usage(
        message.prompt_tokens,
        message.completion_tokens,
        message.total_tokens,
        message.transferred_tokens,
        message.recomputed_tokens,
    )


def timings_from_wire(message: pb.RequestTimings) -> Timings:
    return Timings(
        message.prefill_queue_ms,
        message.prefill_ms,
        message.transfer_wait_ms,
        message.transfer_ms,
        message.decode_queue_ms,
        message.decode_ms,
        message.ttft_ms,
        message.e2e_ms,
    )


def model_info_from_wire(message: pb.GetModelInfoResponse) -> ModelInfo:
    return ModelInfo(
        model=message.model,
        architecture=message.architecture,
        vocab_size=message.vocab_size,
        max_model_len=message.max_model_len,
        has_tokenizer=message.has_tokenizer,
        has_chat_template=message.has_chat_template,
        eos_token_ids=tuple(message.eos_token_ids),
        num_prefill_workers=message.num_prefill_workers,
        num_decode_workers=message.num_decode_workers,
        num_mixed_workers=message.num_mixed_workers,
    )


def _token_from_wire(message: pb.TokenInfo) -> TokenInfo:
    logprob = message.logprob if message.HasField("logprob") else None
    return TokenInfo(message.token_id, logprob, tuple((entry.token_id, entry.logprob) for entry in message.top))


def _logprobs(tokens: tuple[TokenInfo, ...]) -> tuple[TokenInfo, ...] | None:
    """The tokens with their log-probabilities, if the server sent any."""
    return tokens if any(token.logprob is not None for token in tokens) else None
