"""`generate`, `chat` and `bench` as a user meets them: output, errors in one line, exit codes."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
from fake_inference import FakeInference, aborts, count_up, delta, finished, replies, running, stalls
from typer.testing import CliRunner, Result

from pdserve.client import AsyncClient
from pdserve.cluster import chat_command
from pdserve.cluster.bench_command import bench
from pdserve.cluster.chat_command import Conversation, chat
from pdserve.cluster.errors_seam import error_line, one_line_errors
from pdserve.cluster.generate_command import generate
from pdserve.cluster.prompt_batch import MAX_LINE_BYTES
from pdserve.proto import inference_pb2 as pb
from pdserve.proto.errors import ConfigError, InternalError, InvalidRequest, ModelError, NotFound, Overloaded


@pytest.fixture
def fake() -> Iterator[FakeInference]:
    with running(FakeInference()) as server:
        yield server


def application(*commands: Callable[..., None]) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    for command in commands:
        app.command()(one_line_errors(command))
    return app


APP = application(generate, chat, bench)


def invoke(fake: FakeInference | None, *args: str, stdin: str | bytes = "") -> Result:
    where = ["--endpoint", fake.endpoint] if fake else []
    return CliRunner().invoke(APP, [args[0], *where, *args[1:]], input=stdin)


def batch(fake: FakeInference, folder: Path, *args: str, lines: str) -> Result:
    path = folder / "prompts.jsonl"
    path.write_bytes(lines.encode())
    return invoke(fake, "generate", "--prompts", str(path), *args)


def lines_of(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


# -- the seam ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("router.port: bad"), 2, "error: router.port: bad"),
        (ModelError("no such folder"), 2, "error: no such folder"),
        (InvalidRequest("top_p", "too big"), 2, "error: top_p: too big"),
        (NotFound("no such model"), 2, "error: no such model"),
        (Overloaded("full", 2.5), 1, "error: full (try again in 2.5 s)"),
        (InternalError("id 7"), 1, "error: id 7"),
        (InternalError("two\n  lines"), 1, "error: two lines"),
        (FileNotFoundError(2, "No such file", "x.yaml"), 1, "error: x.yaml: No such file"),
        (ZeroDivisionError("oh"), 1, "error: unexpected ZeroDivisionError: oh"),
        (ExceptionGroup("g", [ExceptionGroup("h", [ConfigError("deep")])]), 2, "error: deep"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_error_is_one_line_and_a_code(error: BaseException, code: int, line: str):
    def fails() -> None:
        raise error

    result = CliRunner().invoke(application(fails), ["fails"])
    assert (result.exit_code, result.stderr.strip(), result.stdout) == (code, line, "")


def test_usage_errors_and_exits_pass_through_the_seam():
    def leaves() -> None:
        raise typer.Exit(3)

    assert CliRunner().invoke(application(leaves), ["leaves"]).exit_code == 3
    assert invoke(None, "bench", "--num-prompts", "0").exit_code == 2
    assert invoke(None, "generate", "--no-such-option").exit_code == 2


def test_an_error_without_a_message_still_says_its_name():
    assert error_line(ZeroDivisionError()) == "unexpected ZeroDivisionError:"
    assert error_line(OSError()) == "OSError"


# -- generate ----------------------------------------------------------------------------------------------------


def test_a_single_prompt_is_printed_as_text(fake: FakeInference):
    result = invoke(fake, "generate", "hello", "--max-tokens", "3", "--temperature", "0", "--stop", "a", "--stop", "b")
    assert (result.exit_code, result.stdout) == (0, "w0 w1 w2 \n")
    request = fake.requests[0]
    assert (request.prompt, list(request.stopping.stop)) == ("hello", ["a", "b"])
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_p")
    assert not request.stopping.HasField("ignore_eos")


def test_json_prints_one_object(fake: FakeInference):
    (answer,) = lines_of(invoke(fake, "generate", "hello", "--json", "--max-tokens", "2"))
    assert answer["token_ids"] == [10, 11]
    assert answer["finish_reason"] == "length"
    assert answer["timings"]["transfer_ms"] == 3


def test_a_failed_single_prompt_is_one_line_and_exit_1(fake: FakeInference):
    fake.script = aborts(grpc.StatusCode.UNAVAILABLE, "no decode worker")
    result = invoke(fake, "generate", "hello")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "error: no decode worker\n")


def test_a_refused_prompt_is_exit_2(fake: FakeInference):
    fake.script = aborts(grpc.StatusCode.INVALID_ARGUMENT, "max_tokens: must be positive")
    assert invoke(fake, "generate", "hello").exit_code == 2


@pytest.mark.parametrize("args", [[], ["hello", "--prompts", "x"], ["--prompts", "/no/such/file"], ["--prompts", "/"]])
def test_no_input_two_inputs_or_a_missing_file_are_exit_2(fake: FakeInference, args: list[str]):
    result = invoke(fake, "generate", *args)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def test_a_bad_endpoint_or_an_unknown_cluster_is_exit_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert invoke(None, "generate", "x", "--endpoint", "nonsense").exit_code == 2
    result = invoke(None, "generate", "x", "--name", "nobody")
    assert result.exit_code == 2
    assert "nobody" in result.stderr


def test_a_router_that_is_not_there_is_exit_1():
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


def test_a_file_of_prompts_is_answered_in_input_order(fake: FakeInference, tmp_path: Path):
    answered.update({number: asyncio.Event() for number in range(8)})
    fake.script = later_first
    lines = "".join(json.dumps({"prompt": str(number)}) + "\n" for number in range(8))
    result = batch(fake, tmp_path, "--concurrency", "8", lines=lines)
    assert [answer["token_ids"] for answer in lines_of(result)] == [[number] for number in range(8)]
    assert result.exit_code == 0


def test_concurrency_is_bounded_however_long_the_input(fake: FakeInference, tmp_path: Path):
    stdin = '{"prompt": "x", "max_tokens": 1}\n' * 200
    result = batch(fake, tmp_path, "--concurrency", "3", lines=stdin)
    assert len(lines_of(result)) == 200
    assert fake.max_running <= 3


def test_each_line_may_have_its_own_input_and_options(fake: FakeInference, tmp_path: Path):
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


def test_a_bad_line_is_its_own_answer_and_the_others_go_on(fake: FakeInference, tmp_path: Path):
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


def test_a_failed_request_is_its_lines_answer(fake: FakeInference, tmp_path: Path):
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


def interrupt_main_thread() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def test_ctrl_c_stops_a_batch_and_its_requests(fake: FakeInference, tmp_path: Path):
    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse | bytes]:
        interrupt_main_thread()
        async for response in stalls()(request, context):
            yield response

    fake.script = script
    result = batch(fake, tmp_path, "--concurrency", "1", lines='{"prompt": "x"}\n')
    assert (result.exit_code, result.stdout) == (130, "")
    assert fake.cancelled.wait(10)


def test_ctrl_c_stops_a_single_prompt_and_its_request(fake: FakeInference):
    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse | bytes]:
        interrupt_main_thread()
        async for response in stalls()(request, context):
            yield response

    fake.script = script
    result = invoke(fake, "generate", "hello")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert fake.cancelled.wait(10)


def test_ctrl_c_while_waiting_for_more_input_leaves(fake: FakeInference):
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


def test_a_reader_that_leaves_early_ends_the_batch(fake: FakeInference):
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


# -- chat --------------------------------------------------------------------------------------------------------


def messages(request: pb.GenerateRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.chat.messages]


def converse(fake: FakeInference) -> None:
    async def connect() -> AsyncClient:
        return AsyncClient(fake.endpoint)

    with asyncio.Runner() as runner:
        client = runner.run(connect())
        Conversation(runner, client, {}, None, interactive=True).run()
        runner.run(client.close())


def test_a_piped_chat_remembers_what_was_said(fake: FakeInference):
    result = invoke(fake, "chat", "--system", "be brief", "--max-tokens", "1", stdin="one\n\ntwo\n")
    assert (result.exit_code, result.stdout) == (0, "w0 \nw0 \n")
    assert messages(fake.requests[1]) == [
        ("system", "be brief"),
        ("user", "one"),
        ("assistant", "w0 "),
        ("user", "two"),
    ]


def test_a_piped_chat_ends_at_its_first_failure(fake: FakeInference):
    fake.script = aborts(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
    result = invoke(fake, "chat", stdin="one\ntwo\n")
    assert result.exit_code == 1
    assert result.stderr == "error: full (try again in 1 s)\n"
    assert len(fake.requests) == 1


def test_ctrl_c_cancels_the_answer_and_the_conversation_goes_on(
    fake: FakeInference, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
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
    monkeypatch.setattr(chat_command.typer, "echo", watched_echo)
    monkeypatch.setattr("builtins.input", read)
    converse(fake)
    assert fake.cancelled.wait(10)
    assert messages(fake.requests[1]) == [("user", "first"), ("assistant", "partial"), ("user", "second")]
    assert "cancelled" in capsys.readouterr().err


def test_an_interactive_chat_survives_a_failed_turn_and_forgets_it(
    fake: FakeInference, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
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


# -- bench -------------------------------------------------------------------------------------------------------

FAST = ["--request-rate", "500", "--num-prompts", "20", "--input-len", "8", "--output-len", "3"]


def test_bench_json_is_one_object_of_what_was_sent(fake: FakeInference):
    result = invoke(fake, "bench", "--json", *FAST)
    assert result.exit_code == 0, result.output
    (report,) = lines_of(result)
    assert (report["num_requests"], report["num_completed"], report["errors"]) == (20, 20, {})
    assert (report["prompt_tokens"], report["output_tokens"]) == (160, 60)
    assert set(report["ttft"]) == {"p50_ms", "p90_ms", "p99_ms", "mean_ms", "max_ms"}
    assert report["phase_means_ms"] == {"queue": 1, "prefill": 2, "transfer": 3, "decode": 4}
    assert all(len(request.token_ids.ids) == 8 and request.stopping.ignore_eos for request in fake.requests)


def test_bench_prints_tables_for_people(fake: FakeInference):
    result = invoke(fake, "bench", *FAST)
    assert result.exit_code == 0
    for word in ("TTFT", "TPOT", "ITL", "E2E", "goodput", "p99", "mean transfer"):
        assert word in result.stdout
    assert result.stderr == ""


def test_bench_replays_a_trace(fake: FakeInference, tmp_path: Path):
    path = tmp_path / "trace.csv"
    path.write_text("timestamp,input_tokens,output_tokens\n0,5,2\n10,6,0\n20,7,3\n30,8,1\n")
    args = ["--trace", str(path), "--rate-scale", "1000", "--window", "0:25", "--json"]
    (report,) = lines_of(invoke(fake, "bench", *args))
    assert sorted(len(request.token_ids.ids) for request in fake.requests) == [5, 7]
    assert (report["num_requests"], report["num_skipped"], report["output_tokens"]) == (2, 1, 5)


@pytest.mark.parametrize(
    "args",
    [
        ["--workload", "nonsense"],
        ["--request-rate", "0"],
        ["--trace", "/no/such/trace"],
        ["--window", "9:5", "--trace", "x"],
        ["--trace", "x", "--request-rate", "3"],
    ],
)
def test_bench_refuses_a_bad_plan_before_it_sends_anything(fake: FakeInference, args: list[str]):
    result = invoke(fake, "bench", *args)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert fake.requests == []


def test_a_bad_line_late_in_a_trace_is_found_before_the_load(fake: FakeInference, tmp_path: Path):
    path = tmp_path / "trace.csv"
    path.write_text("timestamp,input_tokens,output_tokens\n0,5,2\n1,x,2\n")
    result = invoke(fake, "bench", "--trace", str(path))
    assert result.exit_code == 2
    assert "line 3" in result.stderr
    assert fake.requests == []


def test_bench_counts_errors_by_code_and_fails_when_nothing_completed(fake: FakeInference):
    fake.script = aborts(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
    result = invoke(fake, "bench", "--json", *FAST)
    assert result.exit_code == 1
    assert lines_of(result)[0]["errors"] == {"RESOURCE_EXHAUSTED": 20}
    fake.script = replies(delta(0, 1), delta(2, 1))
    assert lines_of(invoke(fake, "bench", "--json", *FAST))[0]["errors"] == {"INTERNAL": 20}


def test_bench_against_nothing_is_one_line_and_exit_1():
    result = invoke(None, "bench", "--endpoint", "127.0.0.1:1", "--timeout-s", "5")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
