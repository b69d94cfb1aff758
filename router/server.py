"""The four methods of `pdserve.v1.Inference`: checked input in, `Pipeline` jobs out.

Raises the error tree only; `status` turns it into gRPC statuses. Knows nothing of workers beyond what the fleet
says about their limits.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc
import grpc.aio

from pdserve.proto import inference_pb2 as pb
from pdserve.proto import inference_pb2_grpc as rpc
from pdserve.proto.clock import now
from pdserve.proto.errors import DeadlineExceeded, InvalidRequest, Overloaded, RequestCancelled
from pdserve.proto.types import Role
from pdserve.router.config import RouterConfig
from pdserve.router.fleet import Fleet
from pdserve.router.model import Model
from pdserve.router.pipeline import Pipeline
from pdserve.router.tokenizer import ModelTokenizer
from pdserve.router.validation import (
    MAX_SEED,
    ModelLimits,
    check_chat,
    check_prompt_length,
    check_request,
    check_text,
    check_token_ids,
    sampling_params,
    stop_options,
)
from pdserve.router.writer import Emit, Job

# Below this, encoding costs less than handing it to a thread.
INLINE_CHARS = 2048
NUM_TOKENIZER_THREADS = 2

Context = grpc.aio.ServicerContext[Any, Any]
Result = TypeVar("Result")


class InferenceServicer(rpc.InferenceServicer):
    """Stateless but for the threads that tokenise long inputs; `close` ends them."""

    def __init__(self, model: Model, config: RouterConfig, fleet: Fleet, pipeline: Pipeline) -> None:
        self._model = model
        self._config = config
        self._fleet = fleet
        self._pipeline = pipeline
        self._threads = ThreadPoolExecutor(NUM_TOKENIZER_THREADS, thread_name_prefix="tokenizer")

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        arrival_s = now()
        deadline_s = self._deadline_s(arrival_s, context)
        limits = self._limits()
        check_request(request, limits, self._config)
        stop = stop_options(request.stopping, self._config)
        field = str(request.WhichOneof("input"))
        try:
            async with asyncio.timeout(deadline_s - now()):
                prompt_token_ids = await self._prompt(request)
        except TimeoutError as error:
            raise DeadlineExceeded("the deadline passed") from error
        check_prompt_length(field, len(prompt_token_ids), limits.max_model_len)
        sampling = sampling_params(request, len(prompt_token_ids), limits, self._config, _draw_seed)
        request_id = request.request_id or secrets.token_hex(12)
        job = Job(request_id, tuple(prompt_token_ids), sampling, stop, arrival_s, deadline_s)
        await self._pipeline.generate(job, self._emitter(context))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        tokenizer = self._tokenizer("input")
        match request.WhichOneof("input"):
            case "prompt":
                return pb.TokenizeResponse(token_ids=await self._encode(tokenizer, request.prompt))
            case "chat":
                return pb.TokenizeResponse(token_ids=await self._encode_chat(tokenizer, request.chat))
            case _:
                raise InvalidRequest("input", "one of prompt and chat is required")

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        tokenizer = self._tokenizer("token_ids")
        check_token_ids("token_ids", request.token_ids, self._model.vocab_size)
        ids = list(request.token_ids)
        return pb.DetokenizeResponse(text=await self._off_loop(len(ids), lambda: tokenizer.decode(ids)))

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        limits, tokenizer = self._limits(), self._model.tokenizer
        roles = [view.load.role for view in self._fleet.views()]
        return pb.GetModelInfoResponse(
            model=limits.name,
            architecture=self._model.architecture,
            vocab_size=limits.vocab_size,
            max_model_len=limits.max_model_len,
            has_tokenizer=tokenizer is not None,
            has_chat_template=tokenizer is not None and tokenizer.has_chat_template,
            eos_token_ids=limits.eos_token_ids,
            num_prefill_workers=roles.count(Role.PREFILL),
            num_decode_workers=roles.count(Role.DECODE),
            num_mixed_workers=roles.count(Role.MIXED),
        )

    def _limits(self) -> ModelLimits:
        """A request must fit every worker: it is not known yet where it will run."""
        infos = self._fleet.infos()
        lengths = [min(info.max_model_len, info.num_blocks * info.layout.block_size) for info in infos]
        return ModelLimits(
            name=self._model.name,
            vocab_size=min([self._model.vocab_size, *(info.vocab_size for info in infos)]),
            max_model_len=min([self._model.max_model_len, *lengths]),
            eos_token_ids=self._model.eos_token_ids,
            has_tokenizer=self._model.tokenizer is not None,
        )

    def _deadline_s(self, arrival_s: float, context: Context) -> float:
        remaining_s = context.time_remaining()
        if remaining_s is None:
            return arrival_s + self._config.default_timeout_s
        if remaining_s <= 0:
            raise DeadlineExceeded("the deadline passed")
        return arrival_s + min(remaining_s, self._config.max_timeout_s)

    def _tokenizer(self, field: str) -> ModelTokenizer:
        if self._model.tokenizer is None:
            raise InvalidRequest(field, "this model has no tokenizer; send token_ids")
        return self._model.tokenizer

    async def _prompt(self, request: pb.GenerateRequest) -> Sequence[int]:
        match request.WhichOneof("input"):
            case "prompt":
                return await self._encode(self._tokenizer("prompt"), request.prompt)
            case "chat":
                return await self._encode_chat(self._tokenizer("chat"), request.chat)
            case _:
                return request.token_ids.ids

    async def _encode(self, tokenizer: ModelTokenizer, text: str) -> list[int]:
        check_text("prompt", text, self._config.max_prompt_bytes)
        return await self._off_loop(len(text), lambda: tokenizer.encode(text))

    async def _encode_chat(self, tokenizer: ModelTokenizer, chat: pb.ChatMessages) -> list[int]:
        check_chat(chat, self._config)
        messages = [(message.role, message.content) for message in chat.messages]
        num_chars = sum(len(content) for _, content in messages)
        return await self._off_loop(num_chars, lambda: tokenizer.encode_chat(messages))

    async def _off_loop(self, size: int, work: Callable[[], Result]) -> Result:
        if size <= INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _emitter(self, context: Context) -> Emit:
        """Writes to one client; gives up on one that does not read."""
        stall_timeout_s = self._config.stall_timeout_s

        has_begun = False

        async def emit(response: pb.GenerateResponse) -> None:
            nonlocal has_begun
            try:
                async with asyncio.timeout(stall_timeout_s):
                    if not has_begun:
                        # Apart from the first message: grpc notes that they were sent when that is through, and after
                        # one that never is the call could not be ended, as it would send them again.
                        await context.send_initial_metadata(())
                        has_begun = True
                    await context.write(response)
            except TimeoutError as error:
                raise Overloaded("the client reads too slowly") from error
            except grpc.aio.UsageError as error:
                raise RequestCancelled("the client went away") from error

        return emit


def _draw_seed() -> int:
    return secrets.randbelow(MAX_SEED)
