"""A client's request against the model's limits: pure, every field.

Raises InvalidRequest that names the field and never repeats what the client sent. Knows nothing of text
beyond its size, of workers or of gRPC. Workers trust the ranges checked here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from pdserve.proto import inference_pb2 as pb
from pdserve.proto.errors import InvalidRequest, NotFound
from pdserve.proto.types import SamplingParams
from pdserve.router.config import RouterConfig

MAX_REQUEST_ID_CHARS = 128
MAX_TEMPERATURE = 1e31
MAX_PENALTY = 2.0
MIN_REPETITION_PENALTY = 0.01  # below, scores overflow
MAX_REPETITION_PENALTY = 100.0
MAX_LOGIT_BIAS = 100.0
MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the served model can take. `max_model_len` already respects the smallest worker's pool."""

    name: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    has_tokenizer: bool


@dataclass(frozen=True, slots=True)
class StopOptions:
    """The stopping rules that need text, and so stay in the router."""

    strings: tuple[str, ...] = ()
    include_in_output: bool = False


def check_request(request: pb.GenerateRequest, limits: ModelLimits, config: RouterConfig) -> None:
    """Everything that can be said before the prompt is tokenised."""
    check_request_id(request.request_id)
    if request.model and request.model != limits.name:
        raise NotFound("model: not served here")
    _check_input(request, limits, config)
    if request.stopping.stop and not limits.has_tokenizer:
        raise InvalidRequest("stopping.stop", "this model has no tokenizer; use stop_token_ids")


def check_request_id(request_id: str) -> None:
    if len(request_id) > MAX_REQUEST_ID_CHARS:
        raise InvalidRequest("request_id", f"longer than {MAX_REQUEST_ID_CHARS} characters")
    if not request_id.isprintable():
        raise InvalidRequest("request_id", "contains characters that cannot be printed")


def check_text(field: str, text: str, max_bytes: int) -> None:
    """Size only; an empty prompt is a matter of tokens."""
    # A character takes up to 4 bytes: the exact count is only needed near the limit.
    if len(text) * 4 > max_bytes and len(text.encode()) > max_bytes:
        raise InvalidRequest(field, f"longer than {max_bytes} bytes")


def check_chat(chat: pb.ChatMessages, config: RouterConfig) -> None:
    if not chat.messages:
        raise InvalidRequest("chat.messages", "empty")
    if len(chat.messages) > config.max_chat_messages:
        raise InvalidRequest("chat.messages", f"more than {config.max_chat_messages}")
    for position, message in enumerate(chat.messages):
        if not message.role or len(message.role) > 64 or not message.role.isprintable():
            raise InvalidRequest(f"chat.messages[{position}].role", "must be 1 to 64 printable characters")
    total_chars = sum(len(message.content) for message in chat.messages)
    if total_chars > config.max_prompt_bytes:
        raise InvalidRequest("chat.messages", f"longer than {config.max_prompt_bytes} bytes")


def _check_input(request: pb.GenerateRequest, limits: ModelLimits, config: RouterConfig) -> None:
    match request.WhichOneof("input"):
        case "token_ids":
            check_token_ids("token_ids", request.token_ids.ids, limits.vocab_size)
            check_prompt_length("token_ids", len(request.token_ids.ids), limits.max_model_len)
        case "prompt":
            if not limits.has_tokenizer:
                raise InvalidRequest("prompt", "this model has no tokenizer; send token_ids")
            check_text("prompt", request.prompt, config.max_prompt_bytes)
        case "chat":
            if not limits.has_tokenizer:
                raise InvalidRequest("chat", "this model has no tokenizer; send token_ids")
            check_chat(request.chat, config)
        case _:
            raise InvalidRequest("input", "one of prompt, token_ids and chat is required")


def check_token_ids(field: str, ids: Iterable[int], vocab_size: int) -> None:
    """Every id is in `[0, vocab_size)`."""
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"{field}[{position}]", "not in the vocabulary")


def check_prompt_length(field: str, num_tokens: int, max_model_len: int) -> None:
    """At least one token, and room for at least one more."""
    if num_tokens == 0:
        raise InvalidRequest(field, "empty")
    if num_tokens >= max_model_len:
        raise InvalidRequest(field, f"{num_tokens} tokens do not fit the context of {max_model_len}")


def sampling_params(
    request: pb.GenerateRequest,
    num_prompt_tokens: int,
    limits: ModelLimits,
    config: RouterConfig,
    draw_seed: Callable[[], int],
) -> SamplingParams:
    """The checked parameters. `draw_seed` is asked only when the client gave none; ranges in the constants above."""
    options, stopping = request.sampling, request.stopping
    room = limits.max_model_len - num_prompt_tokens
    max_tokens = _integer(stopping, "stopping", "max_tokens", room, 1, (1 << 31) - 1)
    if max_tokens > room:
        raise InvalidRequest(
            "stopping.max_tokens", f"prompt and max_tokens exceed the context of {limits.max_model_len} tokens"
        )
    min_tokens = _integer(stopping, "stopping", "min_tokens", 0, 0, (1 << 31) - 1)
    if min_tokens > max_tokens:
        raise InvalidRequest("stopping.min_tokens", "above max_tokens")
    seed = _integer(options, "sampling", "seed", -1, 0, MAX_SEED) if options.HasField("seed") else draw_seed()
    return SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        temperature=_number(options, "temperature", 1.0, 0.0, MAX_TEMPERATURE),
        top_k=min(_integer(options, "sampling", "top_k", 0, 0, (1 << 31) - 1), limits.vocab_size),
        top_p=_positive(options, "top_p", 1.0, 1.0),
        min_p=_number(options, "min_p", 0.0, 0.0, 1.0),
        repetition_penalty=_number(options, "repetition_penalty", 1.0, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
        presence_penalty=_number(options, "presence_penalty", 0.0, -MAX_PENALTY, MAX_PENALTY),
        frequency_penalty=_number(options, "frequency_penalty", 0.0, -MAX_PENALTY, MAX_PENALTY),
        logit_bias=_logit_bias(options.logit_bias, limits.vocab_size, config.max_logit_bias),
        min_tokens=min_tokens,
        stop_token_ids=_stop_token_ids(stopping, limits, config),
        logprobs=_logprobs(request.response, limits, config),
    )


def stop_options(stopping: pb.StoppingOptions, config: RouterConfig) -> StopOptions:
    """The checked stop strings, without repetitions."""
    if len(stopping.stop) > config.max_stop_strings:
        raise InvalidRequest("stopping.stop", f"more than {config.max_stop_strings} strings")
    for position, text in enumerate(stopping.stop):
        if not text:
            raise InvalidRequest(f"stopping.stop[{position}]", "empty")
        if len(text) > config.max_stop_chars:
            raise InvalidRequest(f"stopping.stop[{position}]", f"longer than {config.max_stop_chars} characters")
    return StopOptions(tuple(dict.fromkeys(stopping.stop)), stopping.include_stop_str_in_output)


def _number(options: pb.SamplingOptions, name: str, default: float, low: float, high: float) -> float:
    if not options.HasField(name):
        return default
    value = float(getattr(options, name))
    if not math.isfinite(value) or not low <= value <= high:
        raise InvalidRequest(f"sampling.{name}", f"must be from {low:g} to {high:g}")
    return value


def _positive(options: pb.SamplingOptions, name: str, default: float, high: float) -> float:
    value = _number(options, name, default, 0.0, high)
    if value <= 0.0:
        raise InvalidRequest(f"sampling.{name}", f"must be above 0, up to {high:g}")
    return value


def _integer(
    group: pb.SamplingOptions | pb.StoppingOptions | pb.ResponseOptions,
    prefix: str,
    name: str,
    default: int,
    low: int,
    high: int,
) -> int:
    if not group.HasField(name):
        return default
    value = int(getattr(group, name))
    if not low <= value <= high:
        raise InvalidRequest(f"{prefix}.{name}", f"must be from {low} to {high}")
    return value


def _logit_bias(biases: Mapping[int, float], vocab_size: int, max_entries: int) -> tuple[tuple[int, float], ...]:
    if len(biases) > max_entries:
        raise InvalidRequest("sampling.logit_bias", f"more than {max_entries} entries")
    for token_id, bias in biases.items():
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest("sampling.logit_bias", "a token id is not in the vocabulary")
        if not math.isfinite(bias) or abs(bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest("sampling.logit_bias", f"a bias is not from {-MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}")
    return tuple(sorted(biases.items()))


def _stop_token_ids(stopping: pb.StoppingOptions, limits: ModelLimits, config: RouterConfig) -> tuple[int, ...]:
    """The client's ids and, unless they are to be ignored, the model's end-of-sequence ids."""
    if len(stopping.stop_token_ids) > config.max_stop_token_ids:
        raise InvalidRequest("stopping.stop_token_ids", f"more than {config.max_stop_token_ids} ids")
    check_token_ids("stopping.stop_token_ids", stopping.stop_token_ids, limits.vocab_size)
    eos = () if stopping.ignore_eos else limits.eos_token_ids
    return tuple(sorted({*stopping.stop_token_ids, *eos}))


def _logprobs(response: pb.ResponseOptions, limits: ModelLimits, config: RouterConfig) -> int | None:
    if not response.HasField("logprobs"):
        return None
    return _integer(response, "response", "logprobs", 0, 0, min(config.max_logprobs, limits.vocab_size))
