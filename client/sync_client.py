"""The client for programs without an event loop: the same calls as `AsyncClient`, blocking.

Safe to use from several threads at once; one stream belongs to one thread (`close` may come from another). gRPC's
blocking calls are not interrupt-safe: a program that goes on after Ctrl-C inside a call should do so with a new
client, or use `AsyncClient`, where asyncio turns Ctrl-C into a clean cancellation.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from pdserve.client.connection import (
    CHANNEL_OPTIONS,
    DEFAULT_TIMEOUT_S,
    HEALTH_TIMEOUT_S,
    checked_endpoint,
    health_call,
    health_from_wire,
    health_request,
)
from pdserve.client.folding import CompletionFold, model_info_from_wire
from pdserve.client.request import (
    Chat,
    GenerateOptions,
    Prompt,
    checked_timeout,
    detokenize_request,
    generate_request,
    tokenize_request,
)
from pdserve.client.results import Completion, Delta, Health, ModelInfo
from pdserve.client.status import typed_errors
from pdserve.client.stream_state import StreamState
from pdserve.proto import inference_pb2 as pb
from pdserve.proto.inference_pb2_grpc import InferenceStub


class Stream(StreamState):
    """One completion as it is made: an iterator of `Delta`. Leaving early cancels the request."""

    def __init__(self, call: Any) -> None:
        super().__init__(CompletionFold(), call)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        """The next delta, as soon as it is here.

        Raises:
            PdserveError: the request failed; what had come is in `text` and `token_ids`.
        """
        delta: Delta | None = None
        while not self.ended and delta is None:
            with self.cancelled_on_error(), typed_errors():
                response = next(self.call, None)
                if response is None:
                    self.finish()
                else:
                    delta = self.fold.add(response)
        if delta is None:
            raise StopIteration
        return delta

    def result(self) -> Completion:
        """Read what is left and return the whole completion."""
        for _ in self:
            pass
        return self.completion

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()


class Client:
    """A connection to a router at `host:port`. `timeout_s` is the deadline of calls that name none."""

    def __init__(self, endpoint: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.endpoint = checked_endpoint(endpoint)
        self.timeout_s = checked_timeout(timeout_s, DEFAULT_TIMEOUT_S)
        self._channel = grpc.insecure_channel(self.endpoint, options=CHANNEL_OPTIONS)
        self._stub: Any = InferenceStub(self._channel)
        self._health = health_call(self._channel)

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """The whole completion of text, token ids or chat messages.

        Raises:
            PdserveError: the class says what happened and whether to try again.
        """
        return self.stream(prompt, **options).result()

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream:
        """Start a completion and return its stream. Use it in a `with` block so that leaving cancels."""
        request = generate_request(prompt, options)
        return Stream(self._stub.Generate(request, timeout=self._timeout(options.get("timeout_s"))))

    def tokenize(self, prompt: str | Chat, *, timeout_s: float | None = None) -> tuple[int, ...]:
        """Token ids of a text, or of a conversation through the model's chat template."""
        return tuple(self._unary(self._stub.Tokenize, tokenize_request(prompt), self._timeout(timeout_s)).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        request = detokenize_request(token_ids)
        return str(self._unary(self._stub.Detokenize, request, self._timeout(timeout_s)).text)

    def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        request = pb.GetModelInfoRequest()
        return model_info_from_wire(self._unary(self._stub.GetModelInfo, request, self._timeout(timeout_s)))

    def health(self, *, timeout_s: float = HEALTH_TIMEOUT_S) -> Health:
        """State of the router as it reports it; an unreachable one raises `Unavailable`."""
        return health_from_wire(self._unary(self._health, health_request(), self._timeout(timeout_s)))

    def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def _timeout(self, timeout_s: float | None) -> float:
        return checked_timeout(timeout_s, self.timeout_s)

    def _unary(self, method: Any, request: object, timeout_s: float) -> Any:
        with typed_errors():
            return method(request, timeout=timeout_s)
