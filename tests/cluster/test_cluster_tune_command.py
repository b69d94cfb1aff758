"""`pdserve tune` as its users meet it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_runner import application
from planner_setups import make_profile
from typer.testing import CliRunner, Result

from pdserve.cluster.config import load_config
from pdserve.cluster.planner.profile import dump
from pdserve.cluster.simulate_command import simulate
from pdserve.cluster.tune_command import tune
from pdserve.proto.types import Role

APP = application(tune, simulate)
TARGETS = ("--ttft-ms", "200", "--tpot-ms", "30")
FEW = (
    "--effort",
    "quick",
    "--max-requests",
    "12000",
    "--splits",
    "1P1D,2M",
    "--chunk-sizes",
    "512",
    "--max-num-seqs",
    "64",
)
SMALL = (*FEW, "--policies", "least_loaded", "--processes", "1", "--workload", "short", "--gpus", "2", *TARGETS)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    path.write_text(dump(make_profile()))
    return path


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(APP, ["tune", *arguments])


def refused(profile: Path, *arguments: str) -> str:
    """The one line of an error."""
    done = invoke("--profile", str(profile), *arguments)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """One question, for several tests to look at the answer."""
    folder = tmp_path_factory.mktemp("tune")
    path = folder / "profile.json"
    path.write_text(dump(make_profile(price_per_gpu_hour=2.0)))
    config = folder / "best.yaml"
    done = invoke("--profile", str(path), *SMALL, "--json", "--write-config", str(config), "--model", "/models/mine")
    assert done.exit_code == 0, done.output
    return done, config


def test_the_answer_as_json_has_everything_that_was_found(answered: tuple[Result, Path]) -> None:
    found: dict[str, Any] = json.loads(answered[0].stdout)
    assert {one["setup"]["name"] for one in found["findings"]} == {"1P1D", "2M"}
    best = found["findings"][found["recommended"]]
    goodput = best["goodput"]
    assert goodput["low"] <= goodput["rate"] <= goodput["high"]
    assert best["goodput_per_gpu"] == pytest.approx(goodput["rate"] / 2)
    assert best["cost"]["per_hour"] == 4.0
    assert len(best["picture"]["ttft_ms"]) == 101
    assert found["verdict"].startswith(("Split", "Do not split"))
    assert any("predicted" in line for line in found["warnings"])
    assert any("nobody measured mixed steps" in line for line in found["warnings"])
    assert found["num_requests"] <= 12_000
    assert found["question"]["targets"][0] == {
        "name": "all",
        "ttft_ms": 200.0,
        "tpot_ms": 30.0,
        "share": 0.9,
    }


def test_the_written_configuration_is_one_for_pdserve_up_and_can_be_simulated(answered: tuple[Result, Path]) -> None:
    done, path = answered
    found = json.loads(done.stdout)
    best = found["findings"][found["recommended"]]["setup"]
    config = load_config(path, [])
    assert config.model == "/models/mine"
    assert config.router.policy == best["policy"]
    assert config.router.slo.ttft_ms == 200.0
    for role in Role:
        assert config.replicas(role) == best["num_workers"].get(role, 0)
        if config.replicas(role):
            assert config.pool(role).num_gpus == 1.0
            assert config.engine_for(role).max_num_seqs == best["max_num_seqs"][role]
            assert config.engine_for(role).max_num_batched_tokens == best["max_num_batched_tokens"][role]
    profile = path.parent / "profile.json"
    simulated = CliRunner().invoke(
        APP,
        [
            "simulate",
            "--profile",
            str(profile),
            "-c",
            str(path),
            "--workload",
            "short",
            "--num-prompts",
            "50",
            "--json",
        ],
    )
    assert simulated.exit_code == 0, simulated.output
    assert json.loads(simulated.stdout)["num_completed"] == 50


def test_people_get_a_table_a_verdict_its_reasons_and_what_to_be_careful_about(profile: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    done = invoke("--profile", str(profile), *SMALL, "--html", str(report))
    assert done.exit_code == 0, done.output
    for words in ("1P1D", "2M", "per GPU", "<- best", "plit", "warning: made up: its step times are predicted"):
        assert words in done.stdout, done.stdout
    assert "<html" in report.read_text().lower()


def test_an_answer_does_not_depend_on_how_many_processes_found_it(profile: Path, answered: tuple[Result, Path]) -> None:
    alone = json.loads(answered[0].stdout)
    several = [argument if argument != "1" else "2" for argument in SMALL]
    done = invoke("--profile", str(answered[1].parent / "profile.json"), *several, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found.pop("took_s") > 0
    alone.pop("took_s")
    assert found == alone


def test_targets_that_nothing_can_hold_say_which_fails_and_what_would_do(profile: Path, tmp_path: Path) -> None:
    config = tmp_path / "none.yaml"
    few = [argument for argument in SMALL if argument not in TARGETS]
    hard = ("--ttft-ms", "5", "--tpot-ms", "30")
    done = invoke("--profile", str(profile), *few, *hard, "--json", "--write-config", str(config))
    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout)
    assert "TTFT fails; the closest that can be met: TTFT" in found["verdict"]
    assert found["recommended"] is None
    assert not config.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "0", *TARGETS], "--gpus: 0 leaves nothing to plan with"),
        ([*TARGETS], "give --gpus or --price-per-hour"),
        (["--gpus", "2"], "no targets: give --ttft-ms and --tpot-ms"),
        (["--gpus", "2", "--ttft-ms", "5"], "give both"),
        (["--gpus", "2", "--ttft-ms", "0", "--tpot-ms", "5"], "ttft 0 is not a number of milliseconds"),
        (["--gpus", "2", "--ttft-ms", "5", "--tpot-ms", "1e308"], "tpot 1e+308 is not a number of milliseconds"),
        (["--gpus", "2", *TARGETS, "--attainment", "90"], "share 90 is not above 0 and at most 0.999"),
        (["--gpus", "2", *TARGETS, "--attainment", "0.9999999"], "takes more requests to see than are simulated"),
        (
            ["--gpus", "2", *TARGETS, "--write-config", "/nowhere/best.yaml"],
            "--write-config: /nowhere/best.yaml:",
        ),
        (["--gpus", "2", *TARGETS, "--slo", "ghost:ttft=1,tpot=1"], "no request is of the class ghost"),
        (["--gpus", "2", "--slo", "chat:ttft=5"], "ttft and tpot are both needed"),
        (["--gpus", "2", "--slo", "chat:ttft=5,tpot=x"], "tpot: 'x' is not a number"),
        (["--gpus", "2", "--slo", "chat:ttft=5,tpot=5,weight=2"], "'weight=2' is not known"),
        (["--gpus", "2", "--slo", "chat:ttft=5,tpot=5", "--slo", "code:ttft=5,tpot=5"], "requests of no class"),
        (["--gpus", "2", *TARGETS, "--workload", "nonsense"], "is neither a preset"),
        (["--gpus", "2", *TARGETS, "--workload", "trace:/no/such.csv"], "/no/such.csv"),
        (["--gpus", "2", *TARGETS, "--splits", "2P6D"], "2P6D needs more than there is"),
        (["--gpus", "2", *TARGETS, "--splits", "six"], "is no split"),
        (["--gpus", "2", *TARGETS, "--effort", "none"], "--effort: 'none' is none of"),
        (["--gpus", "2", *TARGETS, "--chunk-sizes", "many"], "--chunk-sizes"),
        (["--price-per-hour", "9", *TARGETS], "price_per_gpu_hour: is not known"),
        (["--gpus", "2", *TARGETS, "--html", "/no/such/folder/x.html"], "--html"),
    ],
)
def test_wrong_use_is_one_line_and_exit_status_2(profile: Path, arguments: list[str], words: str) -> None:
    assert words in refused(profile, *arguments)


def test_profiles_of_different_models_are_refused(profile: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(dump(make_profile(name="other", model="another", tensor_parallel_size=2)))
    words = refused(profile, "--profile", str(other), "--gpus", "2", *TARGETS)
    assert "of one model" in words


@pytest.mark.parametrize(
    "text", ["", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "a,b\nc,d\n"], ids=["empty", "head", "odd"]
)
def test_a_trace_that_is_empty_or_broken_is_refused_by_name(profile: Path, tmp_path: Path, text: str) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(text)
    assert "trace.csv" in refused(profile, "--gpus", "2", *TARGETS, "--workload", f"trace:{trace}")


def test_a_worker_that_needs_more_gpus_than_there_are_is_said(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    path.write_text(dump(make_profile(num_gpus=8, tensor_parallel_size=8)))
    assert "a worker needs 8 GPUs" in refused(path, "--gpus", "4", *TARGETS)


def test_a_class_that_comes_too_rarely_to_be_seen_first_is_missed_all_the_same(profile: Path) -> None:
    workload = "synthetic?prompt=64&output=8&rate=1&classes=chat:0.9999999,batch:1e-7"
    slos = ("--slo", "chat:ttft=500,tpot=50", "--slo", "other:ttft=500,tpot=50")
    assert "requests of the class batch" in refused(profile, "--gpus", "2", "--workload", workload, *slos)


def test_prompts_that_no_worker_can_hold_are_cut_and_this_is_said(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text(dump(make_profile(kv_capacity_tokens=4_000)))
    options = [word if word != "short" else "synthetic?prompt=6000&output=20&rate=1" for word in SMALL]
    loose = [*options, "--ttft-ms", "2000"]
    done = invoke("--profile", str(path), *loose, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["findings"][0]["goodput"]["rate"] > 0
    assert any("100.0% of the requests are longer than what a worker can hold" in line for line in found["warnings"])


def test_rows_name_profiles_only_where_they_differ_in_hardware(tmp_path: Path) -> None:
    """Of one profile for each tensor-parallel degree the degree says which it is."""
    paths = {}
    kinds: dict[str, dict[str, Any]] = {
        "the first": {},
        "of two": {"tensor_parallel_size": 2, "num_gpus": 2},
        "of others": {"hardware": "other"},
    }
    for name, changes in kinds.items():
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(dump(make_profile(name=name, **changes)))
    few = [{"1P1D,2M": "1P1D", "2": "4"}.get(word, word) for word in SMALL]
    degrees = invoke("--profile", str(paths["the first"]), "--profile", str(paths["of two"]), *few)
    assert degrees.exit_code == 0, degrees.output
    table = degrees.stdout.partition("plit")[0]
    assert "the first" not in table
    sides = ("--profile", f"prefill={paths['the first']}", "--profile", f"decode={paths['of others']}")
    named = invoke(*sides, *few)
    assert named.exit_code == 0, named.output
    assert "1P1D the first of others" in named.stdout


@pytest.mark.slow
def test_long_answers_need_more_decode_workers_than_long_prompts(profile: Path) -> None:
    """With the real simulator."""
    num_decode = {}
    for kind, lengths in {"answers": "prompt=64&output=400", "prompts": "prompt=1500&output=12"}.items():
        done = invoke(
            *("--profile", str(profile), "--gpus", "4", "--splits", "1P3D,2P2D,3P1D", "--max-requests", "12000"),
            *("--workload", f"synthetic?{lengths}&rate=1", "--ttft-ms", "1500", "--tpot-ms", "60", "--json"),
            *("--effort", "quick", "--policies", "least_loaded", "--max-num-seqs", "64", "--chunk-sizes", "512"),
        )
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        num_decode[kind] = found["findings"][found["recommended"]]["setup"]["num_workers"]["decode"]
    assert num_decode["answers"] > num_decode["prompts"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_whoever_ends_it_leaves_no_process_and_reads_one_line(profile: Path, number: signal.Signals) -> None:
    arguments = ("--effort", "thorough", "--processes", "2", "--workload", "short", "--gpus", "8", *TARGETS)
    command = [sys.executable, "-m", "pdserve.cluster.cli", "tune", "--profile", str(profile), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        children: list[psutil.Process] = []
        deadline_s = time.monotonic() + 60
        while len(children) < 3 and time.monotonic() < deadline_s:  # two that simulate, and the one that tracks them
            assert process.poll() is None
            children = psutil.Process(process.pid).children(recursive=True)
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "interrupted\n"
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
