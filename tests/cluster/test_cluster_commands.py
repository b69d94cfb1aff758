"""The seam of errors and `bench` as a user meets them: output, errors in one line, exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import typer
from command_runner import application, invoke, lines_of
from fake_inference import FakeInference, aborts, delta, replies, running
from typer.testing import CliRunner

from pdserve.cluster.errors_seam import error_line
from pdserve.proto.errors import ConfigError, InternalError, InvalidRequest, ModelError, NotFound, Overloaded


@pytest.fixture
def fake() -> Iterator[FakeInference]:
    with running(FakeInference()) as server:
        yield server


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
def test_every_error_is_one_line_and_a_code(error: BaseException, code: int, line: str) -> None:
    def fails() -> None:
        raise error

    result = CliRunner().invoke(application(fails), ["fails"])
    assert (result.exit_code, result.stderr.strip(), result.stdout) == (code, line, "")


def test_usage_errors_and_exits_pass_through_the_seam() -> None:
    def leaves() -> None:
        raise typer.Exit(3)

    assert CliRunner().invoke(application(leaves), ["leaves"]).exit_code == 3
    assert invoke(None, "bench", "--num-prompts", "0").exit_code == 2
    assert invoke(None, "generate", "--no-such-option").exit_code == 2


def test_an_error_without_a_message_still_says_its_name() -> None:
    assert error_line(ZeroDivisionError()) == "unexpected ZeroDivisionError:"
    assert error_line(OSError()) == "OSError"


# -- bench -------------------------------------------------------------------------------------------------------

FAST = ["--request-rate", "500", "--num-prompts", "20", "--input-len", "8", "--output-len", "3"]


def test_bench_json_is_one_object_of_what_was_sent(fake: FakeInference) -> None:
    result = invoke(fake, "bench", "--json", *FAST)
    assert result.exit_code == 0, result.output
    (report,) = lines_of(result)
    assert (report["num_requests"], report["num_completed"], report["errors"]) == (20, 20, {})
    assert (report["prompt_tokens"], report["output_tokens"]) == (160, 60)
    assert set(report["ttft"]) == {"p50_ms", "p90_ms", "p99_ms", "mean_ms", "max_ms"}
    assert report["phase_means_ms"] == {"queue": 1, "prefill": 2, "transfer": 3, "decode": 4}
    assert all(len(request.token_ids.ids) == 8 and request.stopping.ignore_eos for request in fake.requests)


def test_bench_prints_tables_for_people(fake: FakeInference) -> None:
    result = invoke(fake, "bench", *FAST)
    assert result.exit_code == 0
    for word in ("TTFT", "TPOT", "ITL", "E2E", "goodput", "p99", "mean transfer"):
        assert word in result.stdout
    assert result.stderr == ""


def test_bench_replays_a_trace(fake: FakeInference, tmp_path: Path) -> None:
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
def test_bench_refuses_a_bad_plan_before_it_sends_anything(fake: FakeInference, args: list[str]) -> None:
    result = invoke(fake, "bench", *args)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert fake.requests == []


def test_a_bad_line_late_in_a_trace_is_found_before_the_load(fake: FakeInference, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("timestamp,input_tokens,output_tokens\n0,5,2\n1,x,2\n")
    result = invoke(fake, "bench", "--trace", str(path))
    assert result.exit_code == 2
    assert "line 3" in result.stderr
    assert fake.requests == []


def test_bench_counts_errors_by_code_and_fails_when_nothing_completed(fake: FakeInference) -> None:
    fake.script = aborts(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
    result = invoke(fake, "bench", "--json", *FAST)
    assert result.exit_code == 1
    assert lines_of(result)[0]["errors"] == {"RESOURCE_EXHAUSTED": 20}
    fake.script = replies(delta(0, 1), delta(2, 1))
    assert lines_of(invoke(fake, "bench", "--json", *FAST))[0]["errors"] == {"INTERNAL": 20}


def test_bench_against_nothing_is_one_line_and_exit_1() -> None:
    result = invoke(None, "bench", "--endpoint", "127.0.0.1:1", "--timeout-s", "5")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
