"""How fast a hand-off over CUDA IPC is beside the device's own copy of the same bytes, in the same run, in turns."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from gpu.far_side import TIMEOUT_S, FarSide, Shape, transfer
from gpu.proof import conclude
from link_contract import LAYOUT, accept

from pdserve.kv_transfer.cuda_ipc import CudaIpcSink
from pdserve.kv_transfer.cuda_runtime import cuda_runtime
from pdserve.kv_transfer.digest import ON_DEVICE, Digester
from pdserve.kv_transfer.link import Landing, PartCheck

TARGET = 0.8
BLOCK_BYTES = 2 << 20
MAX_POOL_BYTES = 4 << 30
NUM_PAIRS = 21
DEVICE = torch.device("cuda", 0)


def prove() -> str:
    free_bytes = torch.cuda.mem_get_info(DEVICE)[0]
    shape = Shape(min(MAX_POOL_BYTES, free_bytes // 6) // BLOCK_BYTES, BLOCK_BYTES)
    far = FarSide(Shape(shape.num_blocks, BLOCK_BYTES), seed=1)
    try:
        measured = Measured(far, shape)
        plain = measured.ratio("cuda_ipc_ratio", measured.ids, accept, TARGET)
        measured.ratio("cuda_ipc_verified_ratio", measured.ids, measured.check(measured.ids), None)
        shuffled = random.Random(1).sample(measured.ids, len(measured.ids))
        measured.ratio("cuda_ipc_scattered_ratio", shuffled, accept, None)
        measured.small()
    finally:
        far.close()
    assert plain >= TARGET, f"cuda_ipc_ratio is {plain:.2f}, wanted {TARGET}"
    return f"a hand-off of {shape.num_blocks * BLOCK_BYTES >> 20} MiB runs at {plain:.2f} of a device-to-device copy"


class Measured:
    def __init__(self, far: FarSide, shape: Shape) -> None:
        self.shape = shape
        self.ids = list(range(shape.num_blocks))
        self.sink = CudaIpcSink(far.address, LAYOUT, 1, cuda_runtime())
        self.target = torch.zeros(shape.num_blocks, BLOCK_BYTES, dtype=torch.uint8, device=DEVICE)
        self.own = torch.ones_like(self.target)
        self._far = far

    def check(self, ids: Sequence[int]) -> PartCheck:
        moved = transfer(self.shape, len(ids))
        digests = self._far.ask("digests", moved, 0, list(ids))
        return Digester(ON_DEVICE).checker(moved.id, LAYOUT, 0, digests)

    def receive(self, source_ids: Sequence[int], check: PartCheck) -> None:
        landing = Landing(self.target, tuple(range(len(source_ids))))
        self.sink.receive(transfer(self.shape, len(source_ids)), source_ids, landing, check, TIMEOUT_S)

    def ratio(self, name: str, source_ids: Sequence[int], check: PartCheck, target: float | None) -> float:
        """Of the time of a plain copy to that of the link: medians over pairs; prints the row."""

        def plain() -> None:
            self.target.copy_(self.own)
            torch.cuda.synchronize()

        def linked() -> None:
            self.receive(source_ids, check)

        plain()
        linked()
        pairs = [(seconds(plain), seconds(linked)) for _ in range(NUM_PAIRS)]
        ratio = statistics.median(copied_s / linked_s for copied_s, linked_s in pairs)
        num_bytes = len(source_ids) * BLOCK_BYTES
        rate = num_bytes / statistics.median(linked_s for _, linked_s in pairs) / 1e9
        row(
            name,
            ratio,
            "ratio",
            target,
            f"{rate:.0f} GB/s arrive; {num_bytes >> 20} MiB in {BLOCK_BYTES >> 10} KiB blocks",
        )
        return ratio

    def small(self) -> None:
        """What a part costs whatever its size."""
        ids = self.ids[:4]
        check = self.check(ids)
        for name, verify in (("cuda_ipc_part_ms", accept), ("cuda_ipc_verified_part_ms", check)):
            times_s = [seconds(lambda verify=verify: self.receive(ids, verify)) for _ in range(50)]  # type: ignore[misc]
            row(name, 1e3 * statistics.median(times_s), "ms", None, f"{len(ids)} blocks of {BLOCK_BYTES >> 10} KiB")


def seconds(call: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def row(name: str, value: float, unit: str, target: float | None, note: str) -> None:
    ok = None if target is None else value >= target
    print(json.dumps({"name": name, "value": round(value, 3), "unit": unit, "target": target, "ok": ok, "note": note}))


if __name__ == "__main__":
    conclude(prove)
