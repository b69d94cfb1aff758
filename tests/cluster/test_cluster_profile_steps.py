"""What a worker remembers of its engine's steps, and how others read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from families import random_prompt
from scheduler_runs import execute, fresh, scheduler
from worker_pair import WAIT_S, make_request, start, worker_pair

from pdserve.cluster.planner.step_shape import StepShape, chunk_pairs
from pdserve.cluster.step_feed import METHOD, SERVICE, StepReader, handler
from pdserve.cluster.step_records import StepRecorder, from_json, to_json
from pdserve.engine.plan import StepResult
from pdserve.engine.scheduler import Scheduler
from pdserve.engine.turn import turn_of
from pdserve.proto.errors import InternalError, Unavailable

FamilyDir = Callable[..., Path]


def take_steps(recorder: StepRecorder, target: Scheduler) -> None:
    """As an engine's loop does, each step at a second of its own and half a second long."""
    recorder.watch(target)
    at_s = 0.0
    while target.has_work:
        plan = target.schedule(at_s)
        step = StepResult.of(plan, execute(target, plan), 0.5)
        recorder.turn_ended(turn_of(step, target.pool, target, 0, 0))
        at_s += 1.0
    recorder.turn_ended(turn_of(None, target.pool, target, 0, 0))


def recorded(*prompt_lengths: int, max_records: int = 100) -> StepRecorder:
    recorder, target = StepRecorder(max_records), scheduler(tokens=16)
    for number, length in enumerate(prompt_lengths):
        target.add(fresh(length, 3, branch=number + 1))
    take_steps(recorder, target)
    return recorder


def test_a_record_holds_the_steps_shape_when_it_began_and_whether_another_follows() -> None:
    records = recorded(20).since(0)
    assert [one.shape for one in records] == [
        StepShape(16, chunk_pairs(16, 0), 0, 0),
        StepShape(4, chunk_pairs(4, 16), 0, 0),
        StepShape(0, 0.0, 1, 21),
        StepShape(0, 0.0, 1, 22),
    ]
    assert [one.started_s for one in records] == [0.0, 1.0, 2.0, 3.0]
    assert records[0].ended_s == 0.5
    assert [one.leaves_work for one in records] == [True, True, True, False]


def test_memory_is_bounded_and_numbers_go_on() -> None:
    recorder = recorded(20, max_records=2)
    assert [one.number for one in recorder.since(0)] == [2, 3]
    assert [one.number for one in recorder.since(3)] == [3]
    assert recorder.since(4) == ()


def test_records_travel_as_json() -> None:
    records = recorded(20, 7).since(0)
    assert from_json(to_json(records)) == records


async def test_a_reader_gets_each_record_once_and_names_who_does_not_answer() -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler(recorded(20)),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    reader = StepReader([address])
    try:
        (first,), (second,) = await reader.read(), await reader.read()
        assert [one.number for one in first] == [0, 1, 2, 3]
        assert second == ()
        async with grpc.aio.insecure_channel(address) as channel:
            call: Any = channel.unary_unary(f"/{SERVICE}/{METHOD}")
            with pytest.raises(grpc.aio.AioRpcError, match="no number of a step"):
                await call(b"x")
        await server.stop(0)
        with pytest.raises(Unavailable, match=f"{address}: no step records"):
            await reader.read()
    finally:
        await reader.close()
        await server.stop(0)


async def test_an_answer_that_is_none_is_said_to_be_of_another_version() -> None:
    async def nonsense(request: bytes, context: object) -> bytes:
        return b'[[1, "x"]]'

    server = grpc.aio.server()
    methods: dict[str, Any] = {METHOD: grpc.unary_unary_rpc_method_handler(nonsense)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    reader = StepReader([address])
    try:
        with pytest.raises(InternalError, match="another version"):
            await reader.read()
    finally:
        await reader.close()
        await server.stop(0)


async def test_real_workers_record_what_they_computed(family_dir: FamilyDir) -> None:
    async with worker_pair(family_dir("llama")) as (prefill, decode):
        reader = StepReader(side.worker.requests.info.worker.address for side in (prefill, decode))
        try:
            id = await start(prefill, decode, make_request("one", random_prompt(70), max_tokens=5))  # a chunk is 64
            await decode.ended(id)
            of_prefill, of_decode = await reader.read()
        finally:
            await reader.close()
    assert [one.shape.num_prefill_tokens for one in of_prefill] == [64, 6]
    assert [one.shape for one in of_decode] == [StepShape(0, 0.0, 1, 71 + step) for step in range(4)]
    assert all(0 < one.duration_s < WAIT_S for one in (*of_prefill, *of_decode))
    assert of_prefill[-1].ended_s < of_decode[0].started_s, "the clocks of one machine are one"
