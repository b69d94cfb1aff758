"""A link over NCCL: two GPUs, or two ranks on one where NCCL can; sources that are refused, killed and stopped."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from gpu.far_side import TIMEOUT_S, FarSide, Shape, random_rows, transfer
from gpu.proof import Skipped, conclude
from link_contract import LAYOUT, accept

from pdserve.kv_transfer.cuda_runtime import cuda_runtime
from pdserve.kv_transfer.digest import ON_DEVICE, Digester
from pdserve.kv_transfer.link import Landing, Transfer
from pdserve.kv_transfer.nccl import NcclSink
from pdserve.kv_transfer.nccl_group import MULTI_RANK_NCCL, check_torch, nccl_version
from pdserve.proto.errors import StaleReference, StartupError, TransferFailed

DEVICE = torch.device("cuda", 0)
MESSAGE_BYTES = 8 << 20
NUM_MOVES = 30
STOP_DEADLINE_S = 3.0


def prove() -> str:
    try:
        check_torch()
    except StartupError as error:
        raise Skipped(str(error)) from error
    num_gpus, version = torch.cuda.device_count(), nccl_version()
    if num_gpus < 2 and version < MULTI_RANK_NCCL:
        raise Skipped(f"one GPU, and NCCL {'.'.join(map(str, version))} cannot put two ranks on it (2.30 can)")
    shape = Shape(num_blocks=64, block_bytes=1 << 20, device_index=min(1, num_gpus - 1))
    free_bytes = torch.cuda.mem_get_info(DEVICE)[0]
    target = torch.zeros(shape.num_blocks, shape.block_bytes, dtype=torch.uint8, device=DEVICE)
    moves_s = exchange(shape, target)
    pair_bytes = free_bytes - torch.cuda.mem_get_info(DEVICE)[0] - target.numel()
    stopped_s = lose_source(shape, target, signal.SIGSTOP, STOP_DEADLINE_S)
    killed_s = lose_source(shape, target, signal.SIGKILL, TIMEOUT_S)
    exchange(shape, target)
    where = "two GPUs" if num_gpus > 1 else "one GPU"
    return (
        f"{NUM_MOVES} parts on {where} ({moves_s:.1f} s), about {pair_bytes >> 20} MiB for the pair; a stopped source "
        f"noticed after {stopped_s:.1f} s, a killed one after {killed_s:.1f} s; a new link works then"
    )


def exchange(shape: Shape, target: torch.Tensor) -> float:
    """Seconds that many parts over one link took, and a refused one at the end."""
    rng, far = random.Random(2), FarSide(shape, seed=4)
    content = random_rows(shape, 4, DEVICE)
    sink = NcclSink(LAYOUT, 1, "127.0.0.1", MESSAGE_BYTES, cuda_runtime())
    start_s = time.monotonic()
    try:
        for part in range(NUM_MOVES):
            num_blocks = rng.randint(1, shape.num_blocks)
            source_ids = rng.sample(range(shape.num_blocks), num_blocks)
            target_ids = rng.sample(range(shape.num_blocks), num_blocks)
            after = target.clone()
            after[target_ids] = content[source_ids]
            receive(sink, far, transfer(shape, num_blocks, part=part), source_ids, target_ids, target)
            assert far.hear() == "sent"
            assert torch.equal(target, after), f"part {part}: other bytes than were sent"
        taken_s = time.monotonic() - start_s
        before, wanted = target.clone(), transfer(shape, 2)
        far.tell("send", sink.address, replace(wanted, part=5), [0, 1], MESSAGE_BYTES, TIMEOUT_S)
        expect_failure(sink, wanted, Landing(target, (0, 1)), TIMEOUT_S)
        assert "gave up" in far.hear()
        assert torch.equal(target, before)
    finally:
        sink.close()
        far.close()
    return taken_s


def receive(
    sink: NcclSink,
    far: FarSide,
    moved: Transfer,
    source_ids: Sequence[int],
    target_ids: Sequence[int],
    target: torch.Tensor,
) -> None:
    digests = far.ask("digests", moved, 0, list(source_ids))
    check = Digester(ON_DEVICE).checker(moved.id, LAYOUT, 0, digests)
    far.tell("send", sink.address, moved, list(source_ids), MESSAGE_BYTES, TIMEOUT_S)
    sink.receive(moved, source_ids, Landing(target, tuple(target_ids)), check, TIMEOUT_S)


def lose_source(shape: Shape, target: torch.Tensor, how: signal.Signals, timeout_s: float) -> float:
    """Seconds until the sink gave up on a source that is gone after its first part."""
    far = FarSide(shape, seed=4)
    sink = NcclSink(LAYOUT, 1, "127.0.0.1", MESSAGE_BYTES, cuda_runtime())
    ids = list(range(shape.num_blocks))
    try:
        receive(sink, far, transfer(shape, len(ids)), ids, ids, target)
        assert far.hear() == "sent"
        assert far.process.pid is not None
        far.tell("send", sink.address, transfer(shape, len(ids), part=1), ids, MESSAGE_BYTES, TIMEOUT_S)
        stop = StopAfterFirst(far.process.pid, how)
        start_s = time.monotonic()
        expect_failure(sink, transfer(shape, len(ids), part=1), Landing(target, tuple(ids)), timeout_s, stop)
        return time.monotonic() - start_s
    finally:
        sink.close()
        far.close()


class StopAfterFirst:
    """A check that ends the source's process when the first message has landed."""

    def __init__(self, pid: int, how: signal.Signals) -> None:
        self._pid = pid
        self._how: signal.Signals | None = how

    def __call__(self, first: int, pool: torch.Tensor, block_ids: Sequence[int]) -> None:
        if self._how is not None:
            os.kill(self._pid, self._how)
            self._how = None


def expect_failure(
    sink: NcclSink,
    moved: Transfer,
    landing: Landing,
    timeout_s: float,
    check: StopAfterFirst | None = None,
) -> None:
    try:
        sink.receive(moved, range(moved.num_blocks), landing, check or accept, timeout_s)
    except (TransferFailed, StaleReference):
        return
    raise AssertionError("the transfer ended as if all were well")


if __name__ == "__main__":
    conclude(prove)
