"""The client for asyncio programs.

Moves messages; what they say is `request` and `folding`, what a failure is called is `status`. One HTTP/2
connection a client; any number of calls at once from one event loop. Never retries: the caller knows its budget.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from pdserve.proto.errors import RequestCancelled
from pdserve.proto.inference_pb2_grpc import InferenceStub


@contextmanager
def typed_cancellation() -> Iterator[None]:
    """A call cancelled under a task that nobody cancelled is a failure of the call, not of the task."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise RequestCancelled("the call was closed on this side") from None


class AsyncStream(StreamState):
    """One completion as it is made: an async iterator of `Delta`. Leaving early cancels the request."""

    def __init__(self, call: Any) -> None:
        super().__init__(CompletionFold(), call)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        """The next delta, as soon as it is here.

        Raises:
            PdserveError: the request failed; what had come is in `text` and `token_ids`.
        """
        delta: Delta | None = None
        while not self.ended and delta is None:
            with self.cancelled_on_error(), typed_errors(), typed_cancellation():
                response = await self.call.read()
                if response is grpc.aio.EOF:
                    self.finish()
                else:
                    delta = self.fold.add(response)
        if delta is None:
            raise StopAsyncIteration
        return delta

    async def result(self) -> Completion:
        """Read what is left and return the whole completion."""
        async for _ in self:
            pass
        return self.completion

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()


class AsyncClient:
    """A connection to a router at `host:port`. `timeout_s` is the deadline of calls that name none."""

    def __init__(self, endpoint: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.endpoint = checked_endpoint(endpoint)
        self.timeout_s = checked_timeout(timeout_s, DEFAULT_TIMEOUT_S)
        self._channel = grpc.aio.insecure_channel(self.endpoint, options=CHANNEL_OPTIONS)
        self._stub: Any = InferenceStub(self._channel)
        self._health = health_call(self._channel)

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """The whole completion of text, token ids or chat messages.

        Raises:
            PdserveError: the class says what happened and whether to try again.
        """
        return await self.stream(prompt, **options).result()

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Start a completion and return its stream. Use it in an `async with` block so that leaving cancels."""
        request = generate_request(prompt, options)
        return AsyncStream(self._stub.Generate(request, timeout=self._timeout(options.get("timeout_s"))))

    async def tokenize(self, prompt: str | Chat, *, timeout_s: float | None = None) -> tuple[int, ...]:
        """Token ids of a text, or of a conversation through the model's chat template."""
        response = await self._unary(self._stub.Tokenize, tokenize_request(prompt), self._timeout(timeout_s))
        return tuple(response.token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        response = await self._unary(self._stub.Detokenize, detokenize_request(token_ids), self._timeout(timeout_s))
        return str(response.text)

    async def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        request = pb.GetModelInfoRequest()
        return model_info_from_wire(await self._unary(self._stub.GetModelInfo, request, self._timeout(timeout_s)))

    async def health(self, *, timeout_s: float = HEALTH_TIMEOUT_S) -> Health:
        """State of the router as it reports it; an unreachable one raises `Unavailable`."""
        return health_from_wire(await self._unary(self._health, health_request(), self._timeout(timeout_s)))

    async def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        await self.close()

    def _timeout(self, timeout_s: float | None) -> float:
        return checked_timeout(timeout_s, self.timeout_s)

    async def _unary(self, method: Any, request: object, timeout_s: float) -> Any:
        with typed_errors(), typed_cancellation():
            return await method(request, timeout=timeout_s)
