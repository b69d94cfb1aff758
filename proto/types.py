"""The vocabulary shared by every part: frozen values that travel between processes.

Knows nothing of torch, ray, grpc or asyncio, and nothing of how a value is encoded on the wire
(that is `wire`). Mutable things (sequences, block tables, pools) live with their one owner instead.

Units are in the names: `_s` seconds, `_ms` milliseconds, `_bytes`, `_tokens`, `_blocks`; counts of other
things start with `num_`. Durations are taken from one process's monotonic clock and never compared
across processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple


class Role(StrEnum):
    """What a worker does. `MIXED` mounts both roles over one pool: the colocated baseline."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class FinishReason(StrEnum):
    """Why a completion ended. Errors are never finish reasons."""

    STOP = "stop"
    LENGTH = "length"


class HandoffId(NamedTuple):
    """Identity of one attempt at one request, minted once by the router.

    `epoch` identifies the router's run; everything that carries an older epoch or attempt is stale. A named tuple,
    since it is a key in every table and hashed with every look.
    """

    request_id: str
    attempt: int
    epoch: int

    def __str__(self) -> str:
        return f"{self.request_id}#{self.attempt}@{self.epoch:x}"


class WorkerRef(NamedTuple):
    """A worker process. A restarted worker keeps its id and gets a new generation."""

    worker_id: str
    generation: int
    address: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Validated at the edge; workers trust the ranges.

    `temperature == 0` is greedy. `top_k == 0` keeps all tokens. `stop_token_ids` already includes the model's
    end-of-sequence ids unless the client asked to ignore them. Stop *strings* stay in the router: workers
    have no text. `logprobs` is the number of top log-probabilities wanted, `None` for none at all.
    """

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class WorkerRequest:
    """One attempt as a worker sees it. `timeout_s` is what was left of the deadline when it was sent."""

    id: HandoffId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    timeout_s: float


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of one KV block: `[num_layers, 2, block_size, num_kv_heads, head_dim]` of `dtype`.

    In int8 the scales of its rows (of `head_dim` elements) follow, aligned to their size. `num_kv_heads` counts the
    heads of one rank.
    """

    model_hash: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int

    @property
    def num_rows(self) -> int:
        return self.num_layers * 2 * self.block_size * self.num_kv_heads

    @property
    def element_bytes(self) -> int:
        return self.num_rows * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def scales_at_bytes(self) -> int:
        """Where the scales of an int8 block begin: the elements, filled up to a multiple of a scale's size."""
        return -(-self.element_bytes // SCALE_BYTES) * SCALE_BYTES

    @property
    def block_bytes(self) -> int:
        if self.dtype == "int8":
            return self.scales_at_bytes + self.num_rows * SCALE_BYTES
        return self.element_bytes

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def differences(self, other: KVLayout) -> list[str]:
        """Human-readable `field: ours != theirs` for every field that differs."""
        names = ("model_hash", "dtype", "num_layers", "num_kv_heads", "head_dim", "block_size")
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in names)
        return [f"{name}: {ours} != {theirs}" for name, ours, theirs in pairs if ours != theirs]

    def obstacles(self, other: KVLayout) -> list[str]:
        """The differences that keep two workers from exchanging KV: all but the block size and a quantised dtype."""
        if self is other or self == other:  # asked for every offer, and nearly always so
            return []
        is_quantised = "int8" in (self.dtype, other.dtype) and {self.dtype, other.dtype} <= DTYPE_BYTES.keys()
        bridged = ("block_size:", "dtype:") if is_quantised else ("block_size:",)
        return [difference for difference in self.differences(other) if not difference.startswith(bridged)]

    def hash64(self) -> int:
        """64-bit hash of every field, carried in link headers."""
        return int.from_bytes(hashlib.blake2b(repr(self).encode(), digest_size=8).digest(), "little")


DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker is and how its KV can be reached. `link_address` maps link kind to an address."""

    worker: WorkerRef
    role: Role
    layout: KVLayout
    num_blocks: int
    max_model_len: int
    vocab_size: int
    host_id: str
    link_address: Mapping[str, str] = field(default_factory=dict)
    metrics_address: str = ""
    cores: tuple[int, ...] = ()
    pid: int = 0


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """A snapshot, never a live object. Block counts are by state and sum to `total_blocks`."""

    worker_id: str
    generation: int
    role: Role
    num_waiting: int
    num_running: int
    queued_tokens: int
    total_blocks: int
    free_blocks: int
    running_blocks: int
    leased_blocks: int
    receiving_blocks: int
    quarantined_blocks: int
    reserved_blocks: int
    step_s: float
    draining: bool
    num_steps: int
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class KVTicket:
    """The right to redeem one hand-off's KV, part by part, from the worker that leases it.

    `num_tokens` counts tokens whose KV the hand-off has in all (the prompt). `layout` is that of the bytes on the link.
    `digest` names the algorithm of the parts' digests.
    """

    id: HandoffId
    source: WorkerRef
    num_tokens: int
    layout: KVLayout
    digest: str
    lease_s: float
    host_id: str
    link_address: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class KVPart:
    """A run of a hand-off's blocks, complete at the source: those from position `first_block` on.

    `block_ids` are the source's. `block_digests[i]` is bound to the hand-off and to position `first_block + i`, not to
    `block_ids[i]`: the blocks land under other ids. The last part brings the first generated token.
    """

    index: int
    first_block: int
    block_ids: tuple[int, ...]
    block_digests: tuple[int, ...]
    first_token: int | None = None

    @property
    def is_last(self) -> bool:
        return self.first_token is not None


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One generated token. `logprob` and `top` are present only when the request asked for them."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Phases:
    """Durations owned by one worker for one sequence; the router adds up both workers' shares."""

    prefill_queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_wait_s: float = 0.0
    transfer_s: float = 0.0
    decode_queue_s: float = 0.0
    decode_s: float = 0.0
    recomputed_tokens: int = 0
    transferred_tokens: int = 0

    def __add__(self, other: Phases) -> Phases:
        return Phases(
            self.prefill_queue_s + other.prefill_queue_s,
            self.prefill_s + other.prefill_s,
            self.transfer_wait_s + other.transfer_wait_s,
            self.transfer_s + other.transfer_s,
            self.decode_queue_s + other.decode_queue_s,
            self.decode_s + other.decode_s,
            self.recomputed_tokens + other.recomputed_tokens,
            self.transferred_tokens + other.transferred_tokens,
        )


@dataclass(frozen=True, slots=True)
class EventError:
    """An error that ended a sequence on a worker: class name in the error tree, and a sentence."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class SequenceEvent:
    """What one step did for one sequence. `index` is the completion position of `tokens[0]`.

    `finish_reason` and `error` end the sequence on the sending worker. `phases` rides on the worker's
    first and last event for the sequence.
    """

    id: HandoffId
    index: int
    tokens: tuple[TokenInfo, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    phases: Phases | None = None
    error: EventError | None = None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One message per engine step: what it did for every sequence, and the worker's load after it."""

    events: tuple[SequenceEvent, ...]
    load: WorkerLoad


@dataclass(frozen=True, slots=True)
class SLO:
    """Latency targets of one service class. A request is good only if it meets both."""

    ttft_ms: float
    tpot_ms: float
    percentile: float = 90.0


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """The moments of one request on one clock, in seconds. The same code judges live traffic and benchmarks.

    `scheduled_s` is when an open-loop load meant to send it (equal to `sent_s` for a live request), so that
    a slow sender cannot hide latency. TTFT = first token - scheduled. TPOT = (last - first)/(n - 1).
    """

    scheduled_s: float
    sent_s: float
    first_token_s: float | None = None
    last_token_s: float | None = None
    end_s: float | None = None
    num_output_tokens: int = 0

    def ttft_ms(self) -> float | None:
        return None if self.first_token_s is None else (self.first_token_s - self.scheduled_s) * 1e3

    def tpot_ms(self) -> float | None:
        """Mean time between tokens; `None` for fewer than two tokens."""
        if self.first_token_s is None or self.last_token_s is None or self.num_output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) * 1e3 / (self.num_output_tokens - 1)

    def e2e_ms(self) -> float | None:
        return None if self.end_s is None else (self.end_s - self.scheduled_s) * 1e3

    def meets(self, slo: SLO) -> bool:
        """Both targets met. A request with one token has no TPOT and is judged by its TTFT alone."""
        ttft_ms, tpot_ms = self.ttft_ms(), self.tpot_ms()
        return ttft_ms is not None and ttft_ms <= slo.ttft_ms and (tpot_ms is None or tpot_ms <= slo.tpot_ms)
