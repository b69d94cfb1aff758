"""State files, placement, the fleet's bookkeeping and the output hub: small owners, checked alone."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pdserve.cluster import launch, state
from pdserve.cluster.output_hub import OutputHub
from pdserve.cluster.placement import plan_workers
from pdserve.cluster.registry import MemberState, Registry
from pdserve.proto.errors import ConfigError, ModelError, StaleReference
from pdserve.proto.types import HandoffId, Role, SequenceEvent, WorkerLoad


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def cluster_of(pid: int) -> state.ClusterState:
    started = state.process_started(pid)
    assert started is not None
    return state.ClusterState("here", "127.0.0.1:1", {}, "127.0.0.1:2", "m", pid, started)


def test_a_cluster_is_found_while_its_head_lives_and_not_after() -> None:
    state.prepare("here")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as head:
        state.write(cluster_of(head.pid))
        assert state.resolve_endpoint(None, "here") == "127.0.0.1:1"
        assert state.names() == ["here"]
        assert launch.stop_process(head.pid)
    assert state.read("here") is None
    with pytest.raises(ConfigError, match="no cluster named 'here'"):
        state.require("here")


def test_another_process_with_the_same_pid_is_not_the_head() -> None:
    state.prepare("here")
    mine = cluster_of(os.getpid())
    state.write(replace(mine, head_started=mine.head_started - 1))
    assert state.read("here") is None


def test_the_folder_is_its_owners_alone() -> None:
    assert stat.S_IMODE(state.prepare("here").stat().st_mode) == 0o700


def left_ray_folder(tmp_path: Path) -> Path:
    """As a head leaves it that was killed."""
    folder = tmp_path / "rays"
    (folder / "session").mkdir(parents=True)
    state.ray_folder_note("here").write_text(str(folder))
    return folder


def test_what_a_killed_head_left_goes_with_it(tmp_path: Path) -> None:
    state.prepare("here")
    folder = left_ray_folder(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as head:
        state.write(cluster_of(head.pid))
        launch.stop("here")
    assert not folder.exists()
    assert not state.ray_folder_note("here").exists()
    state.sweep("here")  # nothing is left to do
    state.sweep("nobody")


def test_what_another_living_head_has_is_left_alone(tmp_path: Path) -> None:
    state.prepare("here")
    folder = left_ray_folder(tmp_path)
    with state.lock("here") as is_ours:
        assert is_ours
        state.sweep("here")
    assert folder.exists()
    state.sweep("here")
    assert not folder.exists()


@pytest.mark.parametrize("name", ["", "../up", "A", "a b", "-a", "a" * 41, "a/b"])
def test_a_name_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not a cluster name"):
        state.state_dir(name)


def test_a_damaged_state_file_is_said_to_be_damaged() -> None:
    (state.prepare("here") / "cluster.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        state.read("here")


def test_a_process_that_ignores_sigterm_is_killed() -> None:
    script = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); input()"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stubborn:
        assert stubborn.stdout is not None
        stubborn.stdout.readline()
        assert launch.stop_process(stubborn.pid, timeout_s=0.3)
        assert stubborn.wait() == -9


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (None, "no such directory"),
        ((), "no config.json"),
        (("config.json",), "no weights"),
        (("config.json", "pytorch_model.bin"), "only pickle weights (pytorch_model.bin)"),
    ],
)
def test_a_model_folder_is_judged_before_anything_starts(
    tmp_path: Path, files: tuple[str, ...] | None, named: str
) -> None:
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}")
    with pytest.raises(ModelError) as caught:
        launch.check_model_dir(folder)
    assert named in caught.value.message


def test_two_workers_on_two_cores_get_one_each_and_a_third_shares() -> None:
    nothing = dict.fromkeys(Role)
    pair = plan_workers({Role.PREFILL: 1, Role.DECODE: 1, Role.MIXED: 0}, nothing, (4, 6))
    assert [(plan.worker_id, plan.cores) for plan in pair] == [("prefill-0", (4,)), ("decode-0", (6,))]
    three = plan_workers({Role.PREFILL: 2, Role.DECODE: 1, Role.MIXED: 0}, nothing, (0, 1))
    assert [plan.cores for plan in three] == [(0,), (1,), (0,)]
    lone = plan_workers({Role.PREFILL: 0, Role.DECODE: 0, Role.MIXED: 1}, nothing, (0, 1, 2, 3))
    assert [plan.cores for plan in lone] == [(0, 1, 2, 3)]
    asked = {Role.PREFILL: 3, Role.DECODE: 1, Role.MIXED: None}
    uneven = plan_workers({Role.PREFILL: 1, Role.DECODE: 1, Role.MIXED: 0}, asked, (0, 1, 2, 3))
    assert [plan.cores for plan in uneven] == [(0, 1, 2), (3,)]


def test_the_registrys_version_grows_with_every_change_and_only_then() -> None:
    registry = Registry()
    registry.starting("decode-0", Role.DECODE)
    first = registry.version
    registry.starting("decode-0", Role.DECODE)
    assert registry.version == first
    registry.dead("decode-0", "killed")
    assert registry.version > first
    assert registry.members[0].state is MemberState.DEAD
    assert registry.members[0].detail == "killed"


def load_of(num_steps: int) -> WorkerLoad:
    return WorkerLoad("w", 1, Role.DECODE, 0, 0, 0, 8, 8, 0, 0, 0, 0, 0, 0.0, False, num_steps, 0)


def event(epoch: int, index: int) -> SequenceEvent:
    return SequenceEvent(HandoffId("r", 0, epoch), index)


async def test_a_slow_router_gets_everything_in_order_in_one_message() -> None:
    hub = OutputHub()
    stream = hub.open(1, load_of(0))
    await stream.next()
    for index in range(5):
        hub.emit(event(1, index))
        hub.emit(event(2, index))  # another router's, which has no stream
        hub.flush(load_of(index))
    output = await asyncio.wait_for(stream.next(), 1)
    assert output is not None
    assert [one.index for one in output.events] == [0, 1, 2, 3, 4]
    assert {one.id.epoch for one in output.events} == {1}
    assert output.load.num_steps == 4


async def test_a_second_stream_of_an_epoch_replaces_the_first() -> None:
    hub = OutputHub()
    first = hub.open(1, load_of(0))
    second = hub.open(1, load_of(0))
    assert await asyncio.wait_for(first.next(), 1) is None
    assert not hub.close(1, first), "a replaced stream must not close the current one"
    hub.require(1)
    assert hub.close(1, second)
    with pytest.raises(StaleReference):
        hub.require(1)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "10.255.255.1", "300.1.1.1"])
def test_a_host_that_nothing_can_listen_on_is_refused_by_name(host: str) -> None:
    with pytest.raises(ConfigError, match=r"kv_transfer\.host: nothing can listen on"):
        launch.check_host(host)


def test_a_host_of_this_machine_is_fine() -> None:
    launch.check_host("127.0.0.1")
    launch.check_host("localhost")
