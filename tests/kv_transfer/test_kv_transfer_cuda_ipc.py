"""Links over CUDA IPC, on host memory that plays the device's: everything but the CUDA calls themselves."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from gpu.run import summary
from gpu_fakes import CPU, HostRuntime, open_cuda_ipc
from link_contract import CASES, Case, Ids, accept, case_name

from pdserve.kv_transfer import cuda_ipc, device_copy
from pdserve.kv_transfer.cuda_ipc import CudaIpcSink
from pdserve.kv_transfer.cuda_pool import CudaAddress, CudaPool
from pdserve.kv_transfer.cuda_runtime import CudaRuntime
from pdserve.kv_transfer.digest import ON_DEVICE, Digester
from pdserve.kv_transfer.link import Landing, PartCheck, Transfer
from pdserve.proto.errors import LayoutMismatch, StaleReference, StartupError, TransferFailed
from pdserve.proto.types import HandoffId

BLOCK_BYTES = 4096
NUM_BLOCKS = 12
LAYOUT = 77
TIMEOUT_S = 20.0
HANDOFF = HandoffId("request", 0, 7)
DIGESTER = Digester(ON_DEVICE)


def transfer(num_blocks: int, epoch: int = 1) -> Transfer:
    return Transfer(HANDOFF, 0, num_blocks, BLOCK_BYTES, LAYOUT, epoch)


def random_rows(num_blocks: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_blocks, BLOCK_BYTES), dtype=torch.uint8, generator=generator)


class World:
    """A source's pool and a landing."""

    def __init__(self) -> None:
        self.runtime = HostRuntime()
        self.pool = CudaPool(NUM_BLOCKS * BLOCK_BYTES, CPU, self.runtime)
        self.source = self.pool.tensor.view(NUM_BLOCKS, BLOCK_BYTES)
        self.source.copy_(random_rows(NUM_BLOCKS, 1))
        self.target = random_rows(NUM_BLOCKS, 2)
        self.sink = self.new_sink(self.pool.address)

    def new_sink(self, address: str, epoch: int = 1) -> CudaIpcSink:
        return CudaIpcSink(address, LAYOUT, epoch, self.runtime)

    def check(self, source_ids: Sequence[int]) -> PartCheck:
        digests = DIGESTER.digests(HANDOFF, LAYOUT, 0, self.source, source_ids)
        return DIGESTER.checker(HANDOFF, LAYOUT, 0, digests)

    def receive(
        self, source_ids: Sequence[int], target_ids: Sequence[int], check: PartCheck, timeout_s: float = TIMEOUT_S
    ) -> None:
        landing = Landing(self.target, tuple(target_ids))
        self.sink.receive(transfer(len(source_ids)), source_ids, landing, check, timeout_s)

    def close(self) -> None:
        self.sink.close()
        self.pool.close()
        self.runtime.close()


@pytest.fixture
def world() -> Iterator[World]:
    torch.set_num_threads(1)
    world = World()
    yield world
    world.close()


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize("long_run_bytes", [1, 1 << 30], ids=["run by run", "by index"])
def test_contract(case: Case, long_run_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(device_copy, "LONG_RUN_BYTES", long_run_bytes)
    case(open_cuda_ipc)


IDS = [
    ([0], [0]),
    ([11, 0, 5], [2, 10, 3]),
    ([3, 4, 5, 6, 7], [7, 8, 9, 10, 11]),
    ([9, 8, 7, 6, 5, 4], [0, 1, 2, 3, 4, 5]),
    ([2, 3, 4, 5], [9, 1, 7, 0]),
    (list(range(12)), [5, 6, 7, 8, 0, 1, 2, 3, 11, 10, 9, 4]),
]


@pytest.mark.parametrize(("source_ids", "target_ids"), IDS)
@pytest.mark.parametrize("long_run_bytes", [1, 1 << 30], ids=["run by run", "by index"])
def test_exactly_the_named_blocks_arrive_and_each_is_checked_once(
    world: World,
    source_ids: list[int],
    target_ids: list[int],
    long_run_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_copy, "LONG_RUN_BYTES", long_run_bytes)
    monkeypatch.setattr(device_copy, "MAX_GATHER_BYTES", 2 * BLOCK_BYTES)
    monkeypatch.setattr(cuda_ipc, "WAVE_BYTES", 5 * BLOCK_BYTES)
    after, before = world.target.clone(), world.source.clone()
    after[target_ids] = before[source_ids]
    verify = world.check(source_ids)
    seen: list[int] = []

    def check(first: int, pool: torch.Tensor, block_ids: Ids) -> None:
        assert list(block_ids) == target_ids[first : first + len(block_ids)]
        seen.extend(range(first, first + len(block_ids)))
        verify(first, pool, block_ids)

    world.receive(source_ids, target_ids, check)
    assert seen == list(range(len(source_ids)))
    assert torch.equal(world.target, after)
    assert torch.equal(world.source, before)


@pytest.mark.parametrize("block_bytes", [4100, 4104])
def test_blocks_of_an_odd_size_are_copied_whole(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_copy, "LONG_RUN_BYTES", 1 << 30)
    lane = HostRuntime().lane(CPU)
    source = torch.randint(0, 256, (6, block_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    target = torch.zeros_like(source)
    device_copy.copy_blocks(lane, source, [5, 0, 3], target, [1, 4, 2])
    assert torch.equal(target[[1, 4, 2]], source[[5, 0, 3]])
    assert not target[[0, 3, 5]].any()


def test_the_pool_is_opened_once_and_let_go_when_the_link_is_closed(world: World) -> None:
    for _ in range(3):
        world.receive([0, 1], [1, 0], accept)
        assert world.runtime.num_open == 1
    world.sink.close()
    world.sink.close()
    assert world.runtime.num_open == 0
    with pytest.raises(TransferFailed, match="closed"):
        world.receive([0], [0], accept)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", TransferFailed),
        ("not:an:address", TransferFailed),
        ("host-0:zz:512:4096:00", TransferFailed),
        ("host-0:00:0:4096:" + "00" * 16, TransferFailed),
        ("host-0:00:512:4096:" + "00" * 16, TransferFailed),
    ],
)
def test_what_is_no_address_of_a_pool_is_refused(world: World, text: str, error: type[Exception]) -> None:
    world.sink = world.new_sink(text)
    with pytest.raises(error):
        world.receive([0], [0], accept)


def test_another_pool_at_the_same_place_is_never_taken_for_the_announced_one(world: World) -> None:
    address = CudaAddress.parse(world.pool.address)
    assert address.text() == world.pool.address
    before = world.target.clone()
    for wrong in (replace(address, nonce=bytes(16)), replace(address, num_bytes=address.num_bytes - BLOCK_BYTES)):
        world.sink = world.new_sink(wrong.text())
        with pytest.raises(StaleReference):
            world.receive([0], [0], accept)
        assert world.runtime.num_open == 0
    world.sink = world.new_sink(replace(address, device_uuid="host-1").text())
    with pytest.raises(TransferFailed, match="not visible"):
        world.receive([0], [0], accept)
    assert torch.equal(world.target, before)


def test_a_pool_that_was_closed_is_refused_by_new_sinks_and_by_open_ones(world: World) -> None:
    world.receive([0], [0], accept)
    world.pool.close()
    world.pool.close()
    with pytest.raises(StaleReference):
        world.receive([0], [0], accept)
    world.sink.close()
    world.sink = world.new_sink(world.pool.address)
    with pytest.raises(StaleReference):
        world.receive([0], [0], accept)


def test_a_transfer_for_another_link_or_layout_is_refused_before_a_byte_lands(world: World) -> None:
    before = world.target.clone()
    landing = Landing(world.target, (0, 1))
    for wrong, error in (
        (replace(transfer(2), link_epoch=2), StaleReference),
        (replace(transfer(2), layout_hash=1), LayoutMismatch),
        (replace(transfer(2), block_bytes=BLOCK_BYTES // 2), LayoutMismatch),
        (transfer(3), TransferFailed),
    ):
        with pytest.raises(error):
            world.sink.receive(wrong, [0, 1], landing, accept, TIMEOUT_S)
    for ids in ([0, NUM_BLOCKS], [-1, 0], [1, 1]):
        with pytest.raises(TransferFailed):
            world.sink.receive(transfer(2), ids, landing, accept, TIMEOUT_S)
    odd = Landing(torch.zeros(2, 4000, dtype=torch.uint8), (0, 1))
    with pytest.raises(LayoutMismatch, match="multiple"):
        world.sink.receive(replace(transfer(2), block_bytes=4000), [0, 1], odd, accept, TIMEOUT_S)
    assert torch.equal(world.target, before)


def in_thread(world: World, num_blocks: int, check: PartCheck, timeout_s: float) -> tuple[threading.Thread, list[str]]:
    told: list[str] = []

    def run() -> None:
        try:
            world.receive(range(num_blocks), range(num_blocks), check, timeout_s)
        except TransferFailed as error:
            told.append(error.message)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, told


def test_past_its_deadline_a_transfer_ends_when_the_device_is_done_and_not_before(world: World) -> None:
    world.receive([0], [0], accept)
    world.runtime.is_stuck.set()
    thread, told = in_thread(world, 2, accept, 0.05)
    thread.join(0.2)
    assert thread.is_alive()
    assert not told
    world.runtime.is_stuck.clear()
    thread.join(TIMEOUT_S)
    assert "deadline" in told[0]


def test_closing_ends_a_transfer_and_unmaps_the_pool_only_after_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_ipc, "WAVE_BYTES", BLOCK_BYTES)
    open_when_checked = []

    def close_meanwhile(first: int, pool: torch.Tensor, block_ids: Ids) -> None:
        closing = threading.Thread(target=world.sink.close)
        closing.start()
        closing.join(TIMEOUT_S)
        open_when_checked.append(world.runtime.num_open)

    with pytest.raises(TransferFailed, match="closed"):
        world.receive([0, 1, 2], [0, 1, 2], close_meanwhile)
    assert open_when_checked == [1]
    assert world.runtime.num_open == 0


def test_a_device_that_fails_is_a_failed_transfer(world: World) -> None:
    world.receive([0], [0], accept)
    world.runtime.is_broken.set()
    with pytest.raises(TransferFailed, match="device failed: CUDA error"):
        world.receive([0], [0], accept)


def test_the_source_does_not_offer_what_is_not_written_yet(world: World) -> None:
    world.pool.settle(TIMEOUT_S)
    world.runtime.is_stuck.set()
    with pytest.raises(TransferFailed, match="deadline"):
        world.pool.settle(0.05)
    world.runtime.is_stuck.clear()


def serve_pool(pipe: Connection) -> None:
    pool = CudaPool(NUM_BLOCKS * BLOCK_BYTES, CPU, HostRuntime())
    pool.tensor.copy_(random_rows(NUM_BLOCKS, 5).flatten())
    pipe.send(pool.address)
    pipe.recv()


def test_a_killed_peers_pool_stays_readable_while_it_is_open_and_cannot_be_opened_again(world: World) -> None:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve_pool, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        assert pipe.poll(60)
        address = pipe.recv()
        world.sink = world.new_sink(address)
        world.receive([0, 1], [0, 1], accept)
        assert torch.equal(world.target[:2], random_rows(NUM_BLOCKS, 5)[:2])
        process.kill()
        process.join(20)
        world.receive([2], [2], accept)
        fresh = world.new_sink(address, epoch=2)
        with pytest.raises(TransferFailed):
            fresh.receive(transfer(1, epoch=2), [0], Landing(world.target, (0,)), accept, TIMEOUT_S)
    finally:
        process.kill()
        process.join(20)
        process.close()
        pipe.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA: tests/gpu proves more")
def test_without_cuda_the_runtime_says_what_to_do() -> None:
    with pytest.raises(StartupError, match="remove cuda_ipc"):
        CudaRuntime()


def test_without_a_gpu_the_gpu_proofs_say_so_and_count_as_skipped() -> None:
    script = Path(__file__).parent.parent / "gpu" / "run.sh"
    environment = os.environ | {"PYTHON": "false"}
    result = subprocess.run(["sh", str(script)], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 77
    assert result.stdout.splitlines() == [
        "tests/gpu: SKIPPED: no Python 3.11 here has a torch that sees a GPU (tried: false)"
    ]


@pytest.mark.parametrize(
    ("statuses", "status"), [((0, 0, 77), 0), ((0, 1, 77), 1), ((77, 77), 77), ((1, 77), 1)], ids=str
)
def test_the_gpu_proofs_failed_if_one_did_and_were_skipped_only_if_all_were(
    statuses: tuple[int, ...], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert summary({f"proof {n}": (found, f"because {n}") for n, found in enumerate(statuses)}) == status
    told = capsys.readouterr().out
    assert all(f"because {n}" in told for n, found in enumerate(statuses) if found)
