"""The decode worker's side of a hand-off: its states, what happens to it, and what it asks for. Frozen values.

    (nothing) --Expect--> RESERVED --Offer--> OFFERED --Room--> OFFERED, asked --BlocksTaken--> TRANSFERRING
    TRANSFERRING --TransferEnded: ok--> VERIFYING --Verified: ok--> gone, admitted
    TRANSFERRING --Abort | Tick after the deadline--> QUARANTINED --TransferEnded | WireIdle--> gone, blocks freed
    every other failure, Abort or missed deadline --> gone, failed

The reservation (a count of promised blocks) ends exactly once, with `Unreserve`: when the blocks themselves are
taken or when the request ends before. The request ends exactly once, with `Admit` or `Fail`, at once; its memory
may have to wait in quarantine until the wire is proven idle. Blocks that come after its end are given straight back.

Each phase has its own deadline, capped by the request's. An offer that cannot be meant for this reservation (unknown
id, another source or generation) is refused and changes nothing; one that comes from the right source but cannot be
used (layout, numbers of blocks) ends the request too. The refused side is told by the answer to its call.

`reservation_step` holds the transitions, `reservations` the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pdserve.kv_transfer.effects import FreeBlocks, Ignored, QuarantineBlocks, Refused
from pdserve.proto.types import HandoffId, KVLayout, KVTicket, WorkerRef


class Phase(StrEnum):
    RESERVED = "reserved"
    OFFERED = "offered"
    TRANSFERRING = "transferring"
    VERIFYING = "verifying"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long each phase may last, and how often a lease is renewed."""

    reserve_s: float
    room_s: float
    transfer_s: float
    verify_s: float
    renew_s: float


@dataclass(frozen=True, slots=True)
class Reservation:
    """`deadline_s` is the phase's; all times are on the owner's clock. `ticket` is there from OFFERED on, `block_ids`
    (in this worker's pool) from TRANSFERRING on. `asked`: `TakeBlocks` is out and not answered.
    """

    id: HandoffId
    source: WorkerRef
    num_tokens: int
    layout: KVLayout
    timeouts: Timeouts
    request_deadline_s: float
    deadline_s: float
    phase: Phase = Phase.RESERVED
    ticket: KVTicket | None = None
    offered_s: float = 0.0
    renew_at_s: float = 0.0
    asked: bool = False
    block_ids: tuple[int, ...] = ()

    @property
    def num_blocks(self) -> int:
        return self.layout.num_blocks(self.num_tokens)

    @property
    def is_leased(self) -> bool:
        """Whether the source keeps blocks that this side still wants."""
        return self.phase in (Phase.OFFERED, Phase.TRANSFERRING, Phase.VERIFYING)


# Events.


@dataclass(frozen=True, slots=True)
class Expect:
    """The router announces a hand-off. `num_tokens` is the prompt's length: the KV that will arrive."""

    id: HandoffId
    source: WorkerRef
    num_tokens: int
    layout: KVLayout
    timeouts: Timeouts
    request_deadline_s: float


@dataclass(frozen=True, slots=True)
class Offer:
    id: HandoffId
    ticket: KVTicket


@dataclass(frozen=True, slots=True)
class Room:
    """There is room for the blocks, and it is this hand-off's turn."""

    id: HandoffId


@dataclass(frozen=True, slots=True)
class BlocksTaken:
    id: HandoffId
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlocksRefused:
    """There was no room after all; ask again."""

    id: HandoffId


@dataclass(frozen=True, slots=True)
class TransferEnded:
    """The wire is idle. `error_kind` is "" if all bytes arrived."""

    id: HandoffId
    error_kind: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class WireIdle:
    """The link was destroyed and nothing of it can write any more, whatever became of the transfer."""

    id: HandoffId


@dataclass(frozen=True, slots=True)
class Verified:
    """`error_kind` is "" if every digest matched."""

    id: HandoffId
    error_kind: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Abort:
    id: HandoffId
    reason: str
    error_kind: str = "RequestCancelled"


@dataclass(frozen=True, slots=True)
class RenewDue:
    id: HandoffId


@dataclass(frozen=True, slots=True)
class Tick:
    id: HandoffId


ReservationEvent = (
    Expect | Offer | Room | BlocksTaken | BlocksRefused | TransferEnded | WireIdle | Verified | Abort | RenewDue | Tick
)


# Effects of this side only.


@dataclass(frozen=True, slots=True)
class TakeBlocks:
    """Take this many blocks for receiving; answer `BlocksTaken` or `BlocksRefused`."""

    id: HandoffId
    num_blocks: int


@dataclass(frozen=True, slots=True)
class StartTransfer:
    """Fetch the ticket's blocks into `block_ids`; answer `TransferEnded` when the wire is idle, whatever happened."""

    id: HandoffId
    ticket: KVTicket
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StartVerify:
    id: HandoffId
    ticket: KVTicket
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Admit:
    """The KV is what was sent: the blocks are the sequence's now, and it may run."""

    id: HandoffId
    ticket: KVTicket
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fail:
    """The request ends here with this error."""

    id: HandoffId
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Unreserve:
    """The promise of this many blocks ends: they are taken, or not needed any more."""

    id: HandoffId
    num_blocks: int


@dataclass(frozen=True, slots=True)
class SendRelease:
    """Tell the source that its lease is no longer wanted: "redeemed", or why not."""

    id: HandoffId
    source: WorkerRef
    outcome: str


@dataclass(frozen=True, slots=True)
class RenewLease:
    id: HandoffId
    source: WorkerRef


ReservationEffect = (
    TakeBlocks
    | StartTransfer
    | StartVerify
    | Admit
    | Fail
    | Unreserve
    | SendRelease
    | RenewLease
    | FreeBlocks
    | QuarantineBlocks
    | Refused
    | Ignored
)
Effects = tuple[ReservationEffect, ...]
ReservationStep = tuple[Reservation | None, Effects]
