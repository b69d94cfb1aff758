"""`pdserve validate` as its users meet it, as far as that takes no cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_runner import application
from planner_setups import make_profile
from typer.testing import CliRunner

from pdserve.cluster.planner.profile import dump
from pdserve.cluster.validate_command import validate

APP = application(validate)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--setup", "3X"], "--setup: '3X' is no set-up"),
        (["--num-prompts", "12", "--warm-up", "5"], "--num-prompts: 12 less 5 leave fewer than 10"),
        (["--request-rate", "0"], "--request-rate: 0.0 is not a positive number"),
        (["--workload", "synthetic?prompt=64&output=8"], "has no rate of its own; give --request-rate"),
        (["--workload", "no-such-workload"], "is neither a preset"),
        (
            ["--workload", "sessions?mean_turns=6&think_s=5/30&prompt=60/300&output=20/50", "--request-rate", "1"],
            "sessions wait for their answers",
        ),
        (["--set", "model=/no/such/model"], "/no/such/model: no such directory"),
        (["--profile", "no-such.json"], "no-such.json: cannot be read"),
    ],
    ids=["setup", "prompts", "rate", "no-rate", "workload", "sessions", "model", "profile"],
)
def test_wrong_use_is_one_line_and_exit_status_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(dump(make_profile(model="demo")))
    done = CliRunner().invoke(APP, ["validate", "--profile", str(path), *arguments])
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert words in line


def test_a_profile_of_another_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(dump(make_profile(model="8B")))
    done = CliRunner().invoke(APP, ["validate", "--profile", str(path), "--request-rate", "1"])
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert "made up is of the model 8B, the configuration of demo" in line
    assert "--set served_model_name=8B" in line
