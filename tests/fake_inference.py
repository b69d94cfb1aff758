"""A scriptable Inference server in a thread of its own, for tests of what talks to the router.

`Generate` answers with whatever the script yields: messages, raw bytes, or an abort. Everything it saw is kept. Scripts
are coroutines on a loop of their own, and the server is the thread-based one: grpc.aio serves only the loop under
test. Knows nothing of the real router beyond the messages.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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


def finished(num_tokens: int, reason: Any = pb.FINISH_REASON_LENGTH, request_id: str = "r") -> pb.GenerateResponse:
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


class Aborted(Exception):
    """A script's wish to end with a status other than OK."""

    def __init__(self, code: grpc.StatusCode, message: str, trailing: tuple[tuple[str, Any], ...]) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.trailing = trailing


class ScriptContext:
    """What a script may ask of its call."""

    async def abort(self, code: grpc.StatusCode, message: str = "", trailing: tuple[tuple[str, Any], ...] = ()) -> None:
        raise Aborted(code, message, trailing)


class FakeInference:
    """State that tests read. `cancelled` is set when a script was still running as its client went away."""

    def __init__(self) -> None:
        self.script: Script = count_up
        self.requests: list[pb.GenerateRequest] = []
        self.deadlines_s: list[float | None] = []
        self.cancelled = threading.Event()
        self.num_running = 0
        self.max_running = 0
        self.unary_abort: tuple[grpc.StatusCode, str] | None = None
        self.endpoint = ""
        self.loop = asyncio.new_event_loop()

    def generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse | bytes]:
        """Hand over what the script yields, from its loop to this thread of the server."""
        self.deadlines_s.append(context.time_remaining())
        events: queue.Queue[pb.GenerateResponse | bytes | BaseException | None] = queue.Queue()
        running_script = asyncio.run_coroutine_threadsafe(self._run_script(request, events), self.loop)
        running_script.add_done_callback(lambda _: events.put(None))
        if not context.add_callback(running_script.cancel):
            running_script.cancel()  # the client has already gone
        while (event := events.get()) is not None:
            if isinstance(event, Aborted):
                context.set_trailing_metadata(event.trailing)
                context.abort(event.code, event.message)
            if isinstance(event, BaseException):
                raise event
            yield event

    async def _run_script(self, request: pb.GenerateRequest, events: queue.Queue[Any]) -> None:
        self.requests.append(request)
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            async for response in self.script(request, ScriptContext()):
                events.put(response)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        except Exception as error:
            events.put(error)
        finally:
            self.num_running -= 1

    def tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        self._maybe_abort(context)
        text = request.prompt or "".join(f"<{m.role}>{m.content}" for m in request.chat.messages)
        return pb.TokenizeResponse(token_ids=[ord(character) for character in text])

    def detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        self._maybe_abort(context)
        return pb.DetokenizeResponse(text="".join(chr(token_id) for token_id in request.token_ids))

    def model_info(self, request: pb.GetModelInfoRequest, context: Any) -> pb.GetModelInfoResponse:
        self._maybe_abort(context)
        return MODEL_INFO

    def health(self, request: bytes, context: Any) -> bytes:
        return b"\x08\x01"  # HealthCheckResponse(status=SERVING)

    def _maybe_abort(self, context: Any) -> None:
        if self.unary_abort is not None:
            context.abort(*self.unary_abort)


def _serialize(message: Any) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


def _handlers(fake: FakeInference) -> list[grpc.GenericRpcHandler]:
    unary = grpc.unary_unary_rpc_method_handler
    methods: dict[str, Any] = {
        "Generate": grpc.unary_stream_rpc_method_handler(fake.generate, pb.GenerateRequest.FromString, _serialize),
        "Tokenize": unary(fake.tokenize, pb.TokenizeRequest.FromString, _serialize),
        "Detokenize": unary(fake.detokenize, pb.DetokenizeRequest.FromString, _serialize),
        "GetModelInfo": unary(fake.model_info, pb.GetModelInfoRequest.FromString, _serialize),
    }
    return [
        grpc.method_handlers_generic_handler("pdserve.v1.Inference", methods),
        grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": unary(fake.health)}),
    ]


@contextmanager
def running(fake: FakeInference) -> Iterator[FakeInference]:
    """Serve it on a free port of this machine until the block is left."""
    scripts = threading.Thread(target=fake.loop.run_forever, name="fake-inference")
    scripts.start()
    with ThreadPoolExecutor(64, thread_name_prefix="fake-inference") as pool:
        server = grpc.server(pool, handlers=_handlers(fake))
        fake.endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield fake
        finally:
            server.stop(None).wait(timeout=10)
    fake.loop.call_soon_threadsafe(fake.loop.stop)
    scripts.join(timeout=10)
    assert not scripts.is_alive()
    fake.loop.close()
