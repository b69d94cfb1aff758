"""What KV travels over: shared memory that a peer reads by itself, and wires that the source writes to.

Owner of the memories and of the waiting ends, by address, and of what goes wrong on the way: flipped bytes, swapped and
forgotten blocks, wires that break, and reads and writes that go on long after everybody has given up. Moves single
blocks; knows nothing of hand-offs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt
from simulation.loop import Process
from simulation.network import Network

from pdserve.kv_transfer.link import Transfer, check_header
from pdserve.proto.errors import PdserveError, TransferFailed

Rows = npt.NDArray[np.uint8]  # [num_blocks, block_bytes]


@dataclass(slots=True)
class WireFaults:
    """Probabilities for each block, while the faults last. `block_s`: what a block takes."""

    block_s: float = 0.0005
    flip: float = 0.0
    swap: float = 0.0
    forget: float = 0.0
    breaks: float = 0.0
    hangs: float = 0.0
    hang_s: float = 0.0

    def calm(self) -> None:
        self.flip = self.swap = self.forget = self.breaks = self.hangs = 0.0


class Sink:
    """Where a source's blocks arrive. Writes them only while a transfer is on; `write(i, block)` verifies too."""

    def __init__(self, address: str, process: Process) -> None:
        self.address = address
        self.process = process
        self.is_open = True
        self._transfer: Transfer | None = None
        self._write: Callable[[int, bytes | None], None] | None = None
        self._done: asyncio.Future[None] | None = None
        self._num_left = 0
        self._early: list[tuple[bytes, int, bytes | None]] = []  # came before they were waited for

    def close(self) -> None:
        self.is_open = False
        self._write = None
        self._early.clear()

    def begin(self, transfer: Transfer, write: Callable[[int, bytes | None], None]) -> asyncio.Future[None]:
        self._transfer, self._write, self._num_left = transfer, write, transfer.num_blocks
        self._done = asyncio.get_running_loop().create_future()
        early, self._early = self._early, []
        for header, position, block in early:
            self.arrive(header, position, block)
        return self._done

    def end(self) -> None:
        """The wire is idle: nothing is written from now on."""
        self._write = None

    def arrive(self, header: bytes, position: int, block: bytes | None) -> None:
        """In the sink's process. `None`: nothing was written, but it is said to be there."""
        if self._write is None or self._done is None or self._transfer is None:
            if self.is_open:
                self._early.append((header, position, block))
            return
        try:
            check_header(header, self._transfer)
            self._write(position, block)
        except PdserveError as error:
            self._fail(error)
            return
        self._num_left -= 1
        if self._num_left == 0 and not self._done.done():
            self._done.set_result(None)

    def broken(self) -> None:
        self.is_open = False
        self._fail(TransferFailed("the wire broke"))

    def _fail(self, error: PdserveError) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


class Wires:
    """Owner of memories and sinks."""

    def __init__(self, network: Network, random: Random, faults: WireFaults) -> None:
        self.network = network
        self.random = random
        self.faults = faults
        self._memories: dict[str, Rows] = {}
        self._sinks: dict[str, Sink] = {}
        self._num_sinks = 0

    def share(self, address: str, rows: Rows) -> None:
        self._memories[address] = rows

    def unlink(self, address: str) -> None:
        """Nobody finds it any more; who has it open goes on reading."""
        self._memories.pop(address, None)

    def memory(self, address: str) -> Rows:
        if address not in self._memories:
            raise TransferFailed("the peer's memory is gone")
        return self._memories[address]

    def sink(self, process: Process) -> Sink:
        self._num_sinks += 1
        address = f"{process.name}/wire{self._num_sinks}"
        self._sinks[address] = Sink(address, process)
        return self._sinks[address]

    async def pause(self) -> None:
        """What one block takes; hanging wires take far longer. Raises TransferFailed where it breaks."""
        faults, random = self.faults, self.random
        pause_s = faults.block_s * random.uniform(0.5, 1.5)
        if faults.hangs and random.random() < faults.hangs:
            self.network.trace.count("wires hung")
            pause_s += random.uniform(0.1, faults.hang_s)
        await asyncio.sleep(pause_s)
        if faults.breaks and random.random() < faults.breaks:
            self.network.trace.count("wires broken")
            raise TransferFailed("the wire broke")

    def carry(self, rows: Rows, block_id: int) -> bytes | None:
        """A block as it gets to the other side; `None` if it does not, and nobody is told."""
        faults, random, trace = self.faults, self.random, self.network.trace
        if faults.swap and random.random() < faults.swap:
            trace.count("blocks swapped")
            block_id = (block_id + 1) % len(rows)
        block: bytes = rows[block_id].tobytes()
        if faults.forget and random.random() < faults.forget:
            trace.count("blocks forgotten")
            return None
        if faults.flip and random.random() < faults.flip:
            trace.count("bytes flipped")
            place = random.randrange(len(block))
            block = block[:place] + bytes([block[place] ^ (1 << random.randrange(8))]) + block[place + 1 :]
        return block

    def send(self, source: Process, address: str, header: bytes, position: int, block: bytes | None) -> None:
        """A block to a sink. Raises TransferFailed if nobody is there."""
        sink = self._open_sink(address)
        if self.network.is_cut(source.name, sink.process.name):
            return
        loop = self.network.loop
        loop.at(loop.now_s + self.network.weather.latency_s, sink.process, sink.arrive, header, position, block)

    def broke(self, source: Process, address: str) -> None:
        """The source closed its end."""
        sink = self._sinks.get(address)
        if sink is not None and sink.is_open and not self.network.is_cut(source.name, sink.process.name):
            loop = self.network.loop
            loop.at(loop.now_s + self.network.weather.latency_s, sink.process, sink.broken)

    def _open_sink(self, address: str) -> Sink:
        sink = self._sinks.get(address)
        if sink is None or not sink.is_open or sink.process.is_dead:
            raise TransferFailed(f"nobody waits at {address}")
        return sink
