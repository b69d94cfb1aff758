"""Seconds of real measuring, then everything that is done with a profile: simulated with, fitted again, validated."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import PDSERVE, run, running

from pdserve.cluster.planner.profile import load

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

FamilyDir = Callable[..., Path]
SMALL = (
    "engine.num_blocks=128",
    "engine.max_num_seqs=8",
    "engine.max_num_batched_tokens=64",
    "kv_transfer.links=[shm]",
)
LOAD = ("--workload", "synthetic?prompt=48&output=8", "--request-rate", "10")


def settings(model: Path) -> list[str]:
    chosen = [f"model={model}", *SMALL]
    return [part for setting in chosen for part in ("--set", setting)]


def succeed(environment: dict[str, str], *arguments: str) -> str:
    done: subprocess.CompletedProcess[str] = run(environment, *arguments, timeout=300.0)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


@contextmanager
def load_on(environment: dict[str, str], name: str) -> Iterator[None]:
    """For as long as the block takes."""
    arguments = ("bench", "--name", name, "--num-prompts", "4000", "--request-rate", "20")
    with subprocess.Popen([*PDSERVE, *arguments], env=environment, stdout=subprocess.DEVNULL) as bench:
        try:
            yield
        finally:
            bench.terminate()


def test_a_measured_profile_can_be_simulated_validated_and_fitted_again(family_dir: FamilyDir, tmp_path: Path) -> None:
    assert PDSERVE
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state"), "HF_HUB_OFFLINE": "1"}
    model, path = family_dir("llama"), tmp_path / "tiny.json"
    words = succeed(environment, "profile", *settings(model), "--budget-s", "12", "--name", "tiny", "-o", str(path))
    assert "prefill" in words
    assert "shm: " in words
    profile = load(path.read_text(), "tiny.json")
    assert profile.source == "measured"
    assert profile.kv_capacity_tokens == 128 * 16
    assert 0 < profile.overheads.request_s < 1
    assert profile.startup_s > 0

    text = succeed(
        environment, "simulate", "--profile", str(path), *settings(model), *LOAD, "--num-prompts", "50", "--json"
    )
    assert json.loads(text)["num_completed"] == 50

    arguments = ("validate", "--profile", str(path), *settings(model), *LOAD, "--setup", "1M", "--setup", "1P1D")
    found = json.loads(succeed(environment, *arguments, "--num-prompts", "40", "--json"))
    assert [point["point"]["setup"] for point in found["points"]] == ["1M", "1P1D"]
    assert all(point["num_failed"] == 0 and point["step_error"] is not None for point in found["points"])
    assert len(found["orders"]) == 1

    again = tmp_path / "again.json"
    with running(environment, model, *SMALL) as cluster, load_on(environment, cluster.name):
        arguments = ("profile", "--from-cluster", cluster.name, "--budget-s", "4", "--base", str(path))
        words = succeed(environment, *arguments, "-o", str(again))
    assert "decode" in words
    assert load(again.read_text(), "again.json").links == profile.links
