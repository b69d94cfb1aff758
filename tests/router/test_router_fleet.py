"""Workers, the controller and other routers come, go and break while requests are in flight."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from router_fakes import (
    FakeWorker,
    Scene,
    ask,
    cancel,
    collect,
    error_of,
    responses,
    running_router,
    scene_of,
    serve_automatically,
    split_pair,
    started,
    tokens,
    until,
)

from pdserve.proto.types import FinishReason, Role, SequenceEvent, StepOutput


@pytest.fixture
async def scene(bare_model_dir: Path) -> AsyncIterator[Scene]:
    async with scene_of(bare_model_dir, split_pair()) as scene:
        yield scene


async def test_losing_a_mixed_worker_after_its_first_token_ends_the_request(bare_model_dir: Path) -> None:
    async with scene_of(bare_model_dir, [FakeWorker("m0", Role.MIXED)]) as scene:
        m0 = scene.workers[0]
        call = scene.stub.Generate(ask())
        await until(lambda: m0.prefills)
        m0.emit(SequenceEvent(m0.prefills[0][0].id, 0, tokens(10)))
        await call.read()
        m0.break_streams()
        error = await error_of(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "m0" in (error.details() or "")


@pytest.mark.parametrize(("lost", "other"), [("p0", "d0"), ("d0", "p0")])
async def test_a_broken_stream_ends_the_request_at_once_and_aborts_the_other_leg(
    scene: Scene, lost: str, other: str
) -> None:
    call, id = await started(scene)
    scene.worker(lost).break_streams()
    error = await error_of(call)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert lost in (error.details() or "")
    await until(lambda: scene.worker(other).aborts == [id])


async def test_a_prefill_worker_may_die_once_the_decode_worker_has_spoken(scene: Scene) -> None:
    call, id = await started(scene)
    p0, d0 = scene.workers
    p0.emit(SequenceEvent(id, 0, tokens(10)))
    d0.emit(SequenceEvent(id, 1, tokens(11)))
    await call.read()
    await until(lambda: scene.router.pipeline._runs[id.request_id].inbox.completion._expected["d0"] == 2)
    p0.break_streams()
    await until(lambda: "p0" not in [view.worker_id for view in scene.router.fleet.views()])
    d0.emit(SequenceEvent(id, 2, tokens(12, 13), FinishReason.LENGTH))
    ids = []
    async for response in responses(call):
        ids += [token.token_id for token in response.output.tokens]
    assert ids[-2:] == [12, 13]


async def test_a_worker_that_the_controller_calls_dead_ends_its_requests(scene: Scene) -> None:
    call, id = await started(scene)
    p0, d0 = scene.workers
    scene.controller.announce([p0], dead=[d0])
    error = await error_of(call)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "d0" in (error.details() or "")
    await until(lambda: p0.aborts == [id])


async def test_a_request_that_ends_while_a_worker_is_being_asked_is_aborted_there_once(scene: Scene) -> None:
    p0, d0 = scene.workers
    p0.held["Prefill"] = asyncio.Event()
    call, id = await started(scene)
    scene.controller.announce([p0], dead=[d0])
    await until(lambda: len(scene.router.fleet.views()) == 1)
    p0.held["Prefill"].set()
    await error_of(call)
    await scene.router.pipeline.close()
    assert p0.aborts == [id]


async def test_a_broken_stream_comes_back_and_serves_again(scene: Scene) -> None:
    scene.worker("d0").break_streams()
    await until(lambda: len(scene.router.fleet.views()) == 1)
    await until(lambda: len(scene.router.fleet.views()) == 2)
    serve_automatically(scene.workers, lambda request: range(10, 14))
    assert (await collect(scene.stub.Generate(ask()))).token_ids == [10, 11, 12, 13]


async def test_two_routers_share_workers_without_hearing_each_others_requests(scene: Scene) -> None:
    async with running_router(scene.model_dir, scene.controller, scene.workers) as other:
        first = scene.stub.Generate(ask(request_id="same"))
        second = other.stub.Generate(ask(request_id="same"))
        p0 = scene.worker("p0")
        await until(lambda: len(p0.prefills) == 2)
        ids = {request.id.epoch: request.id for request, _ in p0.prefills}
        assert set(ids) == {scene.router.epoch, other.router.epoch}
        # A stale event on the wrong router's stream must change nothing.
        p0.streams[scene.router.epoch].put_nowait(
            StepOutput((SequenceEvent(ids[other.router.epoch], 0, tokens(99)),), p0.load)
        )
        p0.emit(SequenceEvent(ids[scene.router.epoch], 0, tokens(10), FinishReason.LENGTH))
        p0.emit(SequenceEvent(ids[other.router.epoch], 0, tokens(20), FinishReason.LENGTH))
        assert (await collect(first)).token_ids == [10]
        assert (await collect(second)).token_ids == [20]
        assert scene.metric("pdserve_dropped_events_total") == 1


async def test_losing_the_controller_changes_nothing_and_it_may_come_back(scene: Scene) -> None:
    serve_automatically(scene.workers, lambda request: range(10, 14))
    address = scene.controller.address
    await scene.controller.stop()
    assert (await collect(scene.stub.Generate(ask()))).token_ids == [10, 11, 12, 13]
    d0 = scene.worker("d0")
    await scene.controller.start(address)
    scene.controller.announce([scene.worker("p0")], dead=[d0])
    await until(lambda: len(scene.router.fleet.views()) == 1)
    assert (await error_of(scene.stub.Generate(ask()))).code() is grpc.StatusCode.UNAVAILABLE


async def test_a_burst_is_spread_over_workers_whose_loads_have_not_moved_yet(bare_model_dir: Path) -> None:
    workers = [
        FakeWorker(f"{kind}{number}", role)
        for kind, role in (("p", Role.PREFILL), ("d", Role.DECODE))
        for number in range(3)
    ]
    async with scene_of(bare_model_dir, workers) as scene:
        calls = [scene.stub.Generate(ask()) for _ in range(12)]
        await until(lambda: sum(len(worker.prefills) for worker in workers) == 12)
        assert [len(worker.prefills) for worker in workers[:3]] == [4, 4, 4]
        assert [len(worker.expects) for worker in workers[3:]] == [4, 4, 4]
        for call in calls:
            await cancel(call)


async def test_a_new_generation_at_a_new_address_replaces_the_old_connection(scene: Scene) -> None:
    call, _ = await started(scene)
    p0 = scene.worker("p0")
    successor = FakeWorker("d0", Role.DECODE, generation=2)
    await successor.start()
    try:
        scene.controller.announce([p0, successor])
        assert (await error_of(call)).code() is grpc.StatusCode.UNAVAILABLE
        await until(lambda: len(scene.router.fleet.views()) == 2)
        serve_automatically([p0, successor], lambda request: range(10, 14))
        assert (await collect(scene.stub.Generate(ask()))).token_ids == [10, 11, 12, 13]
        assert len(successor.expects) == 1
    finally:
        scene.controller.announce([p0])
        await until(lambda: len(scene.router.fleet.views()) == 1)
        await successor.stop()


async def test_a_draining_worker_gets_no_new_requests(scene: Scene) -> None:
    scene.worker("p0").report(draining=True)
    await until(lambda: not scene.router.fleet.can_serve())
    error = await error_of(scene.stub.Generate(ask()))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    scene.worker("p0").report(draining=False)
    await until(scene.router.fleet.can_serve)
