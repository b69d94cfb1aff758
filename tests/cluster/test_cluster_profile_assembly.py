"""What was measured becomes a profile that predicts it, with words on how well, and the clusters that it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planner_setups import make_config

from pdserve.cluster import launch, state
from pdserve.cluster.config import ClusterConfig
from pdserve.cluster.planner.profile import Contention, LinkCost, Overheads, Slowdown, dump, load
from pdserve.cluster.planner.step_model import StepModel
from pdserve.cluster.planner.step_shape import Company, StepShape, chunk_pairs
from pdserve.cluster.profiling_clusters import (
    LONE_SHARE,
    MIXED_SHARE,
    Say,
    cores_per_worker,
    handoff_sizes,
    mixed_config,
    pair_budgets,
    pair_config,
    running,
)
from pdserve.cluster.profiling_plan import WorkerLimits
from pdserve.cluster.profiling_profile import Finding, Identity, Surroundings, profile_of
from pdserve.cluster.profiling_samples import Timing
from pdserve.proto.errors import ConfigError, StartupError
from pdserve.proto.types import Role

IDENTITY = Identity("tiny", "tiny-llama", "a test", 0.0, 4096, 32_768, 2048)
AROUND = Surroundings(
    {"shm": LinkCost(latency_s=0.001, bandwidth_bytes_per_s=1e9)}, Overheads(request_s=0.002), 12.0, 0.1
)


def cost_s(shape: StepShape) -> float:
    prefill_s = 1e-4 * shape.num_prefill_tokens + 2e-8 * shape.prefill_pairs
    return 0.004 + prefill_s + 2e-4 * shape.num_decodes + 1e-7 * shape.decode_context_tokens


def shapes() -> Iterator[StepShape]:
    for tokens in (8, 16, 32, 64, 128, 256, 512):
        for context in (0, 256, 1024):
            yield StepShape(tokens, chunk_pairs(tokens, context), 0, 0)
            yield StepShape(tokens, chunk_pairs(tokens, context), 4, 1000)
    for batch in (1, 2, 4, 8, 16, 32, 64):
        for context in (32, 128, 512):
            yield StepShape(0, 0.0, batch, batch * context)


def found(noise: float = 0.01, period: float = 1.0) -> Finding:
    random = np.random.default_rng(1)
    timings = []
    for shape in shapes():
        for _ in range(4):
            seconds = cost_s(shape) * float(random.lognormal(0.0, noise))
            timings.append(Timing(shape, seconds, seconds, period * seconds))
    return profile_of(IDENTITY, timings, AROUND, "a test")


def test_a_profile_of_periods_predicts_them() -> None:
    model = StepModel(found(period=1.1).profile)
    for shape in shapes():
        assert model.duration_s(shape) == pytest.approx(1.1 * cost_s(shape), rel=0.05)


def test_it_is_a_file_that_can_be_read_again_with_everything_in_it() -> None:
    profile = found().profile
    assert load(dump(profile), "file") == profile
    assert profile.source == "measured"
    assert profile.links == AROUND.links
    assert (profile.startup_s, profile.flip_s, profile.overheads) == (12.0, 0.1, AROUND.overheads)
    assert profile.domain.decode_batch.largest == 64


def test_good_measurements_have_errors_by_region_and_no_warnings() -> None:
    words = found()
    assert words.warnings == ()
    assert any(line.startswith("prefill") for line in words.fit)
    assert any(line.startswith("mixed") for line in words.fit)
    assert "steps" in words.notes[0]


def test_disturbed_measurements_are_called_so_and_still_predict() -> None:
    timings = [Timing(shape, cost_s(shape) * slow, cost_s(shape), None) for shape in shapes() for slow in (1, 1, 2)]
    disturbed = profile_of(IDENTITY, timings, AROUND, "a test")
    assert any("33% of the steps had to wait for their core" in line for line in disturbed.warnings)
    assert StepModel(disturbed.profile).duration_s(StepShape(0, 0.0, 8, 1024)) == pytest.approx(
        cost_s(StepShape(0, 0.0, 8, 1024)), rel=0.05
    )


def test_what_is_thin_is_named() -> None:
    few = [Timing(StepShape(tokens, chunk_pairs(tokens, 0), 0, 0), 0.01, 0.01, None) for tokens in (8, 64)]
    few += [Timing(StepShape(0, 0.0, batch, batch * 50), 0.01, 0.01, None) for batch in (1, 8)]
    warnings = profile_of(IDENTITY, few, AROUND, "a test").warnings
    assert any(line.startswith("thin: prefill") for line in warnings)
    assert any(line.startswith("thin: mixed steps: none timed") for line in warnings)


def test_where_steps_do_not_tell_what_company_costs_that_of_elsewhere_is_taken_out_of_them() -> None:
    costs = Contention(
        prefill=Slowdown(beside_prefill=0.2, beside_decode=0.2), decode=Slowdown(beside_prefill=0.2, beside_decode=0.2)
    )
    beside = Company(0.5, 0.5)  # always the same, so that with and without it were not both seen
    timings = [Timing(shape, 1.2 * cost_s(shape), 1.2 * cost_s(shape), None, beside) for shape in shapes()]
    told = profile_of(IDENTITY, timings, replace(AROUND, contention=costs), "a test")
    assert told.profile.contention == costs
    assert any("what company costs" in line for line in told.notes)
    assert told.warnings == ()
    for shape in shapes():
        assert StepModel(told.profile).duration_s(shape) == pytest.approx(cost_s(shape), rel=0.05)


def test_what_steps_tell_of_company_comes_before_what_is_known_from_elsewhere() -> None:
    costs = Contention(
        prefill=Slowdown(beside_prefill=0.9, beside_decode=0.9), decode=Slowdown(beside_prefill=0.9, beside_decode=0.9)
    )
    timings = []
    for shape in shapes():
        for share in (0.0, 0.5, 1.0):
            seconds = cost_s(shape) * (1 + 0.2 * share)
            timings.append(Timing(shape, seconds, seconds, None, Company(share, 0.0)))
    told = profile_of(IDENTITY, timings, replace(AROUND, contention=costs), "a test")
    assert told.profile.contention is not None
    assert told.profile.contention.decode.beside_prefill == pytest.approx(0.2, abs=0.05)
    assert not any("what company costs" in line for line in told.notes)


def test_steps_of_one_phase_only_are_no_profile() -> None:
    with pytest.raises(ConfigError, match=r"none is a decode step.*raise --budget-s"):
        profile_of(IDENTITY, [Timing(StepShape(8, 32.0, 0, 0), 0.01, 0.01, None)], AROUND, "a test")


def test_steps_are_measured_on_as_many_mixed_workers_as_there_will_be_workers() -> None:
    config = make_config(prefill=1, decode=2)
    measured = mixed_config(config)
    assert [measured.replicas(role) for role in (Role.PREFILL, Role.DECODE, Role.MIXED)] == [0, 0, 3]
    assert measured.name != config.name
    assert cores_per_worker(config) == max(1, len(os.sched_getaffinity(0)) // 3)


def test_a_pair_has_one_kind_of_link_and_the_cores_of_the_largest_worker() -> None:
    config = make_config(mixed=2, prefill=0, decode=0)
    config = config.model_copy(update={"mixed": config.mixed.model_copy(update={"cores": 1})})
    pair = pair_config(config, "cuda_ipc")
    assert [pair.replicas(role) for role in (Role.PREFILL, Role.DECODE, Role.MIXED)] == [1, 1, 0]
    assert pair.kv_transfer.links == ["cuda_ipc"]
    assert (pair.prefill.cores, pair.decode.cores) == (1, 1)
    assert "_" not in pair.name
    assert cores_per_worker(config) == 1


def test_handed_off_prompts_are_of_one_chunk_each() -> None:
    limits = WorkerLimits(64, 512, 2048, 32_768)
    assert handoff_sizes(limits, 16) == (16, 128, 256, 512)
    assert max(handoff_sizes(WorkerLimits(4, 512, 256, 300), 16)) <= 150


def test_most_of_the_budget_is_for_steps_and_only_one_pair_takes_some() -> None:
    first, second = (pair_budgets(100.0, 2, is_first=is_first) for is_first in (True, False))
    assert first.handoffs_s == second.handoffs_s
    assert second.steps_s == 0.0
    assert LONE_SHARE * 100 + MIXED_SHARE * 100 + first.steps_s + first.handoffs_s + second.handoffs_s == pytest.approx(
        100.0
    )


def test_every_kind_of_worker_is_measured_with_the_largest_steps_that_any_role_may_take() -> None:
    config = make_config(prefill=1, decode=1)
    large = {Role.PREFILL: {"max_num_batched_tokens": 4096}, Role.DECODE: {"max_num_seqs": 256}}
    pools = {str(role): config.pool(role).model_copy(update={"engine": engine}) for role, engine in large.items()}
    config = config.model_copy(update=pools)
    for measured, roles in ((mixed_config(config), [Role.MIXED]), (pair_config(config, "shm"), list(large))):
        for role in roles:
            engine = measured.engine_for(role)
            assert (engine.max_num_seqs, engine.max_num_batched_tokens) == (256, 4096)


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the place of a head, whose cluster is launched at once and never taken down by an error."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:

        @contextmanager
        def launched(config: ClusterConfig, progress: Say) -> Iterator[tuple[state.ClusterState, Any]]:
            (state.prepare(config.name) / "head.log").write_text("a line")
            yield state.ClusterState(config.name, "", {}, "", "model", process.pid, 0.0), process

        monkeypatch.setattr(launch, "launched", launched)
        yield process
        process.kill()


@pytest.mark.usefixtures("head")
def test_a_measured_cluster_leaves_no_folder_and_those_of_others_stay() -> None:
    config = mixed_config(make_config())
    other = state.prepare("other")
    with running(config, lambda line: None) as cluster:
        assert state.state_dir(cluster.name).is_dir()
    assert list(state.state_root().iterdir()) == [other]


def test_a_cluster_that_was_interrupted_leaves_no_folder_once_its_head_is_down(head: subprocess.Popen[bytes]) -> None:
    config = mixed_config(make_config())

    def interrupted() -> None:
        with running(config, lambda line: None):
            assert launch.stop_process(head.pid)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not state.state_dir(config.name).exists()


@pytest.mark.usefixtures("head")
def test_the_folder_of_a_head_that_does_not_end_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    config = mixed_config(make_config())
    monkeypatch.setattr(launch, "stop_process", lambda pid, timeout_s: False)
    with pytest.raises(StartupError, match="does not end"), running(config, lambda line: None):
        pass
    assert (state.state_dir(config.name) / "head.log").is_file()
