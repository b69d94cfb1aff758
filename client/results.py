"""What a caller gets back: frozen values, free of protobuf and gRPC.

Knows nothing of how they are received or put together (that is `folding`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pdserve.proto.types import FinishReason, TokenInfo


class Health(StrEnum):
    """The standard gRPC health states."""

    UNKNOWN = "unknown"
    SERVING = "serving"
    NOT_SERVING = "not_serving"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. `transferred_tokens` had their KV shipped; `recomputed_tokens` were computed twice."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    transferred_tokens: int = 0
    recomputed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one request went, as the cluster measured it. Phases do not overlap."""

    prefill_queue_ms: float = 0.0
    prefill_ms: float = 0.0
    transfer_wait_ms: float = 0.0
    transfer_ms: float = 0.0
    decode_queue_ms: float = 0.0
    decode_ms: float = 0.0
    ttft_ms: float = 0.0
    e2e_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a completion. `index` is the position of `token_ids[0]`.

    `text` may lag behind the tokens, and a delta may carry text without tokens. `logprobs` has one entry per
    token when they were asked for, else it is `None`.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenInfo, ...] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. `stop_match` is the stop string or the stop token id that ended it, if one did."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_match: str | int | None
    usage: Usage
    timings: Timings
    prefill_worker: str
    decode_worker: str
    logprobs: tuple[TokenInfo, ...] | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The served model and the size of the fleet behind it."""

    model: str
    architecture: str
    vocab_size: int
    max_model_len: int
    has_tokenizer: bool
    has_chat_template: bool
    eos_token_ids: tuple[int, ...]
    num_prefill_workers: int
    num_decode_workers: int
    num_mixed_workers: int
