"""The life of a request, over real sockets against workers that do what the test says."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import grpc
import pytest
from router_fakes import (
    DECODE_PHASES,
    PREFILL_PHASES,
    FakeWorker,
    Scene,
    ask,
    cancel,
    collect,
    error_of,
    failure,
    scene_of,
    serve_automatically,
    split_pair,
    started,
    tokens,
    until,
)

from pdserve.proto import inference_pb2 as pb
from pdserve.proto.errors import CorruptKV, InvalidRequest, Overloaded, PdserveError, StaleReference, TransferFailed
from pdserve.proto.types import FinishReason, Role, SequenceEvent, TokenInfo


@pytest.fixture
async def scene(bare_model_dir: Path) -> AsyncIterator[Scene]:
    async with scene_of(bare_model_dir, split_pair()) as scene:
        yield scene


async def test_tokens_of_both_workers_arrive_once_each_and_in_order(scene: Scene) -> None:
    serve_automatically(scene.workers, lambda request: range(10, 30))
    reply = await collect(scene.stub.Generate(ask(max_tokens=20)))
    assert reply.token_ids == list(range(10, 30))
    assert reply.finished.reason == pb.FINISH_REASON_LENGTH
    assert (reply.finished.prefill_worker, reply.finished.decode_worker) == ("p0", "d0")
    p0, d0 = scene.workers
    assert d0.log == ["Expect"]
    assert p0.log == ["Prefill"]
    assert p0.prefills[0][1] == "d0"
    assert p0.prefills[0][0].id == d0.expects[0].id
    assert 100 < d0.expects[0].timeout_s <= 120


async def test_usage_and_timings_add_up_both_workers(scene: Scene) -> None:
    serve_automatically(scene.workers, lambda request: range(10, 14))
    finished = (await collect(scene.stub.Generate(ask(max_tokens=4)))).finished
    usage, timings = finished.usage, finished.timings
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 4, 7)
    assert usage.transferred_tokens == DECODE_PHASES.transferred_tokens
    assert timings.prefill_ms == PREFILL_PHASES.prefill_s * 1e3
    assert timings.prefill_queue_ms == PREFILL_PHASES.prefill_queue_s * 1e3
    assert timings.transfer_ms == DECODE_PHASES.transfer_s * 1e3
    assert timings.decode_ms == DECODE_PHASES.decode_s * 1e3
    assert 0 < timings.ttft_ms <= timings.e2e_ms


async def test_a_decode_worker_that_overtakes_the_first_token_is_waited_for(scene: Scene) -> None:
    call, id = await started(scene)
    p0, d0 = scene.workers
    d0.emit(SequenceEvent(id, 1, tokens(11, 12)), SequenceEvent(id, 3, tokens(13), FinishReason.LENGTH))
    await until(lambda: scene.router.pipeline._runs[id.request_id].inbox.completion.over)
    p0.emit(SequenceEvent(id, 0, tokens(10)))
    assert (await collect(call)).token_ids == [10, 11, 12, 13]


async def test_repeated_tokens_are_delivered_once(scene: Scene) -> None:
    call, id = await started(scene)
    p0, d0 = scene.workers
    for _ in range(2):
        p0.emit(SequenceEvent(id, 0, tokens(10), phases=PREFILL_PHASES))
    d0.emit(SequenceEvent(id, 1, tokens(11, 12)))
    d0.emit(SequenceEvent(id, 1, tokens(11, 12)))
    d0.emit(SequenceEvent(id, 2, tokens(12, 13), FinishReason.LENGTH, phases=DECODE_PHASES))
    reply = await collect(call)
    assert reply.token_ids == [10, 11, 12, 13]
    assert reply.finished.timings.prefill_ms == PREFILL_PHASES.prefill_s * 1e3


async def test_a_gap_is_an_internal_error_and_both_legs_are_aborted(scene: Scene) -> None:
    call, id = await started(scene)
    p0, d0 = scene.workers
    p0.emit(SequenceEvent(id, 0, tokens(10)))
    d0.emit(SequenceEvent(id, 2, tokens(12)))
    error = await error_of(call)
    assert error.code() is grpc.StatusCode.INTERNAL
    assert " d0" not in (error.details() or "")  # the opaque id may hold those letters
    await until(lambda: p0.aborts == [id] and d0.aborts == [id])


async def test_sixty_four_streams_at_once_do_not_mix(scene: Scene) -> None:
    serve_automatically(scene.workers, lambda request: [request.prompt_token_ids[0]] * 16)
    calls = [scene.stub.Generate(ask(ids=[number + 2, 5], max_tokens=16)) for number in range(64)]
    replies = await asyncio.gather(*(collect(call) for call in calls))
    assert [reply.token_ids for reply in replies] == [[number + 2] * 16 for number in range(64)]
    p0, d0 = scene.workers
    assert (p0.aborts, d0.aborts) == ([], [])
    assert scene.router.pipeline.num_inflight == 0


async def test_a_mixed_worker_prefills_and_decodes_without_a_hand_off(bare_model_dir: Path) -> None:
    async with scene_of(bare_model_dir, [FakeWorker("m0", Role.MIXED)]) as scene:
        serve_automatically(scene.workers, lambda request: range(10, 14))
        reply = await collect(scene.stub.Generate(ask()))
        m0 = scene.workers[0]
        assert reply.token_ids == [10, 11, 12, 13]
        assert m0.log == ["Prefill"]
        assert m0.prefills[0][1] == ""
        assert (reply.finished.prefill_worker, reply.finished.decode_worker) == ("m0", "m0")


async def test_when_the_first_token_is_the_last_the_decode_reservation_is_aborted(scene: Scene) -> None:
    serve_automatically(scene.workers, lambda request: [1])
    reply = await collect(scene.stub.Generate(ask(max_tokens=1)))
    p0, d0 = scene.workers
    assert reply.token_ids == [1]
    await until(lambda: len(d0.aborts) == 1)
    assert d0.aborts[0] == p0.prefills[0][0].id
    assert p0.aborts == []


async def test_an_end_of_sequence_token_is_named_in_the_answer(scene: Scene) -> None:
    call, id = await started(scene)
    scene.worker("p0").emit(SequenceEvent(id, 0, tokens(1), FinishReason.STOP, stop_token_id=1))
    finished = (await collect(call)).finished
    assert finished.reason == pb.FINISH_REASON_STOP
    assert finished.WhichOneof("stop_match") == "stop_token_id"
    assert finished.stop_token_id == 1


@pytest.mark.parametrize("stage", ["prefilling", "first token", "decoding"])
async def test_a_client_that_cancels_aborts_both_legs(scene: Scene, stage: str) -> None:
    call, id = await started(scene)
    p0, d0 = scene.workers
    if stage != "prefilling":
        p0.emit(SequenceEvent(id, 0, tokens(10)))
        await call.read()
    if stage == "decoding":
        d0.emit(SequenceEvent(id, 1, tokens(11)))
        await call.read()
    await cancel(call)
    await until(lambda: p0.aborts == [id] and d0.aborts == [id])
    await until(lambda: scene.metric("pdserve_requests_total", status="CANCELLED", finish_reason="") == 1)
    assert scene.router.pipeline.num_inflight == 0


async def test_a_cancel_during_expect_aborts_it_after_its_answer_and_prefill_is_never_asked(scene: Scene) -> None:
    p0, d0 = scene.workers
    d0.held["Expect"] = asyncio.Event()
    call = scene.stub.Generate(ask())
    await until(lambda: d0.expects)
    await cancel(call)
    await until(lambda: scene.router.pipeline.num_inflight == 0)
    assert d0.aborts == []
    d0.held["Expect"].set()
    await until(lambda: len(d0.aborts) == 1)
    assert p0.log == []


async def test_a_cancel_while_queued_leaves_no_trace_on_any_worker(bare_model_dir: Path) -> None:
    async with scene_of(bare_model_dir, split_pair(), max_inflight_requests=1) as scene:
        first, _ = await started(scene)
        second = scene.stub.Generate(ask())
        await until(lambda: scene.router.pipeline.num_queued == 1)
        await cancel(second)
        await until(lambda: scene.router.pipeline.num_queued == 0)
        assert len(scene.worker("d0").expects) == 1
        await cancel(first)
        await until(lambda: scene.router.pipeline.num_inflight == 0)


async def test_a_queued_request_starts_when_another_leaves(bare_model_dir: Path) -> None:
    async with scene_of(bare_model_dir, split_pair(), max_inflight_requests=1) as scene:
        first, id = await started(scene)
        second = asyncio.create_task(collect(scene.stub.Generate(ask())))
        await until(lambda: scene.router.pipeline.num_queued == 1)
        serve_automatically(scene.workers, lambda request: range(10, 14))
        scene.worker("p0").emit(SequenceEvent(id, 0, tokens(9), FinishReason.LENGTH))
        assert (await collect(first)).token_ids == [9]
        assert (await second).token_ids == [10, 11, 12, 13]


async def test_the_routers_own_deadline_ends_a_request_that_no_worker_ends(bare_model_dir: Path) -> None:
    async with scene_of(bare_model_dir, split_pair(), default_timeout_s=0.3) as scene:
        call, id = await started(scene)
        error = await error_of(call)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        p0, d0 = scene.workers
        assert 0 < p0.prefills[0][0].timeout_s <= 0.3
        await until(lambda: p0.aborts == [id] and d0.aborts == [id])


async def test_a_clients_deadline_travels_to_the_workers_and_is_capped(bare_model_dir: Path) -> None:
    async with scene_of(bare_model_dir, split_pair(), default_timeout_s=5, max_timeout_s=50) as scene:
        serve_automatically(scene.workers, lambda request: [9])
        await collect(scene.stub.Generate(ask(max_tokens=1), timeout=20))
        await collect(scene.stub.Generate(ask(max_tokens=1), timeout=1e6))
        first, second = (request.timeout_s for request in scene.worker("d0").expects)
        assert 10 < first < 21  # gRPC rounds deadlines
        assert 40 < second <= 50


async def test_tokens_that_arrived_before_an_error_are_delivered_before_it(scene: Scene) -> None:
    call, id = await started(scene)
    p0, d0 = scene.workers
    p0.emit(SequenceEvent(id, 0, tokens(10)))
    await call.read()
    d0.emit(SequenceEvent(id, 1, tokens(11)), failure(id, 2, "CorruptKV"))
    delta = (await call.read()).output
    assert [token.token_id for token in delta.tokens] == [11]
    assert (await error_of(call)).code() is grpc.StatusCode.DATA_LOSS
    await until(lambda: p0.aborts == [id])
    assert d0.aborts == []


REFUSALS = [
    (InvalidRequest("token_ids", "too many blocks"), grpc.StatusCode.INVALID_ARGUMENT),
    (Overloaded("no room"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (StaleReference("another generation"), grpc.StatusCode.UNAVAILABLE),
    (TransferFailed("no link"), grpc.StatusCode.UNAVAILABLE),
    (CorruptKV("digest"), grpc.StatusCode.DATA_LOSS),
]


@pytest.mark.parametrize("call_name", ["Expect", "Prefill"])
@pytest.mark.parametrize(("refusal", "code"), REFUSALS)
async def test_a_workers_refusal_becomes_the_requests_status(
    scene: Scene, call_name: str, refusal: PdserveError, code: grpc.StatusCode
) -> None:
    for worker in scene.workers:
        worker.refusals[call_name] = refusal
    error = await error_of(scene.stub.Generate(ask()))
    assert error.code() is code
    p0, d0 = scene.workers
    await until(lambda: len(d0.aborts) == 1)
    assert p0.log == ([] if call_name == "Expect" else ["Prefill", "Abort"])


def big_tokens(num_tokens: int) -> tuple[TokenInfo, ...]:
    """About 4,000 bytes each on the wire."""
    return (TokenInfo(7, -1.0, tuple((token_id, -2.0) for token_id in range(400))),) * num_tokens


@pytest.mark.parametrize("num_first", [1, 60], ids=["stalls later", "never takes the first message"])
async def test_a_reader_that_stalls_is_ended_and_costs_the_others_nothing(bare_model_dir: Path, num_first: int) -> None:
    limits = {"stall_timeout_s": 0.3, "max_buffered_tokens": 64, "max_logprobs": 400}
    async with scene_of(bare_model_dir, split_pair(), **limits) as scene:
        p0, d0 = scene.workers
        # A window that does not grow: what is not read stays with the sender after a few messages.
        options = [
            ("grpc.http2.lookahead_bytes", 1 << 16),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        request = ask(max_tokens=4000, response=pb.ResponseOptions(logprobs=400))
        async with grpc.aio.insecure_channel(scene.address, options=options) as channel:
            slow = channel.unary_stream(
                "/pdserve.v1.Inference/Generate",
                request_serializer=pb.GenerateRequest.SerializeToString,
                response_deserializer=pb.GenerateResponse.FromString,
            )(request)
            await until(lambda: p0.prefills)
            id = p0.prefills[0][0].id
            p0.emit(SequenceEvent(id, 0, big_tokens(num_first)))
            index = num_first
            while not d0.aborts and index < 4000:
                d0.emit(SequenceEvent(id, index, big_tokens(8)))
                index += 8
                await asyncio.sleep(0.001)
            await until(lambda: d0.aborts == [id])
            serve_automatically(scene.workers, lambda request: range(10, 14))
            assert (await collect(scene.stub.Generate(ask()))).token_ids == [10, 11, 12, 13]
            await until(
                lambda: scene.metric("pdserve_requests_total", status="RESOURCE_EXHAUSTED", finish_reason="") == 1
            )
            async with asyncio.timeout(20):
                assert (await error_of(slow)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def cancelled_by_its_client(scene: Scene, request_id: str) -> None:
    call, _ = await started(scene, request_id=request_id)
    await cancel(call)


async def ended_by_its_first_token(scene: Scene, request_id: str) -> None:
    call, id = await started(scene, request_id=request_id)
    scene.worker("p0").emit(SequenceEvent(id, 0, tokens(1), FinishReason.STOP, stop_token_id=1))
    await collect(call)


async def failed_on_its_worker(scene: Scene, request_id: str) -> None:
    call, id = await started(scene, request_id=request_id)
    scene.worker("d0").emit(failure(id, 0, "TransferFailed"))
    await error_of(call)


@pytest.mark.parametrize("end", [cancelled_by_its_client, ended_by_its_first_token, failed_on_its_worker])
async def test_a_client_may_use_its_id_again_once_the_request_has_ended(
    scene: Scene, end: Callable[[Scene, str], Awaitable[None]]
) -> None:
    """Workers remember what was aborted, and refuse it."""
    p0, d0 = scene.workers
    for num_ended in (1, 2):
        await end(scene, "mine")
        await until(partial(lambda count: len(p0.aborts) + len(d0.aborts) >= count, num_ended))
        await until(lambda: scene.router.pipeline.num_inflight == 0)
    serve_automatically(scene.workers, lambda request: range(10, 14))
    assert (await collect(scene.stub.Generate(ask(request_id="mine")))).token_ids == [10, 11, 12, 13]
    assert len({request.id for request, _ in p0.prefills}) == 3


async def test_an_attempt_fits_the_wire_however_long_the_router_has_run(scene: Scene) -> None:
    scene.router.pipeline._attempts = itertools.count((1 << 32) - 1)
    serve_automatically(scene.workers, lambda request: [9])
    for _ in range(2):
        assert (await collect(scene.stub.Generate(ask(max_tokens=1)))).token_ids == [9]
    assert [request.id.attempt for request, _ in scene.worker("p0").prefills] == [(1 << 32) - 1, 0]
