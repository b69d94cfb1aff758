"""What `pdserve validate` shows of runs that are made up: orders, notes, and what an error leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_runner import application
from planner_setups import make_profile
from typer.testing import CliRunner, Result

from pdserve.cluster import validate_command
from pdserve.cluster.load import LoadResult, RequestRecord
from pdserve.cluster.load_report import LoadReport, summarize
from pdserve.cluster.planner.profile import dump
from pdserve.cluster.validation_notes import Beyond
from pdserve.cluster.validation_point import Asked, Sides
from pdserve.proto.errors import Unavailable
from pdserve.proto.types import SLO, RequestTiming

APP = application(validate_command.validate)
BEYOND = Beyond(0.5, ("beyond what was measured: made up: 5 of 10 steps (50.0%): decode batch 9 is above",))


def report(num_met: int) -> LoadReport:
    """Of 100 requests so many are in time."""
    timings = [RequestTiming(0.0, 0.0, 0.01 if met < num_met else 50.0, 60.0, 60.0, 10_000) for met in range(100)]
    records = tuple(RequestRecord(timing, 10) for timing in timings)
    return summarize(LoadResult(records, 0.0, 60.0, num_capped=0, num_clipped=0), SLO(1000.0, 100.0))


class Lab:
    """Both sides of every run: how many of 100 requests are in time, real and simulated, by set-up."""

    def __init__(self, **met: tuple[int, int]) -> None:
        self.met = {name.strip("_"): both for name, both in met.items()}
        self.fails_at: int | None = None
        self.asked: list[Asked] = []

    async def both_sides(self, cluster: object, settings: object, by_role: object, asked: Asked, how: object) -> Sides:
        if self.fails_at == len(self.asked):
            raise Unavailable("the router is gone")
        self.asked.append(asked)
        real, simulated = self.met[asked.point.setup]
        return Sides(report(real), report(simulated), 0.0, BEYOND)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    made = Lab(_1M=(100, 100), _1P1D=(80, 80))

    @contextmanager
    def running(config: object, say: object) -> Iterator[None]:
        yield None

    async def warm_up(*args: object) -> None:
        return None

    for name, fake in (("running", running), ("warm_up", warm_up), ("both_sides", made.both_sides)):
        monkeypatch.setattr(validate_command, name, fake)
    return made


def run(tmp_path: Path, *arguments: str) -> Result:
    path = tmp_path / "profile.json"
    path.write_text(dump(make_profile(model="demo")))
    return CliRunner().invoke(APP, ["validate", "--profile", str(path), "--request-rate", "1", *arguments])


def tree_of(done: Result) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(done.stdout)
    return tree


BOTH = ("--setup", "1M", "--setup", "1P1D", "--num-prompts", "20")


def test_text_and_json_have_the_same_order_and_notes(tmp_path: Path, lab: Lab) -> None:
    text, tree = run(tmp_path, *BOTH).stdout, tree_of(run(tmp_path, *BOTH, "--json"))
    (order,) = tree["orders"]
    assert (order["real"], order["simulated"], order["verdict"]) == ("1M > 1P1D", "1M > 1P1D", "the same order")
    assert order["pairs"] == [{"first": "1M", "second": "1P1D", "real": ">", "simulated": ">", "kind": "same"}]
    assert "real 1M > 1P1D; simulated 1M > 1P1D: the same order" in text
    assert len(tree["notes"]) == 2
    assert all(note in text and BEYOND.lines[0] in note for note in tree["notes"])


def test_requests_cut_to_the_models_context_are_told_once_a_set_up_and_workload(tmp_path: Path, lab: Lab) -> None:
    long = "synthetic?prompt=9000&output=32"
    done = run(tmp_path, *BOTH, "--workload", long, "--request-rate", "2", "--json")
    notes = [note for note in tree_of(done)["notes"] if "were cut to it" in note]
    words = "100.0% of the requests are longer than 8,192 tokens and were cut to it"
    assert notes == [f"1M, {long}: {words}", f"1P1D, {long}: {words}"]


def test_strict_fails_where_a_figure_is_off_and_where_set_ups_swap(tmp_path: Path, lab: Lab) -> None:
    assert run(tmp_path, *BOTH, "--strict").exit_code == 0
    lab.met = {"1M": (100, 90), "1P1D": (80, 80)}
    assert run(tmp_path, *BOTH).exit_code == 0
    assert run(tmp_path, *BOTH, "--strict").exit_code == 1
    lab.met = {"1M": (83, 80), "1P1D": (80, 83)}
    done = run(tmp_path, *BOTH, "--strict")
    assert "10 of 10 figures within their limits" in done.stdout
    assert "1M and 1P1D swapped" in done.stdout
    assert done.exit_code == 1


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_an_error_later_on_leaves_what_was_measured(tmp_path: Path, lab: Lab, fails_at: int) -> None:
    lab.fails_at = fails_at
    done = run(tmp_path, *BOTH, "--repeats", "2", "--json")
    assert done.exit_code == 1
    assert "the router is gone" in done.stderr
    tree = tree_of(done)
    assert len(tree["points"]) == (fails_at + 1) // 2
    assert tree["notes"][-1] == f"it ended early: only {fails_at} of 4 runs were measured"


def test_an_error_before_anything_was_measured_is_the_error_alone(tmp_path: Path, lab: Lab) -> None:
    lab.fails_at = 0
    done = run(tmp_path, *BOTH)
    assert (done.exit_code, done.stdout) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--setup", "1M", "--setup", "1m"), "--setup: 1M is given twice"),
        (("--setup", "01M", "--setup", "1M"), "--setup: 1M is given twice"),
        (("--request-rate", "1.0"), "--request-rate: 1 is given twice"),
        (("--workload", "azure-conv", "--workload", "azure-conv"), "--workload: azure-conv is given twice"),
        (
            ("--refit", "--workload", "synthetic?prompt=64&output=1"),
            "--refit: synthetic?prompt=64&output=1: every answer is one token long",
        ),
    ],
    ids=["setup", "setup-figures", "rate", "workload", "refit"],
)
def test_what_makes_no_sense_is_refused_before_anything_is_measured(
    tmp_path: Path, lab: Lab, arguments: tuple[str, ...], words: str
) -> None:
    done = run(tmp_path, *arguments)
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    assert not lab.asked
