"""Two ends of one link for the contract tests, and the other end in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from pdserve.kv_transfer.gloo import GlooSink, GlooSource
from pdserve.kv_transfer.link import Deadline, LinkSink, LinkSource, Transfer
from pdserve.kv_transfer.loopback import LoopbackSink
from pdserve.kv_transfer.process_group import PairGroup
from pdserve.kv_transfer.rendezvous import connect
from pdserve.kv_transfer.shared_pool import SharedPool
from pdserve.kv_transfer.shm import ShmSink
from pdserve.proto.types import HandoffId

HOST = "127.0.0.1"
BLOCK_BYTES = 4096
NUM_BLOCKS = 12
LAYOUT = 0x1234_5678_9ABC_DEF0
MESSAGE_BYTES = 3 * BLOCK_BYTES + 1  # transfers of more than three blocks take several messages
TIMEOUT_S = 20.0

KINDS = ("loopback", "shm", "gloo")


def transfer(num_blocks: int, epoch: int = 1, attempt: int = 0) -> Transfer:
    return Transfer(HandoffId("request", attempt, 7), num_blocks, BLOCK_BYTES, LAYOUT, epoch)


def random_bytes(num_bytes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


@dataclass
class Ends:
    """Both ends in this process. `send` and `receive` may be given different ideas of the transfer."""

    kind: str
    source_pool: torch.Tensor
    target_pool: torch.Tensor
    sink: LinkSink
    source: LinkSource | None
    shared: SharedPool | None

    def move(
        self,
        wanted: Transfer,
        source_ids: Sequence[int],
        target_ids: Sequence[int],
        sent: Transfer | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        if self.source is None:
            self.sink.receive(wanted, source_ids, target_ids, timeout_s)
            return
        errors: list[Exception] = []
        thread = threading.Thread(
            target=self._send, args=(self.source, sent or wanted, source_ids, timeout_s, errors), daemon=True
        )
        thread.start()
        try:
            self.sink.receive(wanted, source_ids, target_ids, timeout_s)
        finally:
            thread.join(2 * TIMEOUT_S)
            assert not thread.is_alive()
        assert not errors, errors

    @staticmethod
    def _send(
        source: LinkSource, sent: Transfer, ids: Sequence[int], timeout_s: float, errors: list[Exception]
    ) -> None:
        try:
            source.send(sent, ids, timeout_s)
        except Exception as error:
            errors.append(error)

    def close(self) -> None:
        self.sink.close()
        if self.source is not None:
            self.source.close()
        if self.shared is not None:
            self.shared.close()


def open_ends(kind: str, epoch: int = 1, seed: int = 1) -> Ends:
    target_pool = random_bytes(NUM_BLOCKS * BLOCK_BYTES, seed + 1000).view(NUM_BLOCKS, BLOCK_BYTES)
    content = random_bytes(NUM_BLOCKS * BLOCK_BYTES, seed)
    shared = SharedPool(NUM_BLOCKS * BLOCK_BYTES) if kind == "shm" else None
    flat = content if shared is None else shared.tensor.copy_(content)
    source_pool = flat.view(NUM_BLOCKS, BLOCK_BYTES)
    sink: LinkSink
    source: LinkSource | None = None
    if kind == "loopback":
        sink = LoopbackSink(source_pool, target_pool, LAYOUT, epoch)
    elif kind == "shm":
        assert shared is not None
        sink = ShmSink(shared.address, target_pool, LAYOUT, epoch)
    else:
        sink = GlooSink(target_pool, LAYOUT, epoch, HOST, MESSAGE_BYTES)
        source = GlooSource(sink.address, source_pool, LAYOUT, epoch, HOST, MESSAGE_BYTES)
    return Ends(kind, source_pool, target_pool, sink, source, shared)


def reversed_ends(ends: Ends) -> Ends:
    """The link for the other direction between the same two pools; loopback and gloo only need the tensors."""
    shared = None
    source_pool = ends.target_pool
    if ends.kind == "shm":
        shared = SharedPool(NUM_BLOCKS * BLOCK_BYTES)
        source_pool = shared.tensor.copy_(source_pool.flatten()).view(NUM_BLOCKS, BLOCK_BYTES)
    target_pool = ends.source_pool
    sink: LinkSink
    source: LinkSource | None = None
    if ends.kind == "loopback":
        sink = LoopbackSink(source_pool, target_pool, LAYOUT, 1)
    elif ends.kind == "shm":
        assert shared is not None
        sink = ShmSink(shared.address, target_pool, LAYOUT, 1)
    else:
        sink = GlooSink(target_pool, LAYOUT, 1, HOST, MESSAGE_BYTES)
        source = GlooSource(sink.address, source_pool, LAYOUT, 1, HOST, MESSAGE_BYTES)
    return Ends(ends.kind, source_pool, target_pool, sink, source, shared)


# A source in a process of its own. It reports through `pipe` and lives until killed.


def serve_shared_pool(pipe: Connection, seed: int) -> None:
    pool = SharedPool(NUM_BLOCKS * BLOCK_BYTES)
    pool.tensor.copy_(random_bytes(NUM_BLOCKS * BLOCK_BYTES, seed))
    pipe.send(pool.address)
    pipe.recv()


def serve_gloo(pipe: Connection, seed: int) -> None:
    """Runs the transfers it is told of: (address, epoch, what to do at the last message)."""
    torch.set_num_threads(1)
    pool = random_bytes(NUM_BLOCKS * BLOCK_BYTES, seed).view(NUM_BLOCKS, BLOCK_BYTES)
    pipe.send("ready")
    while True:
        address, epoch, ending = pipe.recv()
        if ending == "send":
            source = GlooSource(address, pool, LAYOUT, epoch, HOST, MESSAGE_BYTES)
            source.send(transfer(4, epoch), (0, 1, 2, 3), TIMEOUT_S)
            source.close()
            pipe.send("sent")
        else:
            die_half_way(address, epoch, ending, pool)


def die_half_way(address: str, epoch: int, ending: str, pool: torch.Tensor) -> None:
    """Send the header and the first of two messages, then be killed or stopped."""
    deadline = Deadline(TIMEOUT_S)
    group = PairGroup(connect(address, deadline), 1, HOST, deadline)
    header = transfer(6, epoch).header()
    group.send(torch.frombuffer(bytearray(header), dtype=torch.uint8), deadline)
    group.send(pool[:3], deadline)
    os.kill(os.getpid(), signal.SIGKILL if ending == "kill" else signal.SIGSTOP)


class Peer:
    """The other process. `close` kills it; it is gone afterwards."""

    def __init__(self, serve: object, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, seed), daemon=True)  # type: ignore[arg-type]
        self.process.start()
        theirs.close()

    def hear(self) -> str:
        assert self.pipe.poll(60), "the other process said nothing"
        return str(self.pipe.recv())

    def kill(self) -> None:
        self.process.kill()
        self.process.join(20)

    def close(self) -> None:
        self.kill()
        self.process.close()
        self.pipe.close()
