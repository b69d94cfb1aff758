"""The contract of a link, between two processes on one GPU, over CUDA IPC, and what only a device can get wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from gpu.far_side import TIMEOUT_S, FarSide, Shape, random_rows, transfer
from gpu.proof import conclude
from link_contract import BLOCK_BYTES, CASES, LAYOUT, NUM_BLOCKS, Ends, Ids, accept, case_name, random_pool

from pdserve.kv_transfer import cuda_ipc, device_copy
from pdserve.kv_transfer.cuda_ipc import CudaIpcSink
from pdserve.kv_transfer.cuda_pool import CudaAddress, MappedPool
from pdserve.kv_transfer.cuda_runtime import cuda_runtime
from pdserve.kv_transfer.digest import ON_DEVICE, Digester
from pdserve.kv_transfer.link import Landing
from pdserve.proto.errors import PdserveError, StaleReference, TransferFailed

SHAPE = Shape(NUM_BLOCKS, BLOCK_BYTES)
DEVICE = torch.device("cuda", 0)
NUM_WRITES = 20
BUSY_CYCLES = 50_000_000  # some 25 ms
EVERY_BLOCK = tuple(range(NUM_BLOCKS))
WAYS = {"run by run": (1, 512 << 20), "by index": (1 << 40, 512 << 20), "in many waves": (1, 3 * BLOCK_BYTES)}
"""Bytes of a run that is copied by itself, and of a wave."""
_cuda: Any = torch.cuda  # torch types only part of it


def prove() -> str:
    far = FarSide(SHAPE, seed=1)
    try:
        for way, (device_copy.LONG_RUN_BYTES, cuda_ipc.WAVE_BYTES) in WAYS.items():
            for case in CASES:
                print(f"{case_name(case)} ({way})")
                case(Opener(far))
        target = random_rows(SHAPE, 2, DEVICE)
        what_was_written_before_the_offer_is_there(far, target)
        nothing_is_written_after_the_deadline(far, target)
        another_pool_is_never_taken_for_the_announced_one(far, target)
        a_closed_pool_is_refused(far, target)
    finally:
        far.close()
    return f"{len(CASES)} cases of the contract in {len(WAYS)} ways, {NUM_WRITES} fresh writes seen, deadline, identity"


class Opener:
    """Ends whose source's pool is the other process's: the test reaches it through a mapping of its own."""

    def __init__(self, far: FarSide) -> None:
        self._far = far

    def __call__(self, link_epoch: int = 1) -> Ends:
        mapped = MappedPool(CudaAddress.parse(self._far.address), cuda_runtime())
        rows = mapped.data.view(NUM_BLOCKS, BLOCK_BYTES)
        rows.copy_(random_pool(1))
        _cuda.synchronize()
        sink = CudaIpcSink(self._far.address, LAYOUT, link_epoch, cuda_runtime())
        target = random_pool(1000).to(DEVICE)
        return Ends(rows, target, sink, None, Digester(ON_DEVICE), mapped.close, None, _cuda.synchronize)


def new_sink(far: FarSide, epoch: int = 1, address: str | None = None) -> CudaIpcSink:
    return CudaIpcSink(address or far.address, LAYOUT, epoch, cuda_runtime())


def what_was_written_before_the_offer_is_there(far: FarSide, target: torch.Tensor) -> None:
    sink = new_sink(far)
    for seed in range(100, 100 + NUM_WRITES):
        assert far.ask("write", seed, BUSY_CYCLES) == "written"
        landing = Landing(target, EVERY_BLOCK)
        sink.receive(transfer(SHAPE, NUM_BLOCKS), EVERY_BLOCK, landing, accept, TIMEOUT_S)
        assert torch.equal(target, random_rows(SHAPE, seed, DEVICE)), "old bytes after settle"
    sink.close()


def nothing_is_written_after_the_deadline(far: FarSide, target: torch.Tensor) -> None:
    """The copy waits behind our own engine's work, which takes longer than the deadline."""
    sink = new_sink(far)
    _cuda._sleep(10 * BUSY_CYCLES)
    expect(TransferFailed, sink, 1, EVERY_BLOCK, target, 0.02)
    after = target.clone()
    _cuda.synchronize()
    assert torch.equal(target, after), "bytes were written after the call had ended"
    sink.close()


def another_pool_is_never_taken_for_the_announced_one(far: FarSide, target: torch.Tensor) -> None:
    address = CudaAddress.parse(far.address)
    for wrong, error in (
        (replace(address, nonce=bytes(16)), StaleReference),
        (replace(address, handle=bytes(64)), TransferFailed),
        (replace(address, device_uuid="nowhere"), TransferFailed),
    ):
        expect(error, new_sink(far, address=wrong.text()), 1, (0,), target)
    sink = new_sink(far)  # those errors have not spoilt CUDA for us
    sink.receive(transfer(SHAPE, 1), (0,), Landing(target, (0,)), accept, TIMEOUT_S)
    sink.close()


def a_closed_pool_is_refused(far: FarSide, target: torch.Tensor) -> None:
    sink = new_sink(far)
    sink.receive(transfer(SHAPE, 1), (0,), Landing(target, (0,)), accept, TIMEOUT_S)
    assert far.ask("close") == "closed"
    expect(StaleReference, sink, 1, (0,), target)
    sink.close()
    expect(StaleReference, new_sink(far, 2), 2, (0,), target)


def expect(
    error: type[PdserveError],
    sink: CudaIpcSink,
    epoch: int,
    ids: Ids,
    target: torch.Tensor,
    timeout_s: float = TIMEOUT_S,
) -> None:
    landing = Landing(target, tuple(ids))
    try:
        sink.receive(transfer(SHAPE, len(ids), epoch), ids, landing, accept, timeout_s)
    except error:
        return
    raise AssertionError(f"no {error.__name__} came")


if __name__ == "__main__":
    conclude(prove)
