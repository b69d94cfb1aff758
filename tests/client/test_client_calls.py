"""Both clients against a scripted server: answers, deadlines, cancelling, failures."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from typing import Any

import grpc
import pytest
from fake_inference import FakeInference, aborts, delta, finished, replies, stalls

from pdserve.client import AsyncClient, Client, Completion, Health
from pdserve.proto import errors

WAIT_S = 10


def test_importing_the_client_needs_only_grpc_and_protobuf() -> None:
    program = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        blocked = {"torch", "ray", "pydantic", "transformers", "numpy", "yaml", "typer", "rich", "grpc_health",
                   "grpc_status", "tokenizers"}
        if name.partition(".")[0] in blocked or name.startswith("google.rpc"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
import pdserve.client
from pdserve.client import Client
Client("127.0.0.1:1").close()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


async def both(fake: FakeInference, prompt: Any, **options: Any) -> list[Completion]:
    """The same question through both clients."""
    async with AsyncClient(fake.endpoint) as client:
        first = await client.generate(prompt, **options)
    with Client(fake.endpoint) as blocking:
        second = await asyncio.to_thread(blocking.generate, prompt, **options)
    return [first, second]


async def test_generate_returns_the_whole_answer(fake: FakeInference) -> None:
    first, second = await both(fake, "hello", max_tokens=3, request_id="mine")
    assert first == second
    assert first.token_ids == (10, 11, 12)
    assert first.text == "w0 w1 w2 "
    assert first.request_id == "mine"
    assert [request.prompt for request in fake.requests] == ["hello", "hello"]


def test_a_stream_yields_deltas_and_then_has_the_completion(fake: FakeInference) -> None:
    with Client(fake.endpoint) as client, client.stream([1, 2], max_tokens=2) as stream:
        with pytest.raises(RuntimeError, match="not been read"):
            _ = stream.completion
        assert [(d.index, d.token_ids, d.text) for d in stream] == [(0, (10,), "w0 "), (1, (11,), "w1 ")]
        assert stream.completion.token_ids == (10, 11)
        assert list(stream) == []


async def test_an_async_stream_yields_deltas_and_then_has_the_completion(fake: FakeInference) -> None:
    async with AsyncClient(fake.endpoint) as client, client.stream("x", max_tokens=2) as stream:
        assert [d.token_ids async for d in stream] == [(10,), (11,)]
        assert stream.completion.text == "w0 w1 "


async def test_deltas_arrive_while_the_server_is_still_working(fake: FakeInference) -> None:
    fake.script = stalls(delta(0, 5, text="a"))
    async with AsyncClient(fake.endpoint) as client, client.stream("x") as stream:
        assert (await anext(stream)).text == "a"
        assert fake.num_running == 1


async def test_every_call_has_a_deadline(fake: FakeInference) -> None:
    async with AsyncClient(fake.endpoint, timeout_s=50) as client:
        await client.generate("x")
        await client.generate("x", timeout_s=20)
    with Client(fake.endpoint) as blocking:
        await asyncio.to_thread(blocking.generate, "x")
    own, named, default = (deadline or 0 for deadline in fake.deadlines_s)
    assert 40 < own < 52
    assert 10 < named < 22
    assert 500 < default < 602


async def test_the_other_calls_answer(fake: FakeInference) -> None:
    chat = [{"role": "user", "content": "hi"}]
    async with AsyncClient(fake.endpoint) as client:
        assert await client.tokenize("hi") == (104, 105)
        assert await client.detokenize([104, 105]) == "hi"
        assert (await client.model_info()).eos_token_ids == (2, 7)
        assert await client.health() is Health.SERVING
    with Client(fake.endpoint) as blocking:
        assert len(blocking.tokenize(chat)) == len("<user>hi")
        assert blocking.detokenize([104, 105]) == "hi"
        assert blocking.model_info().num_decode_workers == 2
        assert blocking.health() is Health.SERVING


# -- cancelling --------------------------------------------------------------------------------------------------


def leave_with(client: Client) -> None:
    with client.stream("x") as stream:
        next(stream)


def leave_loop(client: Client) -> None:
    for _ in client.stream("x"):
        break
    gc.collect()


def leave_by_error(client: Client) -> None:
    with pytest.raises(ZeroDivisionError), client.stream("x") as stream:
        assert 1 / (next(stream).token_ids[0] - 5)


def close_twice(client: Client) -> None:
    stream = client.stream("x")
    next(stream)
    stream.close()
    stream.close()
    assert list(stream) == []
    assert stream.token_ids == (5,)


@pytest.mark.parametrize("leave", [leave_with, leave_loop, leave_by_error, close_twice])
def test_leaving_a_stream_cancels_the_request_on_the_server(fake: FakeInference, leave: Any) -> None:
    fake.script = stalls(delta(0, 5))
    with Client(fake.endpoint) as client:
        leave(client)
        assert fake.cancelled.wait(WAIT_S)


def test_a_stream_closed_from_another_thread_just_ends(fake: FakeInference) -> None:
    fake.script = stalls(delta(0, 5))
    with Client(fake.endpoint) as client:
        stream = client.stream("x")
        next(stream)
        closer = threading.Thread(target=stream.close)
        closer.start()
        assert list(stream) == []
        closer.join()
        assert fake.cancelled.wait(WAIT_S)


async def test_leaving_an_async_stream_cancels_the_request(fake: FakeInference) -> None:
    fake.script = stalls(delta(0, 5))
    async with AsyncClient(fake.endpoint) as client:
        async with client.stream("x") as stream:
            await anext(stream)
        assert await asyncio.to_thread(fake.cancelled.wait, WAIT_S)


async def test_breaking_out_of_an_async_loop_cancels_the_request(fake: FakeInference) -> None:
    fake.script = stalls(delta(0, 5))
    async with AsyncClient(fake.endpoint) as client:
        async for _ in client.stream("x"):
            break
        gc.collect()
        assert await asyncio.to_thread(fake.cancelled.wait, WAIT_S)


async def test_cancelling_the_task_cancels_the_request_and_stays_a_cancellation(fake: FakeInference) -> None:
    fake.script = stalls(delta(0, 5))
    async with AsyncClient(fake.endpoint) as client:
        got_one = asyncio.Event()

        async def read() -> None:
            async for _ in client.stream("x"):
                got_one.set()

        task = asyncio.create_task(read())
        await got_one.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(fake.cancelled.wait, WAIT_S)


async def test_closing_the_client_under_a_reader_is_a_typed_error(fake: FakeInference) -> None:
    fake.script = stalls(delta(0, 5))
    client = AsyncClient(fake.endpoint)
    stream = client.stream("x")
    await anext(stream)
    async with asyncio.TaskGroup() as tasks:
        reader = tasks.create_task(capture(anext(stream)))
        await asyncio.sleep(0)
        await client.close()
    assert isinstance(reader.result(), errors.RequestCancelled)


async def test_an_async_stream_closed_by_another_task_just_ends(fake: FakeInference) -> None:
    fake.script = stalls(delta(0, 5))
    async with AsyncClient(fake.endpoint) as client:
        stream = client.stream("x")
        await anext(stream)
        async with asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(capture(anext(stream)))
            await asyncio.sleep(0)
            stream.close()
        assert isinstance(reader.result(), StopAsyncIteration)


async def capture(awaitable: Any) -> BaseException | None:
    try:
        await awaitable
    except Exception as error:
        return error
    return None


# -- failures ----------------------------------------------------------------------------------------------------

ALL_CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


@pytest.mark.parametrize("code", ALL_CODES, ids=lambda code: code.name)
async def test_every_status_is_a_typed_error_in_both_clients(fake: FakeInference, code: grpc.StatusCode) -> None:
    fake.script = aborts(code, "n: because", delta(0, 5, text="a"))
    fake.unary_abort = (code, "n: because")
    async with AsyncClient(fake.endpoint) as client:
        stream = client.stream("x")
        failures = [await capture(stream.result()), await capture(client.model_info())]
        assert (stream.token_ids, stream.text) == ((5,), "a")
    with Client(fake.endpoint) as blocking:
        for call in (lambda: blocking.generate("x"), blocking.model_info):
            with pytest.raises(errors.PdserveError) as caught:
                call()
            failures.append(caught.value)
    assert len(failures) == 4
    for failure in failures:
        assert isinstance(failure, errors.PdserveError)
        assert failure.code == code.name
        assert "because" in failure.message
        assert type(failure) is type(failures[0])


async def test_the_retry_delay_survives_the_wire(fake: FakeInference) -> None:
    trailing = (("grpc-retry-pushback-ms", "1500"),)
    fake.script = aborts(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", trailing=trailing)
    async with AsyncClient(fake.endpoint) as client:
        error = await capture(client.generate("x"))
    assert isinstance(error, errors.Overloaded)
    assert error.retry_after_s == 1.5


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    with Client("127.0.0.1:1", timeout_s=5) as blocking, pytest.raises(errors.Unavailable):
        blocking.generate("x")
    async with AsyncClient("127.0.0.1:1", timeout_s=5) as client:
        assert isinstance(await capture(client.health()), errors.Unavailable)


async def test_a_stalled_server_ends_in_deadline_exceeded(fake: FakeInference) -> None:
    fake.script = stalls(delta(0, 5))
    async with AsyncClient(fake.endpoint) as client:
        assert isinstance(await capture(client.generate("x", timeout_s=0.2)), errors.DeadlineExceeded)
    with Client(fake.endpoint) as blocking, pytest.raises(errors.DeadlineExceeded):
        blocking.generate("x", timeout_s=0.2)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(replies(delta(0, 1), delta(2, 1), finished(2)), id="gap"),
        pytest.param(replies(delta(0, 1)), id="no final event"),
        pytest.param(replies(b"\xff\xff\xff"), id="bytes that are no message"),
        pytest.param(replies(), id="nothing"),
    ],
)
async def test_malformed_answers_are_internal_errors(fake: FakeInference, script: Any) -> None:
    fake.script = script
    async with AsyncClient(fake.endpoint) as client:
        assert isinstance(await capture(client.generate("x")), errors.InternalError)
    with Client(fake.endpoint) as blocking, pytest.raises(errors.InternalError):
        blocking.generate("x")


async def test_a_gap_cancels_the_request_on_the_server(fake: FakeInference) -> None:
    fake.script = stalls(delta(0, 1), delta(5, 1))
    async with AsyncClient(fake.endpoint) as client:
        assert isinstance(await capture(client.generate("x")), errors.InternalError)
        assert await asyncio.to_thread(fake.cancelled.wait, WAIT_S)


@pytest.mark.parametrize("endpoint", ["", "host", "host:", "host:0", "host:99999", "http://host:80", "a:b", "::1:50"])
def test_an_endpoint_is_host_and_port(endpoint: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="endpoint"):
        Client(endpoint)


def test_an_ipv6_endpoint_is_taken() -> None:
    Client("[::1]:50051").close()


async def test_many_requests_share_one_client(fake: FakeInference) -> None:
    async with AsyncClient(fake.endpoint) as client, asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(client.generate("x", max_tokens=n)) for n in range(1, 51)]
    assert [len(task.result().token_ids) for task in running] == list(range(1, 51))
