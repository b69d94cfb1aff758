"""What the checked system is made of: its bounds, its faults, its blocks. Frozen values, compared and hashed.

A request is a number, a worker is a number (0 is the prefill worker), a block's content says whose KV it is. Knows
neither the real tables nor how messages travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

from pdserve.proto.types import HandoffId, KVLayout, WorkerRef

NUM_PARTS = 2
BLOCKS_PER_PART = 1
NUM_BLOCKS = NUM_PARTS * BLOCKS_PER_PART
LAYOUT = KVLayout("model", "float32", 1, 1, 1, block_size=1)
FIRST_TOKEN = 7
PREFILL = 0
GARBAGE = 0  # a block's content that is nobody's KV; a later owner's KV is never written as garbage


def content_of(request: int, position: int) -> int:
    """What a block holds once `request` has computed (or received) its block at `position`."""
    return 1 + request * NUM_BLOCKS + position


@dataclass(frozen=True, slots=True)
class Setting:
    """One configuration to search exhaustively. `targets[r]` is the decode worker of request `r`, counted from 1.

    `timers`: leases lapse, phases and transfers time out, at any moment. `attempts`: request `r + 1` is the next
    attempt at the request of attempt `r`, started when that one is over. The other numbers bound the faults.
    """

    name: str
    targets: tuple[int, ...] = (1,)
    one_sided: bool = False
    attempts: bool = False
    timers: bool = False
    pool_blocks: int = 4
    crashes: int = 0
    losses: int = 0
    duplicates: int = 0
    cancels: int = 0
    export_failures: int = 0

    @property
    def num_requests(self) -> int:
        return len(self.targets)

    @property
    def num_workers(self) -> int:
        return 1 + max(self.targets)

    @property
    def budget(self) -> tuple[int, ...]:
        """In the order of `Fault`."""
        return (self.crashes, self.losses, self.duplicates, self.cancels, self.export_failures)

    def id(self, request: int) -> HandoffId:
        return HandoffId("A", request, 1) if self.attempts else HandoffId("AB"[request], 0, 1)

    def label(self, request: int) -> str:
        return f"A#{request}" if self.attempts else "AB"[request]

    def bounds(self) -> str:
        """What the search covers, for people."""
        names = ("crash", "loss", "duplicate", "cancel", "failed export")
        plurals = ("crashes", "losses", "duplicates", "cancels", "failed exports")
        faults = [
            f"{count} {plural if count > 1 else name}"
            for count, name, plural in zip(self.budget, names, plurals, strict=True)
            if count
        ]
        what = ("attempt" if self.attempts else "request") + "s" * (self.num_requests > 1)
        places = "+".join(f"d{target}" for target in sorted(set(self.targets)))
        requests = f"{self.num_requests} {what} p0-{places}"
        link = "one-sided" if self.one_sided else "two-sided"
        timers = ["timers"] if self.timers else []
        return ", ".join([requests, link, f"{self.pool_blocks} blocks", *timers, *faults])


class Fault(IntEnum):
    CRASH = 0
    LOSS = 1
    DUPLICATE = 2
    CANCEL = 3
    EXPORT = 4


class Mark(IntEnum):
    """What has befallen a request, so that its end can be judged. Bits."""

    CANCELLED = 1
    EXPIRED = 2
    CRASHED = 4
    CALL_LOST = 8
    PULL_LOST = 16
    PULLS_LOST = 32
    EXPORT_FAILED = 64


class Kind(IntEnum):
    """Why a step is taken: progress that must come, a timer, a fault within the budget, a message nobody waits for."""

    MUST = 0
    TIMER = 1
    FAULT = 2
    LATE = 3


def worker_name(worker: int) -> str:
    return "p0" if worker == PREFILL else f"d{worker}"


def worker_ref(worker: int, generation: int) -> WorkerRef:
    return WorkerRef(worker_name(worker), generation, worker_name(worker))


class BlockUse(StrEnum):
    FREE = "free"
    RUNNING = "running"
    LEASED = "leased"
    RECEIVING = "receiving"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class Block:
    use: BlockUse = BlockUse.FREE
    owner: int = -1
    content: int = GARBAGE
