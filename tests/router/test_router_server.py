"""The edge as a client sees it: the status table, odd bytes on the wire, text, health, metrics, drain."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from router_fakes import (
    DECODE_PHASES,
    PREFILL_PHASES,
    FakeWorker,
    Scene,
    ask,
    cancel,
    collect,
    error_of,
    responses,
    scene_of,
    serve_automatically,
    split_pair,
    tokens,
    until,
)

from pdserve.proto import inference_pb2 as pb
from pdserve.proto.types import FinishReason, Role, SequenceEvent

Code = grpc.StatusCode


@pytest.fixture
async def scene(model_dir: Path) -> AsyncIterator[Scene]:
    async with scene_of(model_dir, split_pair()) as scene:
        yield scene


def details_of(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    """The one detail of that kind."""
    status = rpc_status.from_call(error)
    assert status is not None
    for detail in status.details:
        if detail.Is(kind.DESCRIPTOR):
            message = kind()
            detail.Unpack(message)
            return message
    raise AssertionError(f"no {kind.__name__} in the status")


def text_ids(scene: Scene, text: str) -> list[int]:
    assert scene.router.model.tokenizer is not None
    ids: list[int] = scene.router.model.tokenizer.encode(text)
    return ids[1:]


def raw(scene: Scene, path: str, data: bytes) -> Any:
    """A call whose request is these bytes."""
    method: Any = scene.channel.unary_stream(path)
    return method(data, timeout=10)


# Field 3 of GenerateRequest is the prompt, field 1 the request id, field 4 the token ids.
BAD_BYTES = [
    b"\x1a\x02\xff\xfe",
    b"\x0a\x03a\xc3\x28",
    b"\xff\xff",
    b"\x1a\x7fa",
    b"\x08",
    b"\x08" + b"\xff" * 11,
    b"\x07",
]


@pytest.mark.parametrize("data", BAD_BYTES)
@pytest.mark.parametrize("method", ["Generate", "Tokenize"])
async def test_bytes_that_are_no_message_are_an_invalid_argument(scene: Scene, data: bytes, method: str) -> None:
    error = await error_of(raw(scene, f"/pdserve.v1.Inference/{method}", data))
    assert error.code() is Code.INVALID_ARGUMENT


async def test_bytes_that_are_no_health_request_are_an_invalid_argument(scene: Scene) -> None:
    error = await error_of(raw(scene, "/grpc.health.v1.Health/Check", b"\x0a\x02\xff\xfe"))
    assert error.code() is Code.INVALID_ARGUMENT


async def test_unknown_fields_are_ignored_and_wrong_wire_types_refused(scene: Scene) -> None:
    serve_automatically(scene.workers, lambda request: [9])
    good = ask(max_tokens=1).SerializeToString()
    call = raw(scene, "/pdserve.v1.Inference/Generate", good + b"\xfa\x3e\x01x" * 100_000)
    assert len([message async for message in responses(call)]) == 2
    error = await error_of(raw(scene, "/pdserve.v1.Inference/Generate", b"\x18\x01"))
    assert error.code() is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(("method", "service"), [("Nothing", "pdserve.v1.Inference"), ("Generate", "no.Service")])
async def test_what_is_not_there_is_unimplemented(scene: Scene, method: str, service: str) -> None:
    assert (await error_of(raw(scene, f"/{service}/{method}", b""))).code() is Code.UNIMPLEMENTED


async def test_an_invalid_field_is_named_in_the_details(scene: Scene) -> None:
    error = await error_of(scene.stub.Generate(ask(sampling=pb.SamplingOptions(top_p=7.0))))
    assert error.code() is Code.INVALID_ARGUMENT
    violation = details_of(error, error_details_pb2.BadRequest).field_violations[0]
    assert violation.field == "sampling.top_p"
    assert violation.description.startswith("must be")
    assert scene.metric("pdserve_requests_total", status="INVALID_ARGUMENT", finish_reason="") == 1


async def test_a_full_queue_says_when_to_come_back(model_dir: Path) -> None:
    async with scene_of(model_dir, split_pair(), max_inflight_requests=1, max_queued_requests=0) as scene:
        first = scene.stub.Generate(ask())
        await until(lambda: scene.worker("p0").prefills)
        error = await error_of(scene.stub.Generate(ask()))
        assert error.code() is Code.RESOURCE_EXHAUSTED
        delay = details_of(error, error_details_pb2.RetryInfo).retry_delay
        assert delay.ToMilliseconds() > 0
        await cancel(first)


async def test_an_id_in_flight_already_exists(scene: Scene) -> None:
    first = scene.stub.Generate(ask(request_id="mine"))
    await until(lambda: scene.worker("p0").prefills)
    error = await error_of(scene.stub.Generate(ask(request_id="mine")))
    assert error.code() is Code.ALREADY_EXISTS
    await cancel(first)


async def test_another_model_is_not_found_and_the_served_one_may_be_named(scene: Scene) -> None:
    serve_automatically(scene.workers, lambda request: [9])
    assert (await error_of(scene.stub.Generate(ask(model="other")))).code() is Code.NOT_FOUND
    reply = await collect(scene.stub.Generate(ask(max_tokens=1, model=scene.router.model.name)))
    assert reply.token_ids == [9]


async def test_without_workers_the_service_is_unavailable(model_dir: Path) -> None:
    async with scene_of(model_dir, []) as scene:
        assert (await error_of(scene.stub.Generate(ask()))).code() is Code.UNAVAILABLE


async def test_a_prompt_that_no_pool_can_hold_is_the_requests_fault(model_dir: Path) -> None:
    workers = [FakeWorker("p0", Role.PREFILL), FakeWorker("d0", Role.DECODE, total_blocks=4, free_blocks=4)]
    async with scene_of(model_dir, workers) as scene:
        info = await scene.stub.GetModelInfo(pb.GetModelInfoRequest())
        assert info.max_model_len == 64
        assert (await error_of(scene.stub.Generate(ask(ids=[5] * 64)))).code() is Code.INVALID_ARGUMENT
        assert (await error_of(scene.stub.Generate(ask(ids=[5] * 60, max_tokens=5)))).code() is Code.INVALID_ARGUMENT
        serve_automatically(workers, lambda request: [9] * request.sampling.max_tokens)
        assert (await collect(scene.stub.Generate(ask(ids=[5] * 60, max_tokens=4)))).token_ids == [9] * 4


async def test_messages_up_to_the_limit_are_read_and_larger_ones_are_not(model_dir: Path) -> None:
    async with scene_of(model_dir, split_pair(), max_message_bytes=4096) as scene:
        for size, code in (
            (4095, Code.INVALID_ARGUMENT),
            (4096, Code.INVALID_ARGUMENT),
            (4097, Code.RESOURCE_EXHAUSTED),
        ):
            # The id is too long in any case, which is said only about a message that was read.
            data = pb.GenerateRequest(request_id="x" * (size - 3)).SerializeToString()
            assert len(data) == size
            assert (await error_of(raw(scene, "/pdserve.v1.Inference/Generate", data))).code() is code


async def test_an_exception_of_ours_is_internal_with_an_id_and_nothing_else(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(*args: object) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(scene.router.pipeline, "_place", explode)
    error = await error_of(scene.stub.Generate(ask()))
    assert error.code() is Code.INTERNAL
    assert "secret" not in (error.details() or "")
    opaque = (error.details() or "").split()[-1]
    assert any(opaque in record.getMessage() and record.exc_info for record in caplog.records)
    assert scene.router.pipeline.num_inflight == 0


async def test_text_arrives_in_whole_characters_and_in_full(scene: Scene) -> None:
    ids = text_ids(scene, "héllo 世界 😀 stop here")
    serve_automatically(scene.workers, lambda request: ids)
    stopping = pb.StoppingOptions(max_tokens=len(ids), ignore_eos=True)
    texts, seen = [], []
    async for response in responses(scene.stub.Generate(pb.GenerateRequest(prompt="quick", stopping=stopping))):
        texts.append(response.output.text)
        seen += [token.token_id for token in response.output.tokens]
    assert seen == ids
    assert "".join(texts) == "héllo 世界 😀 stop here"
    assert not any("\ufffd" in text for text in texts)
    assert scene.worker("p0").prefills[0][0].prompt_token_ids == (0, *text_ids(scene, "quick"))


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_ends_the_request_and_stops_the_workers(scene: Scene, include: bool) -> None:
    ids = text_ids(scene, "the lazy dog sleeps")
    call = scene.stub.Generate(
        pb.GenerateRequest(
            prompt="quick",
            stopping=pb.StoppingOptions(max_tokens=500, stop=["zy do"], include_stop_str_in_output=include),
        )
    )
    p0, d0 = scene.workers
    await until(lambda: p0.prefills)
    id = p0.prefills[0][0].id
    p0.emit(SequenceEvent(id, 0, tokens(ids[0])))
    # One event with everything: what comes after the stop string must not be delivered.
    d0.emit(SequenceEvent(id, 1, tokens(*ids[1:])))
    reply = await collect(call)
    assert reply.text == ("the lazy do" if include else "the la")
    assert reply.finished.reason == pb.FINISH_REASON_STOP
    assert reply.finished.stop_text == "zy do"
    assert reply.finished.usage.completion_tokens == len(reply.token_ids) < len(ids)
    await until(lambda: d0.aborts == [id] and p0.aborts == [id])


async def test_a_stop_string_leaves_a_ledger_of_the_stages_that_are_known(scene: Scene) -> None:
    """The decode worker is told to stop, so its last word on its phases never comes; its first one has."""
    ids = text_ids(scene, "the lazy dog sleeps")
    call = scene.stub.Generate(pb.GenerateRequest(prompt="quick", stopping=pb.StoppingOptions(stop=["lazy"])))
    p0, d0 = scene.workers
    await until(lambda: p0.prefills)
    id = p0.prefills[0][0].id
    p0.emit(SequenceEvent(id, 0, tokens(ids[0]), phases=PREFILL_PHASES))
    await call.read()
    d0.emit(SequenceEvent(id, 1, tokens(ids[1]), phases=replace(DECODE_PHASES, decode_s=0.0)))
    await call.read()
    d0.emit(SequenceEvent(id, 2, tokens(*ids[2:])))
    *_, last = [response async for response in responses(call)]
    usage, timings = last.finished.usage, last.finished.timings
    assert usage.transferred_tokens == DECODE_PHASES.transferred_tokens
    assert timings.transfer_ms == DECODE_PHASES.transfer_s * 1e3
    assert 0 < timings.decode_ms < timings.e2e_ms
    assert scene.metric("pdserve_request_stage_seconds_sum", stage="decode") == pytest.approx(timings.decode_ms / 1e3)
    assert scene.metric("pdserve_request_stage_seconds_count", stage="transfer") == 1


async def test_a_held_back_beginning_of_a_stop_string_is_flushed_at_the_end(scene: Scene) -> None:
    ids = text_ids(scene, "dog; pack")
    serve_automatically(scene.workers, lambda request: ids)
    stopping = pb.StoppingOptions(max_tokens=len(ids), stop=["pack my"])
    reply = await collect(scene.stub.Generate(pb.GenerateRequest(prompt="quick", stopping=stopping)))
    assert reply.text == "dog; pack"
    assert reply.finished.reason == pb.FINISH_REASON_LENGTH


async def test_chats_and_tokenize_and_detokenize_agree(scene: Scene) -> None:
    serve_automatically(scene.workers, lambda request: [9])
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="the <|im_end|> fox")])
    ids = (await scene.stub.Tokenize(pb.TokenizeRequest(chat=chat))).token_ids
    await collect(scene.stub.Generate(pb.GenerateRequest(chat=chat, stopping=pb.StoppingOptions(max_tokens=1))))
    assert scene.worker("p0").prefills[0][0].prompt_token_ids == tuple(ids)
    plain = (await scene.stub.Tokenize(pb.TokenizeRequest(prompt="lazy dog"))).token_ids
    assert (await scene.stub.Detokenize(pb.DetokenizeRequest(token_ids=plain))).text == "lazy dog"
    for request in (pb.TokenizeRequest(), pb.TokenizeRequest(prompt="x" * ((1 << 20) + 1))):
        assert (await error_of(scene.stub.Tokenize(request))).code() is Code.INVALID_ARGUMENT
    bad = pb.DetokenizeRequest(token_ids=[1 << 40])
    assert (await error_of(scene.stub.Detokenize(bad))).code() is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("text", ["e\u0301" * 100_000, "👩‍" * 4096, "\u202e" * 2000, "x" * (1 << 20)])
async def test_strange_and_huge_prompts_are_answered_and_serving_goes_on(scene: Scene, text: str) -> None:
    serve_automatically(scene.workers, lambda request: [9])
    error = await error_of(scene.stub.Generate(pb.GenerateRequest(prompt=text), timeout=20))
    assert error.code() is Code.INVALID_ARGUMENT
    assert (await collect(scene.stub.Generate(ask(max_tokens=1)))).token_ids == [9]


async def test_a_model_without_a_tokenizer_serves_token_ids_only(bare_model_dir: Path) -> None:
    async with scene_of(bare_model_dir, split_pair()) as scene:
        serve_automatically(scene.workers, lambda request: [9, 8])
        reply = await collect(scene.stub.Generate(ask(max_tokens=2)))
        assert (reply.token_ids, reply.text) == ([9, 8], "")
        error = await error_of(scene.stub.Generate(pb.GenerateRequest(prompt="x")))
        assert error.details() == "prompt: this model has no tokenizer; send token_ids"
        info = await scene.stub.GetModelInfo(pb.GetModelInfoRequest())
        assert not info.has_tokenizer
        assert not info.has_chat_template


async def test_model_info_tells_what_is_served_and_by_how_many(scene: Scene) -> None:
    info = await scene.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.model, info.architecture) == (scene.router.model.name, "LlamaForCausalLM")
    assert info.vocab_size == scene.router.model.vocab_size
    assert (info.max_model_len, list(info.eos_token_ids)) == (4096, [1, 3])
    assert (info.num_prefill_workers, info.num_decode_workers, info.num_mixed_workers) == (1, 1, 0)


async def health_of(scene: Scene, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(scene.channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)


@pytest.mark.parametrize("service", ["", "pdserve.v1.Inference"])
async def test_health_follows_what_the_fleet_can_do(scene: Scene, service: str) -> None:
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert await health_of(scene, service) == serving
    stub = health_pb2_grpc.HealthStub(scene.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=service))
    assert (await watch.read()).status == serving
    scene.controller.announce([scene.worker("p0")], dead=[scene.worker("d0")])
    assert (await watch.read()).status == not_serving
    scene.controller.announce(scene.workers)
    assert (await watch.read()).status == serving
    watch.cancel()


@pytest.mark.parametrize("enabled", [False, True])
async def test_reflection_is_there_only_when_asked_for(model_dir: Path, enabled: bool) -> None:
    async with scene_of(model_dir, split_pair(), reflection=enabled) as scene:
        stub = reflection_pb2_grpc.ServerReflectionStub(scene.channel)
        if enabled:
            call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            names = [service.name for service in (await call.read()).list_services_response.service]
            assert "pdserve.v1.Inference" in names
            bad: Any = scene.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
            assert (await error_of(bad(iter([b"\xff\xff"])))).code() is Code.INVALID_ARGUMENT
        else:
            # Nothing is sent: a message that meets the end of the call would be an error of its own.
            assert await stub.ServerReflectionInfo().code() is Code.UNIMPLEMENTED


async def test_metrics_tell_the_traffic_that_was(model_dir: Path) -> None:
    slo = {"ttft_ms": 60_000, "tpot_ms": 1e-6}
    async with scene_of(model_dir, split_pair(), slo=slo) as scene:
        for max_tokens in (1, 4, 8):
            await played_in_two_deltas(scene, max_tokens)
        assert scene.metric("pdserve_requests_total", status="OK", finish_reason="length") == 3
        assert scene.metric("pdserve_prompt_tokens_total") == 9
        assert scene.metric("pdserve_generation_tokens_total") == 13
        assert scene.metric("pdserve_time_to_first_token_seconds_count") == 3
        assert scene.metric("pdserve_e2e_request_latency_seconds_count") == 3
        assert scene.metric("pdserve_request_stage_seconds_sum", stage="decode") == 4.0
        assert scene.metric("pdserve_request_stage_seconds_count", stage="decode") == 2
        assert scene.metric("pdserve_request_stage_seconds_sum", stage="prefill") == 1.5
        assert scene.metric("pdserve_slo_requests_total", slo="ttft", outcome="met") == 3
        assert scene.metric("pdserve_slo_requests_total", slo="tpot", outcome="missed") == 2
        assert scene.metric("pdserve_slo_requests_total", slo="all", outcome="met") == 1
        assert scene.metric("pdserve_slo_requests_total", slo="all", outcome="missed") == 2
        assert scene.metric("pdserve_workers", role="decode", state="ready") == 1
        assert scene.metric("pdserve_workers", role="mixed", state="ready") == 0
        assert scene.metric("pdserve_inflight_requests") == 0
        page = await asyncio.to_thread(scrape, scene.metrics_address)
        assert "pdserve_time_to_first_token_seconds_bucket" in page


async def played_in_two_deltas(scene: Scene, max_tokens: int) -> None:
    """The rest is sent once the first token has been read: tokens that share a delta have no time between them."""
    p0, d0 = scene.workers
    num_before = len(p0.prefills)
    call = scene.stub.Generate(ask(max_tokens=max_tokens))
    await until(lambda: len(p0.prefills) > num_before)
    id = p0.prefills[-1][0].id
    done = FinishReason.LENGTH
    p0.emit(SequenceEvent(id, 0, tokens(9), done if max_tokens == 1 else None, phases=PREFILL_PHASES))
    await call.read()
    if max_tokens > 1:
        d0.emit(SequenceEvent(id, 1, tokens(9) * (max_tokens - 1), done, phases=DECODE_PHASES))
    async for _ in responses(call):
        continue


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


async def test_stopping_refuses_what_comes_lets_the_rest_end_and_tells_what_cannot(model_dir: Path) -> None:
    async with scene_of(model_dir, split_pair(), drain_grace_s=0.5) as scene:
        p0, d0 = scene.workers
        ending, stuck = scene.stub.Generate(ask(request_id="ending")), scene.stub.Generate(ask(request_id="stuck"))
        await until(lambda: len(p0.prefills) == 2)
        ids = {request.id.request_id: request.id for request, _ in p0.prefills}
        scene.stop.set()
        await until(lambda: scene.router.pipeline.draining)
        assert await health_of(scene, "") == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await error_of(scene.stub.Generate(ask()))).code() is Code.UNAVAILABLE
        p0.emit(SequenceEvent(ids["ending"], 0, tokens(9), FinishReason.LENGTH))
        assert (await collect(ending)).token_ids == [9]
        assert (await error_of(stuck)).code() is Code.UNAVAILABLE
        await scene.task
        assert ids["stuck"] in d0.aborts
        assert ids["stuck"] in p0.aborts


async def test_a_deadline_that_is_gone_or_nearly_so_is_exceeded(scene: Scene) -> None:
    for timeout_s in (0.0, 0.001, 0.2):
        error = await error_of(scene.stub.Generate(ask(), timeout=timeout_s))
        assert error.code() is Code.DEADLINE_EXCEEDED
    await until(lambda: scene.router.pipeline.num_inflight == 0)
