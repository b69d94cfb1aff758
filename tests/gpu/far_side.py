"""The source of KV on a GPU, in a process of its own, that does what it is told over a pipe.

Both processes draw the same bytes from a seed, so that none have to be sent to compare them.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from link_contract import LAYOUT

from pdserve.kv_transfer.cuda_pool import CudaPool
from pdserve.kv_transfer.cuda_runtime import cuda_runtime
from pdserve.kv_transfer.digest import ON_DEVICE, Digester
from pdserve.kv_transfer.link import Transfer
from pdserve.kv_transfer.nccl import NcclSource
from pdserve.proto.errors import PdserveError
from pdserve.proto.types import HandoffId

TIMEOUT_S = 30.0
ANSWER_S = 60.0
_cuda: Any = torch.cuda  # torch types only part of it


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the far side's pool."""

    num_blocks: int
    block_bytes: int
    device_index: int = 0


def transfer(shape: Shape, num_blocks: int, epoch: int = 1, attempt: int = 0, part: int = 0) -> Transfer:
    return Transfer(HandoffId("request", attempt, 7), part, num_blocks, shape.block_bytes, LAYOUT, epoch)


def random_rows(shape: Shape, seed: int, device: torch.device) -> torch.Tensor:
    """uint8 `[num_blocks, block_bytes]`, the same on every device: drawn on the host."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.num_blocks, shape.block_bytes)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).to(device)


class FarSide:
    """The handle of the other process. `close` kills it."""

    def __init__(self, shape: Shape, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, shape, seed), daemon=True)
        self.process.start()
        theirs.close()
        self.address = str(self.hear())

    def tell(self, command: str, *arguments: Any) -> None:
        self._pipe.send((command, arguments))

    def hear(self) -> Any:
        """Its answer to the oldest command that has none yet."""
        assert self._pipe.poll(ANSWER_S), "the other process does not answer"
        return self._pipe.recv()

    def ask(self, command: str, *arguments: Any) -> Any:
        self.tell(command, *arguments)
        return self.hear()

    def close(self) -> None:
        self.process.kill()
        self.process.join(20)
        self._pipe.close()


def _serve(pipe: Connection, shape: Shape, seed: int) -> None:
    device = torch.device("cuda", shape.device_index)
    runtime = cuda_runtime()
    pool = CudaPool(shape.num_blocks * shape.block_bytes, device, runtime)
    rows = pool.tensor.view(shape.num_blocks, shape.block_bytes)
    rows.copy_(random_rows(shape, seed, device))
    pool.settle(TIMEOUT_S)
    pipe.send(pool.address)
    sources: dict[str, NcclSource] = {}
    while True:
        command, arguments = pipe.recv()
        if command == "close":
            pool.close()
            pipe.send("closed")
        elif command == "write":
            pipe.send(_write(pool, rows, shape, *arguments))
        elif command == "digests":
            pipe.send(_digests(rows, *arguments))
        elif command == "send":
            pipe.send(_send(sources, rows, *arguments))


def _write(pool: CudaPool, rows: torch.Tensor, shape: Shape, seed: int, busy_cycles: int) -> str:
    """New content, behind so much other work that without `settle` it could not be there yet."""
    fresh = random_rows(shape, seed, rows.device)
    _cuda._sleep(busy_cycles)
    rows.copy_(fresh, non_blocking=True)
    pool.settle(TIMEOUT_S)
    return "written"


def _digests(rows: torch.Tensor, moved: Transfer, first: int, block_ids: Sequence[int]) -> tuple[int, ...]:
    return Digester(ON_DEVICE).digests(moved.id, moved.layout_hash, first, rows, block_ids)


def _send(
    sources: dict[str, NcclSource],
    rows: torch.Tensor,
    address: str,
    moved: Transfer,
    block_ids: Sequence[int],
    message_bytes: int,
    timeout_s: float,
) -> str:
    """ "sent", or what went wrong. One link for each address."""
    if address not in sources:
        epoch, runtime = moved.link_epoch, cuda_runtime()
        sources[address] = NcclSource(address, rows, moved.layout_hash, epoch, message_bytes, runtime)
    try:
        sources[address].send(moved, block_ids, timeout_s)
    except PdserveError as error:
        return f"{type(error).__name__}: {error}"
    return "sent"
