"""`generate` as a user meets it: text, JSON, files of prompts, errors line by line."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from command_runner import batch, interrupt_main_thread, invoke, lines_of
from fake_inference import FakeInference, aborts, count_up, delta, finished, running, stalls

from pdserve.cluster.prompt_batch import MAX_LINE_BYTES
from pdserve.proto import inference_pb2 as pb


@pytest.fixture
def fake() -> Iterator[FakeInference]:
    with running(FakeInference()) as server:
        yield server


def test_a_single_prompt_is_printed_as_text(fake: FakeInference) -> None:
    result = invoke(fake, "generate", "hello", "--max-tokens", "3", "--temperature", "0", "--stop", "a", "--stop", "b")
    assert (result.exit_code, result.stdout) == (0, "w0 w1 w2 \n")
    request = fake.requests[0]
    assert (request.prompt, list(request.stopping.stop)) == ("hello", ["a", "b"])
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_p")
    assert not request.stopping.HasField("ignore_eos")


def test_json_prints_one_object(fake: FakeInference) -> None:
    (answer,) = lines_of(invoke(fake, "generate", "hello", "--json", "--max-tokens", "2"))
    assert answer["token_ids"] == [10, 11]
    assert answer["finish_reason"] == "length"
    assert answer["timings"]["transfer_ms"] == 3


def test_a_failed_single_prompt_is_one_line_and_exit_1(fake: FakeInference) -> None:
    fake.script = aborts(grpc.StatusCode.UNAVAILABLE, "no decode worker")
    result = invoke(fake, "generate", "hello")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "error: no decode worker\n")


def test_a_refused_prompt_is_exit_2(fake: FakeInference) -> None:
    fake.script = aborts(grpc.StatusCode.INVALID_ARGUMENT, "max_tokens: must be positive")
    assert invoke(fake, "generate", "hello").exit_code == 2


@pytest.mark.parametrize("args", [[], ["hello", "--prompts", "x"], ["--prompts", "/no/such/file"], ["--prompts", "/"]])
def test_no_input_two_inputs_or_a_missing_file_are_exit_2(fake: FakeInference, args: list[str]) -> None:
    result = invoke(fake, "generate", *args)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def test_a_bad_endpoint_or_an_unknown_cluster_is_exit_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert invoke(None, "generate", "x", "--endpoint", "nonsense").exit_code == 2
    result = invoke(None, "generate", "x", "--name", "nobody")
    assert result.exit_code == 2
    assert "nobody" in result.stderr


def test_a_router_that_is_not_there_is_exit_1() -> None:
    result = invoke(None, "generate", "x", "--endpoint", "127.0.0.1:1", "--timeout-s", "5")
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr


async def later_first(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse | bytes]:
    """Answers in the reverse of the order asked: request n waits for n + 1; the last waits for nobody."""
    number = int(request.prompt)
    if number < 7:
        await asyncio.wait_for(answered[number + 1].wait(), 10)
    yield delta(0, number)
    yield finished(1)
    answered[number].set()


answered: dict[int, asyncio.Event] = {}


def test_a_file_of_prompts_is_answered_in_input_order(fake: FakeInference, tmp_path: Path) -> None:
    answered.update({number: asyncio.Event() for number in range(8)})
    fake.script = later_first
    lines = "".join(json.dumps({"prompt": str(number)}) + "\n" for number in range(8))
    result = batch(fake, tmp_path, "--concurrency", "8", lines=lines)
    assert [answer["token_ids"] for answer in lines_of(result)] == [[number] for number in range(8)]
    assert result.exit_code == 0


def test_concurrency_is_bounded_however_long_the_input(fake: FakeInference, tmp_path: Path) -> None:
    stdin = '{"prompt": "x", "max_tokens": 1}\n' * 200
    result = batch(fake, tmp_path, "--concurrency", "3", lines=stdin)
    assert len(lines_of(result)) == 200
    assert fake.max_running <= 3


def test_each_line_may_have_its_own_input_and_options(fake: FakeInference, tmp_path: Path) -> None:
    lines = [
        {"prompt": "text", "max_tokens": 1, "logit_bias": {"5": -2.0}},
        {"prompt_token_ids": [1, 2, 3]},
        {"messages": [{"role": "user", "content": "hi"}], "request_id": "mine"},
    ]
    stdin = "\ufeff" + "\r\n\r\n".join(json.dumps(line) for line in lines)
    result = batch(fake, tmp_path, "--max-tokens", "2", "--concurrency", "1", lines=stdin)
    assert [len(answer["token_ids"]) for answer in lines_of(result)] == [1, 2, 2]
    assert lines_of(result)[2]["request_id"] == "mine"
    assert [request.WhichOneof("input") for request in fake.requests] == ["prompt", "token_ids", "chat"]
    assert dict(fake.requests[0].sampling.logit_bias) == {5: -2.0}


def test_a_bad_line_is_its_own_answer_and_the_others_go_on(fake: FakeInference, tmp_path: Path) -> None:
    bad = [
        "{oops",
        "[1]",
        "{}",
        '{"prompt": "a", "prompt_token_ids": [1]}',
        '{"prompt": 5}',
        '{"prompt_token_ids": "12"}',
        '{"prompt": "a", "max_new_tokens": 3}',
        '{"prompt": "a", "temperature": "hot"}',
        '{"prompt": "a", "logit_bias": {"x": 1}}',
        '{"prompt": "a", "timeout_s": -1}',
        "[" * 100_000,
        '{"prompt": "' + "a" * MAX_LINE_BYTES + '"}',
        '{"prompt_token_ids": [1, 99999999999999999999999]}',
    ]
    good = '{"prompt": "fine", "max_tokens": 1}'
    result = batch(fake, tmp_path, lines="\n".join([good, *bad, good]))
    answers = lines_of(result)
    assert len(answers) == len(bad) + 2
    assert [answers[0]["text"], answers[-1]["text"]] == ["w0 ", "w0 "]
    for answer in answers[1:-1]:
        assert answer["error"]["code"] == "INVALID_ARGUMENT"
        assert answer["error"]["field"]
    assert result.exit_code == 1
    assert len(fake.requests) == 2


def test_a_failed_request_is_its_lines_answer(fake: FakeInference, tmp_path: Path) -> None:
    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse | bytes]:
        if request.prompt == "bad":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", (("grpc-retry-pushback-ms", "500"),))
        async for response in count_up(request, context):
            yield response

    fake.script = script
    stdin = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("a", "bad", "c"))
    answers = lines_of(batch(fake, tmp_path, lines=stdin))
    expected = {"code": "RESOURCE_EXHAUSTED", "message": "full", "retryable": True, "retry_after_s": 0.5}
    assert answers[1]["error"] == expected
    assert [("text" in answer) for answer in answers] == [True, False, True]


def test_ctrl_c_stops_a_batch_and_its_requests(fake: FakeInference, tmp_path: Path) -> None:
    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse | bytes]:
        interrupt_main_thread()
        async for response in stalls()(request, context):
            yield response

    fake.script = script
    result = batch(fake, tmp_path, "--concurrency", "1", lines='{"prompt": "x"}\n')
    assert (result.exit_code, result.stdout) == (130, "")
    assert fake.cancelled.wait(10)


def test_ctrl_c_stops_a_single_prompt_and_its_request(fake: FakeInference) -> None:
    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse | bytes]:
        interrupt_main_thread()
        async for response in stalls()(request, context):
            yield response

    fake.script = script
    result = invoke(fake, "generate", "hello")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert fake.cancelled.wait(10)


def test_ctrl_c_while_waiting_for_more_input_leaves(fake: FakeInference) -> None:
    """A pipe that stays open: the command is blocked in a read, with one answer printed."""
    command = [sys.executable, "-m", "pdserve.cluster.cli", "generate", "--prompts", "-", "--endpoint", fake.endpoint]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b'{"prompt": "x", "max_tokens": 1}\n')
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["text"] == "w0 "
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert process.stderr.read() == b"interrupted\n"


def test_a_reader_that_leaves_early_ends_the_batch(fake: FakeInference) -> None:
    command = [sys.executable, "-m", "pdserve.cluster.cli", "generate", "--prompts", "-", "--endpoint", fake.endpoint]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write(b'{"prompt": "x", "max_tokens": 1}\n' * 3)
        process.stdin.close()
        assert process.wait(30) == 1
        assert process.stderr.read() == b""
