"""A scriptable Inference server in a thread of its own, for tests of what talks to the router.

`Generate` answers with whatever the script yields: messages, raw bytes, or an abort. Everything it saw is kept. Knows
nothing of the real router beyond the messages.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeAlias

import grpc
from pdserve.proto import inference_pb2 as pb

Script: TypeAlias = Callable[[pb.GenerateRequest, Any], AsyncIterator[pb.GenerateResponse | bytes]]

MODEL_INFO = pb.GetModelInfoResponse(
    model="fake",
    architecture="FakeForCausalLM",
    vocab_size=64,
    max_model_len=4096,
    has_tokenizer=True,
    has_chat_template=True,
    eos_token_ids=[2, 7],
    num_prefill_workers=1,
    num_decode_workers=2,
)


def delta(index: int, *token_ids: int, text: str = "", request_id: str = "r") -> pb.GenerateResponse:
    tokens = [pb.TokenInfo(token_id=token_id) for token_id in token_ids]
    return pb.GenerateResponse(request_id=request_id, output=pb.TokenOutput(index=index, tokens=tokens, text=text))


def finished(num_tokens: int, reason: int = pb.FINISH_REASON_LENGTH, request_id: str = "r") -> pb.GenerateResponse:
    return pb.GenerateResponse(
        request_id=request_id,
        finished=pb.Finished(
            reason=reason,
            usage=pb.Usage(prompt_tokens=3, completion_tokens=num_tokens, total_tokens=3 + num_tokens),
            timings=pb.RequestTimings(prefill_queue_ms=1, prefill_ms=2, transfer_ms=3, decode_ms=4, e2e_ms=10),
            prefill_worker="p0",
            decode_worker="d0",
        ),
    )


async def count_up(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse | bytes]:
    """The default script: tokens 10, 11, ... one a message, `max_tokens` of them (4 unless told)."""
    num_tokens = request.stopping.max_tokens or 4
    for index in range(num_tokens):
        yield delta(index, 10 + index % 50, text=f"w{index} ", request_id=request.request_id or "minted")
    yield finished(num_tokens, request_id=request.request_id or "minted")


def replies(*responses: pb.GenerateResponse | bytes) -> Script:
    """A script that sends these and ends with OK."""

    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse | bytes]:
        for response in responses:
            yield response

    return script


def aborts(
    code: grpc.StatusCode, message: str, *before: pb.GenerateResponse, trailing: tuple[tuple[str, Any], ...] = ()
) -> Script:
    """A script that sends `before` and then fails."""

    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse | bytes]:
        for response in before:
            yield response
        await context.abort(code, message, trailing)

    return script


def stalls(*before: pb.GenerateResponse) -> Script:
    """A script that sends `before` and then waits until it is cancelled."""

    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse | bytes]:
        for response in before:
            yield response
        await asyncio.Event().wait()

    return script


class FakeInference:
    """State that tests read. `stalled` and `cancelled` are set from the server's thread."""

    def __init__(self) -> None:
        self.script: Script = count_up
        self.requests: list[pb.GenerateRequest] = []
        self.deadlines_s: list[float | None] = []
        self.cancelled = threading.Event()
        self.num_running = 0
        self.max_running = 0
        self.unary_abort: tuple[grpc.StatusCode, str] | None = None
        self.endpoint = ""

    async def generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse | bytes]:
        self.requests.append(request)
        self.deadlines_s.append(context.time_remaining())
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            async for response in self.script(request, context):
                yield response
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.num_running -= 1

    async def tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        await self._maybe_abort(context)
        text = request.prompt or "".join(f"<{m.role}>{m.content}" for m in request.chat.messages)
        return pb.TokenizeResponse(token_ids=[ord(character) for character in text])

    async def detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        await self._maybe_abort(context)
        return pb.DetokenizeResponse(text="".join(chr(token_id) for token_id in request.token_ids))

    async def model_info(self, request: pb.GetModelInfoRequest, context: Any) -> pb.GetModelInfoResponse:
        await self._maybe_abort(context)
        return MODEL_INFO

    async def health(self, request: bytes, context: Any) -> bytes:
        return b"\x08\x01"  # HealthCheckResponse(status=SERVING)

    async def _maybe_abort(self, context: Any) -> None:
        if self.unary_abort is not None:
            await context.abort(*self.unary_abort)


def _serialize(message: Any) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


def _handlers(fake: FakeInference) -> tuple[grpc.GenericRpcHandler, ...]:
    unary = grpc.unary_unary_rpc_method_handler
    methods = {
        "Generate": grpc.unary_stream_rpc_method_handler(fake.generate, pb.GenerateRequest.FromString, _serialize),
        "Tokenize": unary(fake.tokenize, pb.TokenizeRequest.FromString, _serialize),
        "Detokenize": unary(fake.detokenize, pb.DetokenizeRequest.FromString, _serialize),
        "GetModelInfo": unary(fake.model_info, pb.GetModelInfoRequest.FromString, _serialize),
    }
    return (
        grpc.method_handlers_generic_handler("pdserve.v1.Inference", methods),
        grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": unary(fake.health)}),
    )


@contextmanager
def running(fake: FakeInference) -> Iterator[FakeInference]:
    """Serve it on a free port of this machine until the block is left."""
    started: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(_handlers(fake))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stop = asyncio.Event()
        started.set_result((port, asyncio.get_running_loop(), stop))
        await stop.wait()
        await server.stop(None)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="fake-inference")
    thread.start()
    port, loop, stop = started.result(timeout=10)
    fake.endpoint = f"127.0.0.1:{port}"
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=10)
        assert not thread.is_alive()
