"""Links over NCCL, with a socket in NCCL's place: everything but NCCL and CUDA themselves."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_fakes import CPU, HOST, MESSAGE_BYTES, HostRuntime, SocketNccl, manners, open_nccl
from link_contract import (
    CASES,
    LAYOUT,
    TIMEOUT_S,
    TWO_SIDED_CASES,
    Case,
    Ids,
    Sender,
    accept,
    case_name,
    random_pool,
    transfer,
)

from pdserve.kv_transfer import nccl_group
from pdserve.kv_transfer.link import HEADER_BYTES, Deadline, Landing
from pdserve.kv_transfer.mailbox import Mailbox
from pdserve.kv_transfer.nccl import NcclSink, NcclSource
from pdserve.kv_transfer.rendezvous import connect
from pdserve.proto.errors import CorruptKV, StartupError, TransferFailed


def in_thread(call: Callable[[], None]) -> tuple[threading.Thread, list[Exception]]:
    errors: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, errors


class World:
    """Both ends in this process."""

    def __init__(self, source_uuid: str = "gpu-1") -> None:
        self.source_pool, self.target = random_pool(1), random_pool(2)
        self.runtime = HostRuntime("gpu-0")
        self.sink = NcclSink(LAYOUT, 1, HOST, MESSAGE_BYTES, self.runtime)
        runtime = HostRuntime(source_uuid)
        self.source = NcclSource(self.sink.address, self.source_pool, LAYOUT, 1, MESSAGE_BYTES, runtime)

    def landing(self, num_blocks: int) -> Landing:
        return Landing(self.target, tuple(range(num_blocks)))

    def move(self, num_blocks: int, part: int = 0) -> None:
        moved = transfer(num_blocks, part=part)
        sender = Sender(self.source, moved, range(num_blocks))
        sender.start()
        try:
            self.sink.receive(moved, range(num_blocks), self.landing(num_blocks), accept, TIMEOUT_S)
        finally:
            sender.join(2 * TIMEOUT_S)
            assert not sender.is_alive()
        assert sender.error is None

    def close(self) -> None:
        self.sink.close()
        self.source.close()


def settled(is_so: Callable[[], bool]) -> bool:
    """Whether it becomes so: threads that nobody waits for take a moment."""
    until_s = time.monotonic() + TIMEOUT_S
    while not is_so() and time.monotonic() < until_s:
        time.sleep(0.005)
    return is_so()


def use_fake(monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...] = (2, 28, 9), **attributes: Any) -> list[Any]:
    """The groups that will be opened."""
    torch.set_num_threads(1)
    group_class = manners(**attributes)
    monkeypatch.setattr(nccl_group, "_Nccl", group_class)
    monkeypatch.setattr(nccl_group, "nccl_version", lambda: version)
    for name in (*nccl_group._REQUIRED, *nccl_group._USUAL, "NCCL_MULTI_RANK_GPU_ENABLE"):
        monkeypatch.setenv(name, "")  # so that what a test leaves there is taken back
        monkeypatch.delenv(name)
    return group_class.opened


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[SocketNccl]:
    return use_fake(monkeypatch)


@pytest.fixture
def world(groups: list[SocketNccl]) -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize("case", [*CASES, *TWO_SIDED_CASES], ids=case_name)
def test_contract(case: Case) -> None:
    case(open_nccl)


def test_parts_of_different_sizes_follow_each_other_over_one_group(world: World, groups: list[SocketNccl]) -> None:
    for part, num_blocks in enumerate((1, 12, 4, 7)):
        world.move(num_blocks, part)
        assert torch.equal(world.target[:num_blocks], world.source_pool[:num_blocks])
        world.source_pool.add_(1)
    assert len(groups) == 2


def test_what_the_sink_refuses_the_source_hears_at_once_and_both_ends_are_aborted(
    world: World, groups: list[SocketNccl]
) -> None:
    def refuse(first: int, pool: torch.Tensor, block_ids: Ids) -> None:
        raise CorruptKV("the block at position 5 differs")

    sender = Sender(world.source, transfer(7), range(7))
    sender.start()
    with pytest.raises(CorruptKV):
        world.sink.receive(transfer(7), range(7), world.landing(7), refuse, TIMEOUT_S)
    sender.join(2 * TIMEOUT_S)
    assert "the peer gave up: the block at position 5 differs" in str(sender.error)
    assert settled(lambda: all(group.is_aborted for group in groups))
    with pytest.raises(TransferFailed, match="closed"):
        world.source.send(transfer(1), [0], TIMEOUT_S)
    with pytest.raises(TransferFailed, match="closed"):
        world.sink.receive(transfer(1), [0], world.landing(1), accept, TIMEOUT_S)


def test_a_call_that_nccl_never_returns_from_costs_the_deadline_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    groups = use_fake(monkeypatch, connect_gate=gate)
    world = World()
    sender = Sender(world.source, transfer(1), [0], 0.5)
    sender.start()
    with pytest.raises(TransferFailed):
        world.sink.receive(transfer(1), [0], world.landing(1), accept, 0.5)
    sender.join(TIMEOUT_S)
    assert isinstance(sender.error, TransferFailed)
    assert settled(lambda: len(groups) == 2 and all(group.is_aborted for group in groups))
    gate.set()
    assert settled(lambda: not nccl_threads())
    world.close()


def nccl_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("nccl-")]


class SpyCheck:
    """Holds a transfer between two messages."""

    def __init__(self) -> None:
        self.is_reached, self.may_go_on = threading.Event(), threading.Event()

    def __call__(self, first: int, pool: torch.Tensor, block_ids: Ids) -> None:
        self.is_reached.set()
        assert self.may_go_on.wait(TIMEOUT_S)


def test_closing_ends_a_transfer_at_both_ends_and_staging_outlives_the_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL calls an aborted message complete: what then lies in staging must not be taken for KV."""
    gate = threading.Event()
    groups = use_fake(monkeypatch, abort_gate=gate)
    world, spy = World(), SpyCheck()
    sender = Sender(world.source, transfer(12), range(12))
    sender.start()
    receiving, sink_errors = in_thread(
        lambda: world.sink.receive(transfer(12), range(12), world.landing(12), spy, TIMEOUT_S)
    )
    assert spy.is_reached.wait(TIMEOUT_S)
    world.sink.close()
    before = world.target.clone()
    spy.may_go_on.set()
    receiving.join(TIMEOUT_S)
    sender.join(TIMEOUT_S)
    assert isinstance(sink_errors[0], TransferFailed)
    assert isinstance(sender.error, TransferFailed)
    assert torch.equal(world.target, before)
    assert settled(lambda: all(group.is_aborted for group in groups))
    assert nccl_threads().count("nccl-abort") == 2  # they hold the staging memory
    gate.set()
    assert settled(lambda: not nccl_threads())
    world.close()


def test_memory_that_a_failed_abort_may_have_left_in_use_is_never_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake(monkeypatch, abort_error="abort timed out")
    fenced: list[object] = []
    monkeypatch.setattr(nccl_group, "_fenced", fenced)
    world = World()
    world.move(1)
    world.close()
    assert settled(lambda: len(fenced) == 2)
    assert all(isinstance(memory, torch.Tensor) and memory.numel() for memory in fenced)


def test_past_its_deadline_a_transfer_ends_when_the_device_is_done_and_not_before(world: World) -> None:
    world.move(1)
    world.runtime.is_stuck.set()
    sender = Sender(world.source, transfer(2), [0, 1])
    sender.start()
    receiving, errors = in_thread(lambda: world.sink.receive(transfer(2), [0, 1], world.landing(2), accept, 0.3))
    sender.join(TIMEOUT_S)  # the sink has given up
    assert receiving.is_alive()
    assert not errors
    world.runtime.is_stuck.clear()
    receiving.join(TIMEOUT_S)
    assert "deadline" in str(errors[0])


def test_a_device_that_fails_is_a_failed_transfer(world: World) -> None:
    world.move(1)
    world.runtime.is_broken.set()
    with pytest.raises(TransferFailed, match="device failed: CUDA error"):
        world.move(1)


@pytest.mark.parametrize(
    ("announcement", "reason"),
    [
        (b"x" * (HEADER_BYTES + 3), "announces itself"),
        (transfer(1).header() + bytes(4), "wants 0 blocks in a message"),
    ],
)
def test_garbage_in_place_of_an_announcement_is_refused(world: World, announcement: bytes, reason: str) -> None:
    thread, errors = in_thread(lambda: world.sink.receive(transfer(1), [0], world.landing(1), accept, TIMEOUT_S))
    deadline = Deadline(TIMEOUT_S)
    mailbox = Mailbox(connect(world.sink.address, deadline))
    pair = nccl_group.NcclPair(mailbox, 1, CPU, "gpu-1", deadline)
    mailbox.put("header", announcement, deadline)
    thread.join(TIMEOUT_S)
    assert reason in str(errors[0])
    pair.close(None)
    mailbox.close("done")


def test_two_ends_on_one_gpu_need_an_nccl_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake(monkeypatch, version=(2, 28, 9))
    world = World(source_uuid="gpu-0")
    with pytest.raises(TransferFailed, match=r"one GPU: NCCL 2\.28\.9 cannot, 2\.30 can"):
        world.move(1)
    world.close()
    assert "NCCL_MULTI_RANK_GPU_ENABLE" not in os.environ

    groups = use_fake(monkeypatch, version=(2, 30, 7))
    world = World(source_uuid="gpu-0")
    world.move(1)
    world.close()
    assert os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] == "1"
    assert [group.options.config.max_ctas for group in groups] == [4, 4]


# The environment and the torch that NCCL links need.


def test_the_environment_keeps_torch_from_ending_the_process_and_respects_the_operator() -> None:
    environment = {"TORCH_NCCL_NONBLOCKING_TIMEOUT": "7", "NCCL_MULTI_RANK_GPU_ENABLE": "0"}
    nccl_group.set_environment(environment, (2, 30, 7))
    assert environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert environment["TORCH_NCCL_ENABLE_MONITORING"] == "0"
    assert environment["TORCH_NCCL_NONBLOCKING_TIMEOUT"] == "7"
    assert environment["NCCL_MULTI_RANK_GPU_ENABLE"] == "0"
    with pytest.raises(StartupError, match="TORCH_NCCL_ASYNC_ERROR_HANDLING=1: links over NCCL need 0"):
        nccl_group.set_environment({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}, (2, 28))


@pytest.mark.parametrize(
    ("found", "missing"),
    [
        (None, "ProcessGroupNCCL"),
        (SimpleNamespace(Options=SimpleNamespace, send=0, recv=0, abort=0), "eager_connect_single_device"),
        (
            SimpleNamespace(Options=SimpleNamespace, send=0, recv=0, abort=0, eager_connect_single_device=0),
            "config.blocking",
        ),
    ],
)
def test_a_torch_without_what_we_need_of_nccl_is_refused_by_name(
    found: object, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nccl_group, "_Nccl", found)
    with pytest.raises(StartupError, match=missing):
        nccl_group.check_torch()


# A source in a process of its own.


def serve_source(pipe: Connection) -> None:
    """Sends two parts, and is killed or stopped in the middle of the second if told so."""
    torch.set_num_threads(1)
    nccl_group._Nccl = manners()
    nccl_group.nccl_version = lambda: (2, 28, 9)
    address, ending = pipe.recv()
    source = NcclSource(address, random_pool(9), LAYOUT, 1, MESSAGE_BYTES, HostRuntime("gpu-1"))
    source.send(transfer(4), range(4), TIMEOUT_S)
    pipe.send("sent")
    if ending != "send":
        side: Any = source._side
        wire = side._wire
        original = wire.pair.send

        def send_one(*arguments: Any) -> object:
            wire.pair.send = die
            return original(*arguments)

        def die(*arguments: Any) -> object:
            os.kill(os.getpid(), signal.SIGKILL if ending == "kill" else signal.SIGSTOP)
            return original(*arguments)

        wire.pair.send = send_one
    source.send(transfer(12, part=1), range(12), TIMEOUT_S)
    pipe.send("sent")
    pipe.recv()


@pytest.mark.parametrize(
    ("ending", "reason", "timeout_s"), [("kill", "hung up|went away", 60.0), ("stop", "deadline|timed out", 1.0)]
)
def test_a_sink_outlives_killed_and_stopped_sources(
    groups: list[SocketNccl], ending: str, reason: str, timeout_s: float
) -> None:
    """NCCL says nothing of a dead peer; the connection does, long before the deadline."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve_source, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    sink = NcclSink(LAYOUT, 1, HOST, MESSAGE_BYTES, HostRuntime("gpu-0"))
    target = torch.zeros_like(random_pool(9))
    landing = Landing(target, tuple(range(12)))
    try:
        pipe.send((sink.address, ending))
        sink.receive(transfer(4), range(4), Landing(target, (0, 1, 2, 3)), accept, 60.0)
        assert torch.equal(target[:4], random_pool(9)[:4])
        assert pipe.poll(60)
        assert pipe.recv() == "sent"
        with pytest.raises(TransferFailed, match=reason):
            sink.receive(transfer(12, part=1), range(12), landing, accept, timeout_s)
        assert settled(lambda: groups[0].is_aborted)
    finally:
        sink.close()
        process.kill()
        process.join(20)
        process.close()
        pipe.close()
