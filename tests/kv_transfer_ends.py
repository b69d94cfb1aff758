"""Both ends of each kind of link over host memory, for the contract's cases, and a source in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection

import link_contract
import torch
from link_contract import BLOCK_BYTES, LAYOUT, NUM_BLOCKS, TIMEOUT_S, Ends, random_pool, transfer
from xxhash import xxh3_64_intdigest

from pdserve.kv_transfer.digest import Digester
from pdserve.kv_transfer.gloo import GlooSink, GlooSource
from pdserve.kv_transfer.link import Deadline
from pdserve.kv_transfer.loopback import LoopbackSink
from pdserve.kv_transfer.process_group import PairGroup
from pdserve.kv_transfer.rendezvous import connect
from pdserve.kv_transfer.shared_pool import SharedPool
from pdserve.kv_transfer.shm import ShmSink

HOST = "127.0.0.1"
MESSAGE_BYTES = 3 * BLOCK_BYTES + 1  # a transfer of all blocks takes twice as many messages as are pending at a time
SEED = 1  # of the source's blocks


def open_loopback(link_epoch: int = 1) -> Ends:
    source_pool = random_pool(SEED)
    sink = LoopbackSink(source_pool, LAYOUT, link_epoch)
    return Ends(source_pool, random_pool(1000), sink, None, Digester("xxh3"))


def open_shm(link_epoch: int = 1) -> Ends:
    memory = shared_blocks(SEED)
    sink = ShmSink(memory.address, LAYOUT, link_epoch)
    pool = memory.tensor.view(NUM_BLOCKS, BLOCK_BYTES)
    return Ends(pool, random_pool(1000), sink, None, Digester("xxh3"), memory.close)


def open_gloo(link_epoch: int = 1) -> Ends:
    source_pool = random_pool(SEED)
    sink = GlooSink(LAYOUT, link_epoch, HOST, MESSAGE_BYTES)

    def source(layout_hash: int, link_epoch: int) -> GlooSource:
        return GlooSource(sink.address, source_pool, layout_hash, link_epoch, HOST, MESSAGE_BYTES)

    ends = Ends(source_pool, random_pool(1000), sink, source(LAYOUT, link_epoch), Digester("xxh3"))
    ends.another_source = source
    return ends


OPENERS: dict[str, link_contract.OpenEnds] = {"loopback": open_loopback, "shm": open_shm, "gloo": open_gloo}


def shared_blocks(seed: int) -> SharedPool:
    memory = SharedPool(NUM_BLOCKS * BLOCK_BYTES)
    memory.tensor.copy_(random_pool(seed).flatten())
    return memory


# A source in a process of its own. It reports through `pipe` and lives until killed.


def serve_shared_pool(pipe: Connection, seed: int) -> None:
    pool = shared_blocks(seed)
    pipe.send(pool.address)
    pipe.recv()


def serve_gloo(pipe: Connection, seed: int) -> None:
    """Runs the transfers it is told of: (address, epoch, what to do at the last message)."""
    torch.set_num_threads(1)
    pool = random_pool(seed)
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
    """Send the announcement and the first of two messages, then be killed or stopped."""
    deadline = Deadline(TIMEOUT_S)
    group = PairGroup(connect(address, deadline), 1, HOST, deadline)
    plan = xxh3_64_intdigest(b"[(3,), (3,)]").to_bytes(8, "little")
    announcement = bytearray(transfer(6, epoch).header() + plan)
    group.send(torch.frombuffer(announcement, dtype=torch.uint8)).wait(deadline)
    group.send(pool[:3]).wait(deadline)
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

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def close(self) -> None:
        self.kill()
        self.process.close()
        self.pipe.close()
