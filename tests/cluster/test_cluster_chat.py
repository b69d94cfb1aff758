"""`chat` as a user meets it: memory, Ctrl-C, failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
import typer
from command_runner import interrupt_main_thread, invoke
from fake_inference import FakeInference, aborts, delta, finished, running

from pdserve.client import AsyncClient
from pdserve.cluster.chat_command import Conversation
from pdserve.proto import inference_pb2 as pb


@pytest.fixture
def fake() -> Iterator[FakeInference]:
    with running(FakeInference()) as server:
        yield server


def messages(request: pb.GenerateRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.chat.messages]


def converse(fake: FakeInference) -> None:
    async def connect() -> AsyncClient:
        return AsyncClient(fake.endpoint)

    with asyncio.Runner() as runner:
        client = runner.run(connect())
        Conversation(runner, client, {}, None, interactive=True).run()
        runner.run(client.close())


def test_a_piped_chat_remembers_what_was_said(fake: FakeInference) -> None:
    result = invoke(fake, "chat", "--system", "be brief", "--max-tokens", "1", stdin="one\n\ntwo\n")
    assert (result.exit_code, result.stdout) == (0, "w0 \nw0 \n")
    assert messages(fake.requests[1]) == [
        ("system", "be brief"),
        ("user", "one"),
        ("assistant", "w0 "),
        ("user", "two"),
    ]


def test_a_piped_chat_ends_at_its_first_failure(fake: FakeInference) -> None:
    fake.script = aborts(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
    result = invoke(fake, "chat", stdin="one\ntwo\n")
    assert result.exit_code == 1
    assert result.stderr == "error: full (try again in 1 s)\n"
    assert len(fake.requests) == 1


def test_ctrl_c_cancels_the_answer_and_the_conversation_goes_on(
    fake: FakeInference, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse | bytes]:
        yield delta(0, 5, text="partial")
        if len(fake.requests) == 1:
            await asyncio.to_thread(printed.wait, 10)
            interrupt_main_thread()
            await asyncio.Event().wait()
        yield finished(1)

    printed = threading.Event()
    echo = typer.echo

    def watched_echo(text: str = "", **options: Any) -> None:
        echo(text, **options)
        if text == "partial":
            printed.set()

    turns = iter(["first", "second"])

    def read(prompt: str) -> str:
        try:
            return next(turns)
        except StopIteration:
            raise EOFError from None

    fake.script = script
    monkeypatch.setattr("pdserve.cluster.chat_command.typer.echo", watched_echo)
    monkeypatch.setattr("builtins.input", read)
    converse(fake)
    assert fake.cancelled.wait(10)
    assert messages(fake.requests[1]) == [("user", "first"), ("assistant", "partial"), ("user", "second")]
    assert "cancelled" in capsys.readouterr().err


def test_an_interactive_chat_survives_a_failed_turn_and_forgets_it(
    fake: FakeInference, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse | bytes]:
        if len(fake.requests) == 1:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "down")
        yield finished(0)

    fake.script = script
    turns: list[str | type[BaseException]] = ["first", KeyboardInterrupt, "second", EOFError]

    def read(prompt: str) -> str:
        turn = turns.pop(0)
        if isinstance(turn, str):
            return turn
        raise turn

    monkeypatch.setattr("builtins.input", read)
    converse(fake)
    assert messages(fake.requests[1]) == [("user", "second")]
    assert "error: down" in capsys.readouterr().err
