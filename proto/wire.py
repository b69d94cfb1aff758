"""Frozen types to and from protobuf messages, in one place.

Knows both vocabularies and nothing else: no sockets, no validation of client input (the router does that).
Each pair is `x_to_wire` / `x_from_wire` and loses nothing.
"""

from __future__ import annotations

import math

from pdserve.proto import worker_pb2 as pb
from pdserve.proto.types import (
    EventError,
    FinishReason,
    HandoffId,
    KVLayout,
    KVPart,
    KVTicket,
    Phases,
    Role,
    SamplingParams,
    SequenceEvent,
    StepOutput,
    TokenInfo,
    WorkerInfo,
    WorkerLoad,
    WorkerRef,
    WorkerRequest,
)


def handoff_to_wire(value: HandoffId) -> pb.HandoffId:
    return pb.HandoffId(request_id=value.request_id, attempt=value.attempt, epoch=value.epoch)


def handoff_from_wire(message: pb.HandoffId) -> HandoffId:
    return HandoffId(message.request_id, message.attempt, message.epoch)


def ref_to_wire(value: WorkerRef) -> pb.WorkerRef:
    return pb.WorkerRef(worker_id=value.worker_id, generation=value.generation, address=value.address)


def ref_from_wire(message: pb.WorkerRef) -> WorkerRef:
    return WorkerRef(message.worker_id, message.generation, message.address)


def sampling_to_wire(value: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        temperature=value.temperature,
        top_k=value.top_k,
        top_p=value.top_p,
        min_p=value.min_p,
        repetition_penalty=value.repetition_penalty,
        presence_penalty=value.presence_penalty,
        frequency_penalty=value.frequency_penalty,
        seed=value.seed,
        logit_bias=dict(value.logit_bias),
        max_tokens=value.max_tokens,
        min_tokens=value.min_tokens,
        stop_token_ids=value.stop_token_ids,
        logprobs=value.logprobs,
    )


def sampling_from_wire(message: pb.SamplingParams) -> SamplingParams:
    return SamplingParams(
        max_tokens=message.max_tokens,
        seed=message.seed,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        min_tokens=message.min_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
    )


def request_to_wire(value: WorkerRequest) -> pb.WorkerRequest:
    return pb.WorkerRequest(
        id=handoff_to_wire(value.id),
        prompt_token_ids=value.prompt_token_ids,
        sampling=sampling_to_wire(value.sampling),
        timeout_s=value.timeout_s,
    )


def request_from_wire(message: pb.WorkerRequest) -> WorkerRequest:
    return WorkerRequest(
        id=handoff_from_wire(message.id),
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=sampling_from_wire(message.sampling),
        timeout_s=message.timeout_s,
    )


def layout_to_wire(value: KVLayout) -> pb.KVLayout:
    return pb.KVLayout(
        model_hash=value.model_hash,
        dtype=value.dtype,
        num_layers=value.num_layers,
        num_kv_heads=value.num_kv_heads,
        head_dim=value.head_dim,
        block_size=value.block_size,
    )


def layout_from_wire(message: pb.KVLayout) -> KVLayout:
    """Raises ValueError for one that no memory can have."""
    if not all((message.num_layers, message.num_kv_heads, message.head_dim, message.block_size)):
        raise ValueError("a KV layout with a size of 0")
    return KVLayout(
        message.model_hash,
        message.dtype,
        message.num_layers,
        message.num_kv_heads,
        message.head_dim,
        message.block_size,
    )


def info_to_wire(value: WorkerInfo) -> pb.WorkerInfo:
    return pb.WorkerInfo(
        worker=ref_to_wire(value.worker),
        role=value.role,
        layout=layout_to_wire(value.layout),
        num_blocks=value.num_blocks,
        max_model_len=value.max_model_len,
        vocab_size=value.vocab_size,
        host_id=value.host_id,
        link_address=dict(value.link_address),
        metrics_address=value.metrics_address,
        cores=value.cores,
        pid=value.pid,
    )


def info_from_wire(message: pb.WorkerInfo) -> WorkerInfo:
    return WorkerInfo(
        worker=ref_from_wire(message.worker),
        role=Role(message.role),
        layout=layout_from_wire(message.layout),
        num_blocks=message.num_blocks,
        max_model_len=message.max_model_len,
        vocab_size=message.vocab_size,
        host_id=message.host_id,
        link_address=dict(message.link_address),
        metrics_address=message.metrics_address,
        cores=tuple(message.cores),
        pid=message.pid,
    )


def load_to_wire(value: WorkerLoad) -> pb.WorkerLoad:
    return pb.WorkerLoad(
        worker_id=value.worker_id,
        generation=value.generation,
        role=value.role,
        num_waiting=value.num_waiting,
        num_running=value.num_running,
        queued_tokens=value.queued_tokens,
        total_blocks=value.total_blocks,
        free_blocks=value.free_blocks,
        running_blocks=value.running_blocks,
        leased_blocks=value.leased_blocks,
        receiving_blocks=value.receiving_blocks,
        quarantined_blocks=value.quarantined_blocks,
        reserved_blocks=value.reserved_blocks,
        step_s=value.step_s,
        draining=value.draining,
        num_steps=value.num_steps,
        num_preemptions=value.num_preemptions,
    )


def load_from_wire(message: pb.WorkerLoad) -> WorkerLoad:
    return WorkerLoad(
        worker_id=message.worker_id,
        generation=message.generation,
        role=Role(message.role),
        num_waiting=message.num_waiting,
        num_running=message.num_running,
        queued_tokens=message.queued_tokens,
        total_blocks=message.total_blocks,
        free_blocks=message.free_blocks,
        running_blocks=message.running_blocks,
        leased_blocks=message.leased_blocks,
        receiving_blocks=message.receiving_blocks,
        quarantined_blocks=message.quarantined_blocks,
        reserved_blocks=message.reserved_blocks,
        step_s=message.step_s,
        draining=message.draining,
        num_steps=message.num_steps,
        num_preemptions=message.num_preemptions,
    )


def ticket_to_wire(value: KVTicket) -> pb.KVTicket:
    return pb.KVTicket(
        id=handoff_to_wire(value.id),
        source=ref_to_wire(value.source),
        num_tokens=value.num_tokens,
        layout=layout_to_wire(value.layout),
        digest=value.digest,
        lease_s=value.lease_s,
        host_id=value.host_id,
        link_address=dict(value.link_address),
    )


def ticket_from_wire(message: pb.KVTicket) -> KVTicket:
    """Raises ValueError for one that nobody can redeem."""
    if not message.num_tokens or not 0.0 < message.lease_s < math.inf:
        raise ValueError("a ticket for nothing, or without time")
    return KVTicket(
        id=handoff_from_wire(message.id),
        source=ref_from_wire(message.source),
        num_tokens=message.num_tokens,
        layout=layout_from_wire(message.layout),
        digest=message.digest,
        lease_s=message.lease_s,
        host_id=message.host_id,
        link_address=dict(message.link_address),
    )


def part_to_wire(value: KVPart) -> pb.KVPart:
    return pb.KVPart(
        index=value.index,
        first_block=value.first_block,
        block_ids=value.block_ids,
        block_digests=value.block_digests,
        first_token=value.first_token,
    )


def part_from_wire(message: pb.KVPart) -> KVPart:
    return KVPart(
        index=message.index,
        first_block=message.first_block,
        block_ids=tuple(message.block_ids),
        block_digests=tuple(message.block_digests),
        first_token=message.first_token if message.HasField("first_token") else None,
    )


def token_to_wire(value: TokenInfo) -> pb.TokenInfo:
    top = [pb.TopLogprob(token_id=token, logprob=logprob) for token, logprob in value.top]
    return pb.TokenInfo(token_id=value.token_id, logprob=value.logprob, top=top)


def token_from_wire(message: pb.TokenInfo) -> TokenInfo:
    logprob = message.logprob if message.HasField("logprob") else None
    return TokenInfo(message.token_id, logprob, tuple((entry.token_id, entry.logprob) for entry in message.top))


def phases_to_wire(value: Phases) -> pb.Phases:
    return pb.Phases(
        prefill_queue_s=value.prefill_queue_s,
        prefill_s=value.prefill_s,
        transfer_wait_s=value.transfer_wait_s,
        transfer_s=value.transfer_s,
        decode_queue_s=value.decode_queue_s,
        decode_s=value.decode_s,
        recomputed_tokens=value.recomputed_tokens,
        transferred_tokens=value.transferred_tokens,
    )


def phases_from_wire(message: pb.Phases) -> Phases:
    return Phases(
        message.prefill_queue_s,
        message.prefill_s,
        message.transfer_wait_s,
        message.transfer_s,
        message.decode_queue_s,
        message.decode_s,
        message.recomputed_tokens,
        message.transferred_tokens,
    )


def event_to_wire(value: SequenceEvent) -> pb.SequenceEvent:
    error = value.error
    return pb.SequenceEvent(
        id=handoff_to_wire(value.id),
        index=value.index,
        tokens=[token_to_wire(token) for token in value.tokens],
        finish_reason=value.finish_reason or "",
        stop_token_id=value.stop_token_id,
        phases=None if value.phases is None else phases_to_wire(value.phases),
        error=None if error is None else pb.WireError(kind=error.kind, message=error.message),
    )


def event_from_wire(message: pb.SequenceEvent) -> SequenceEvent:
    return SequenceEvent(
        id=handoff_from_wire(message.id),
        index=message.index,
        tokens=tuple(token_from_wire(token) for token in message.tokens),
        finish_reason=FinishReason(message.finish_reason) if message.finish_reason else None,
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        phases=phases_from_wire(message.phases) if message.HasField("phases") else None,
        error=EventError(message.error.kind, message.error.message) if message.HasField("error") else None,
    )


def output_to_wire(value: StepOutput) -> pb.StepOutput:
    return pb.StepOutput(events=[event_to_wire(event) for event in value.events], load=load_to_wire(value.load))


def output_from_wire(message: pb.StepOutput) -> StepOutput:
    return StepOutput(tuple(event_from_wire(event) for event in message.events), load_from_wire(message.load))
