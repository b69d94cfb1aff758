"""A source that is killed while its blocks are read costs a typed error at most, and leaves no memory behind."""

from __future__ import annotations

import random
import threading
import time

import torch
from gpu.far_side import TIMEOUT_S, FarSide, Shape, transfer
from gpu.proof import conclude
from link_contract import LAYOUT

from pdserve.kv_transfer.cuda_ipc import CudaIpcSink
from pdserve.kv_transfer.cuda_runtime import cuda_runtime
from pdserve.kv_transfer.digest import ON_DEVICE, Digester
from pdserve.kv_transfer.link import Landing
from pdserve.proto.errors import PdserveError

SHAPE = Shape(num_blocks=256, block_bytes=1 << 20)
NUM_KILLS = 5
LEFT_BYTES = 128 << 20  # less than one pool


def prove() -> str:
    device, rng = torch.device("cuda", 0), random.Random(1)
    target = torch.zeros(SHAPE.num_blocks, SHAPE.block_bytes, dtype=torch.uint8, device=device)
    num_good = num_refused = 0
    free_bytes: list[int] = []
    for attempt in range(NUM_KILLS):
        good, refused = read_while_killed(target, attempt, rng)
        num_good += good
        num_refused += refused
        torch.cuda.empty_cache()
        free_bytes.append(torch.cuda.mem_get_info(device)[0])
    lost_bytes = free_bytes[0] - free_bytes[-1]
    assert lost_bytes < LEFT_BYTES, f"{lost_bytes >> 20} MiB of the device are gone after {NUM_KILLS} killed sources"
    return f"{NUM_KILLS} sources killed: {num_good} transfers verified, {num_refused} refused, none wrong, none hung"


def read_while_killed(target: torch.Tensor, attempt: int, rng: random.Random) -> tuple[int, int]:
    """Transfers that passed their digests, and that ended with one of our errors."""
    far = FarSide(SHAPE, seed=attempt)
    sink = CudaIpcSink(far.address, LAYOUT, 1, cuda_runtime())
    ids = list(range(SHAPE.num_blocks))
    moved = transfer(SHAPE, len(ids), attempt=attempt)
    digests = far.ask("digests", moved, 0, ids)
    check = Digester(ON_DEVICE).checker(moved.id, LAYOUT, 0, digests)
    killer = threading.Timer(rng.uniform(0.0, 0.05), far.process.kill)
    good = refused = 0
    try:
        sink.receive(moved, ids, Landing(target, tuple(ids)), check, TIMEOUT_S)
        good += 1
        killer.start()
        until_s = time.monotonic() + 0.5
        while time.monotonic() < until_s:
            target.zero_()
            try:
                sink.receive(moved, ids, Landing(target, tuple(ids)), check, TIMEOUT_S)
                good += 1
            except PdserveError:
                refused += 1
    finally:
        killer.cancel()
        sink.close()
        far.close()
    return good, refused


if __name__ == "__main__":
    conclude(prove)
