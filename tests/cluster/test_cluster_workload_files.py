"""Workloads as commands take them: lines, files, and every example of the documentation."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from command_runner import application
from planner_setups import make_profile
from source_tree import ROOT
from typer.testing import CliRunner, Result

from pdserve.cluster import tune_command
from pdserve.cluster.planner.profile import dump
from pdserve.cluster.planner.source import drain
from pdserve.cluster.planner.workload import Mix, Part, Piece, Scenario, parse_workload
from pdserve.cluster.planner.workload_fields import ClassShare, SharedPrompts
from pdserve.cluster.planner.workload_kinds import Conversations, Replayed, Synthetic
from pdserve.cluster.simulate_command import simulate
from pdserve.cluster.tune_command import tune
from pdserve.cluster.validate_command import validate
from pdserve.cluster.workload_files import MAX_FILE_BYTES, course_warnings, read_workload
from pdserve.proto.errors import ConfigError

APP = application(simulate, tune, validate)
DOCS = (ROOT / "docs" / "planner.md").read_text(encoding="utf-8")
SECTION = DOCS.partition("## Workloads\n")[2].partition("\n## ")[0]
LINES = re.findall(r"```\n(.*?)```", SECTION, re.DOTALL)[0].split()
FILES = dict(re.findall(r"```yaml\n# (\S+)\n(.*?)```", SECTION, re.DOTALL))

DRIFT = """
kind: scenario
pieces:
  - {workload: "trace:one.csv", duration_s: 100, rate: 5}
  - {workload: "trace:two.csv", duration_s: 100, rate: 15}
"""


def csv(prompt: int, num_requests: int = 2000) -> str:
    rows = (f"{number},{prompt},{10 + number % 20}\n" for number in range(num_requests))
    return "timestamp,input_tokens,output_tokens\n" + "".join(rows)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the traces that the examples name."""
    for name, prompt in {"conv.csv": 300, "code.csv": 700, "one.csv": 100, "two.csv": 200}.items():
        (tmp_path / name).write_text(csv(prompt))
    rows = ({"timestamp": n * 500, "input_length": 900, "output_length": 9, "hash_ids": [0, n + 1]} for n in range(600))
    (tmp_path / "mooncake.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "profile.json").write_text(dump(make_profile(model="demo")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_documentation_has_examples_of_every_kind() -> None:
    kinds = {re.split("[?:]", line)[0] for line in LINES}
    assert kinds >= {"azure-conv", "synthetic", "trace", "sessions"}
    assert set(FILES) == {"mix.yaml", "drift.yaml"}


@pytest.mark.parametrize("written", [*LINES, *FILES])
def test_every_example_of_the_documentation_gives_requests_at_its_rate(written: str, folder: Path) -> None:
    workload = read_workload(written)
    rate = workload.own_rate()
    assert rate is not None
    assert len(list(islice(drain(workload.source(rate, 1, 300)), 301))) == 300


@pytest.mark.parametrize("written", FILES)
def test_every_file_of_the_documentation_can_be_simulated(written: str, folder: Path) -> None:
    done = invoke("simulate", "--workload", written, "--num-prompts", "40", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["num_requests"] == 40


def test_every_key_that_a_workload_has_is_in_the_documentation() -> None:
    """A key that nobody can find might as well not be there."""
    kinds = (Synthetic, Replayed, Conversations, Mix, Scenario, Part, Piece, SharedPrompts, ClassShare)
    for name in {name for kind in kinds for name in kind.model_fields}:
        assert re.search(rf"\b{name}\b", SECTION), name


def invoke(command: str, *arguments: str) -> Result:
    return CliRunner().invoke(APP, [command, "--profile", "profile.json", *arguments])


def test_a_file_is_what_its_mapping_is_and_paths_in_it_are_from_its_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = folder / "inner"
    inner.mkdir()
    (inner / "one.csv").write_text(csv(11))
    (inner / "drift.yml").write_text(DRIFT.replace("two.csv", f"{folder}/two.csv"))
    found = read_workload("inner/drift.yml")
    prompts = Counter(arrival.num_prompt_tokens for arrival in drain(found.source(10.0, 0, 2000)))
    assert prompts == {11: pytest.approx(500, rel=0.2), 200: pytest.approx(1500, rel=0.1)}
    monkeypatch.chdir(inner)
    assert read_workload("drift.yml") == found
    assert read_workload("short?rate=3") == parse_workload("short?rate=3")


def test_simulate_serves_a_drift_of_several_traces_from_a_file(folder: Path) -> None:
    (folder / "drift.yaml").write_text(DRIFT)
    whole = simulated("--num-prompts", "2000")
    # 500 prompts of 100 tokens and 1,500 of 200, and each piece its own rate.
    assert whole["prompt_tokens"] == pytest.approx(500 * 100 + 1500 * 200, rel=0.05)
    assert not whole["notes"]
    start = simulated("--num-prompts", "200")
    assert start["prompt_tokens"] == 200 * 100
    assert "200 requests are 10% of the workload's course; --num-prompts 2000 sees all of it" in start["notes"][0]
    (folder / "drift.yaml").write_text(DRIFT + "whole_course: true\n")
    faster = simulated("--num-prompts", "200")
    assert faster["prompt_tokens"] == pytest.approx(50 * 100 + 150 * 200, rel=0.1)
    assert not faster["notes"]


def simulated(*arguments: str) -> dict[str, Any]:
    done = invoke("simulate", "--workload", "drift.yaml", "--json", *arguments)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_tune_takes_a_mix_from_a_file_and_looks_at_all_classes_that_it_declares(folder: Path) -> None:
    """The rare class is not among the first requests that are looked at."""
    rare = {"workload": {"preset": "short", "classes": {"rare": 1}}, "share": 1e-6}
    often = {"workload": {"preset": "short", "classes": {"often": 1}}, "share": 1}
    (folder / "mix.yaml").write_text(json.dumps({"kind": "mix", "rate": 2, "parts": [often, rare]}))
    slos = ("--slo", "often:ttft=300,tpot=30", "--slo", "third:ttft=300,tpot=30")
    done = invoke("tune", "--workload", "mix.yaml", "--gpus", "2", *slos)
    assert done.exit_code == 2, done.output
    assert "requests of the class rare, for which there is no target" in done.stderr


def test_tune_sees_all_of_a_scenario_in_every_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends within the first piece says nothing of the second, in which the load is three times as high."""
    (folder / "drift.yaml").write_text(DRIFT)
    asked: list[tuple[Any, ...]] = []

    def remember(*question: Any, **_: Any) -> None:
        asked.append(question)
        raise ConfigError("enough is known")

    monkeypatch.setattr(tune_command, "_ask", remember)
    targets = ("--ttft-ms", "300", "--tpot-ms", "30")
    assert "enough is known" in invoke("tune", "--workload", "drift.yaml", "--gpus", "2", *targets).stderr
    ((request, workload, *_),) = asked
    # 500 requests of 100 tokens, 1,500 of 200: not the first piece's 100.
    assert request.mean_prompt == pytest.approx(175, rel=0.02)
    prompts = Counter(arrival.num_prompt_tokens for arrival in drain(workload.source(40.0, 0, 400)))
    assert prompts == {100: pytest.approx(100, rel=0.2), 200: pytest.approx(300, rel=0.1)}
    assert any("the workload changes over 200 s" in words for words in request.notes)
    assert course_warnings(read_workload("short")) == ()


def test_validate_takes_a_file(folder: Path) -> None:
    (folder / "talk.yaml").write_text("kind: sessions\nprompt: 60\noutput: 20\nrate: 1\n")
    done = invoke("validate", "--workload", "talk.yaml")
    assert done.exit_code == 2, done.output
    assert "sessions wait for their answers" in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected keys and values"),
        ("- kind: mix", "expected keys and values"),
        ("3: 4", "expected keys and values"),
        ("kind: [", "not valid YAML"),
        ("kind: mix\nparts: [{workload: &a short}, {workload: *a}]", "YAML aliases are not allowed"),
        ("{" * 500_000, "nested too deeply"),
        ("kind: mix\nparts: [{workload: short, share: x}]", "bad.yaml: workload: parts.0.share: Input should be"),
        ("kind: scenario\npieces: [{workload: short}]", "bad.yaml: workload: pieces.0.duration_s: Field required"),
        ("kind: trace\npath: a.csv\nwindow: 5:10", "in YAML write it in quotes"),
        ("kind: mix\nparts: [{workload: {preset: short, whole_course: true}}]", "whole_course is of the mix or"),
    ],
    ids=["empty", "list", "number", "broken", "alias", "deep", "value", "missing", "window", "course"],
)
def test_a_file_that_makes_no_sense_is_one_error_that_names_it(folder: Path, text: str, words: str) -> None:
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_workload("bad.yaml")
    assert words in caught.value.message
    assert "bad.yaml" in caught.value.message


def test_a_file_that_is_absent_or_huge_or_no_text_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        read_workload("none.yaml")
    (folder / "huge.yaml").write_text(" " * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="too large for a workload"):
        read_workload("huge.yaml")
    (folder / "bytes.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_workload("bytes.yaml")


@pytest.mark.parametrize("written", ["mix", "scenario?fade_s=5", "mix?parts=short"])
def test_a_line_for_a_mix_or_a_scenario_says_where_to_write_it(written: str) -> None:
    with pytest.raises(ConfigError, match=r"for which a line has no room; write it as YAML and give FILE\.yaml"):
        read_workload(written)
