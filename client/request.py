"""Python arguments to request messages. Pure: no channel, no clock.

Refuses only what cannot be written into the message (wrong types, numbers that do not fit); ranges are the
router's to judge, so that there is one judge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypedDict

from pdserve.proto import inference_pb2 as pb
from pdserve.proto.errors import InvalidRequest

Chat: TypeAlias = Sequence[Mapping[str, str]]
"""Messages as `{"role": ..., "content": ...}`."""

Prompt: TypeAlias = str | Sequence[int] | Chat
"""Text, token ids, or a conversation."""

MAX_TIMEOUT_S = 30 * 86400.0


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`. Absent or `None` means the server's default.

    `logprobs` is the number of top log-probabilities per token, 0 for the chosen token's only. `timeout_s` is
    the deadline of this call, from now, in place of the client's.
    """

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    min_tokens: int | None
    logprobs: int | None
    include_stop_str_in_output: bool | None
    request_id: str | None
    model: str | None
    timeout_s: float | None


SAMPLING_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logit_bias",
)
STOPPING_FIELDS = ("max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output")


def generate_request(prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    """The message that asks for one completion.

    Raises:
        InvalidRequest: a value has the wrong type or does not fit its field.
        TypeError: an option that does not exist, as for any keyword argument.
    """
    values: Mapping[str, object] = options
    unknown = sorted(values.keys() - GenerateOptions.__annotations__.keys())
    if unknown:
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}")
    message = pb.GenerateRequest()
    _set_prompt(message, prompt)
    for names, part in (
        (("request_id", "model"), message),
        (SAMPLING_FIELDS, message.sampling),
        (STOPPING_FIELDS, message.stopping),
        (("logprobs",), message.response),
    ):
        for name in names:
            if values.get(name) is not None:
                _assign(part, name, values[name])
    return message


def tokenize_request(prompt: str | Chat) -> pb.TokenizeRequest:
    message = pb.TokenizeRequest()
    if isinstance(prompt, str):
        _assign(message, "prompt", prompt)
    else:
        _set_chat(message.chat, prompt)
    return message


def detokenize_request(token_ids: Sequence[int]) -> pb.DetokenizeRequest:
    message = pb.DetokenizeRequest()
    _assign(message, "token_ids", token_ids)
    return message


def checked_timeout(timeout_s: float | None, default_s: float) -> float:
    """The deadline of a call: there always is one."""
    chosen = default_s if timeout_s is None else timeout_s
    if not isinstance(chosen, int | float) or not math.isfinite(chosen) or not 0 < chosen <= MAX_TIMEOUT_S:
        raise InvalidRequest("timeout_s", f"{chosen!r} is not a number of seconds in (0, {MAX_TIMEOUT_S:.0f}]")
    return float(chosen)


def _set_prompt(message: pb.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        _assign(message, "prompt", prompt)
    elif isinstance(prompt, bytes | bytearray | Mapping) or not isinstance(prompt, Sequence):
        raise InvalidRequest("prompt", f"must be text, token ids or chat messages, not {type(prompt).__name__}")
    elif len(prompt) == 0:
        raise InvalidRequest("prompt", "is empty")
    elif isinstance(prompt[0], Mapping):
        _set_chat(message.chat, prompt)
    else:
        _assign(message.token_ids, "ids", prompt, shown_as="prompt")


def _set_chat(chat: pb.ChatMessages, messages: object) -> None:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequest("prompt", "chat must be a list of messages")
    for position, entry in enumerate(messages):
        where = f"prompt[{position}]"
        if not isinstance(entry, Mapping) or set(entry) != {"role", "content"}:
            raise InvalidRequest(where, 'a chat message is {"role": ..., "content": ...}')
        added = chat.messages.add()
        for key in ("role", "content"):
            _assign(added, key, entry[key], shown_as=f"{where}.{key}")
    chat.SetInParent()


def _assign(message: object, name: str, value: object, shown_as: str | None = None) -> None:
    """Set one field of a protobuf message, scalar, repeated or map, or say which one would not take its value."""
    try:
        field = getattr(message, name)
        if isinstance(value, str) and hasattr(field, "extend"):
            if name != "stop":
                raise TypeError(f"expected a list, not {value!r}")
            field.append(value)
        elif hasattr(field, "extend"):
            field.extend(value)
        elif hasattr(field, "MergeFrom"):
            for key, entry in dict(value).items():  # type: ignore[call-overload]
                field[key] = entry
        else:
            setattr(message, name, value)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise InvalidRequest(shown_as or name, str(error)) from error
