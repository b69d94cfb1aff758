"""The decode worker's side of a hand-off: its states, what happens to it, and what it asks for. Frozen values.

    (nothing) --Expect--> RESERVED --Offer of part 0--> OFFERED --Room--> OFFERED, asked --BlocksTaken--> WAITING
    WAITING      --a part is offered--> TRANSFERRING --PartEnded: verified--> WAITING ... --the last--> gone, admitted
    TRANSFERRING --PartEnded: failed, pulls left--> TRANSFERRING, once more
    TRANSFERRING --Abort | Tick after the deadline--> QUARANTINED --PartEnded--> gone, blocks freed
    every other failure, Abort or missed deadline --> gone, failed

Parts of the prompt's KV are offered in order, while the prefill worker computes the next ones. Blocks for all of it are
taken when the first part is there; what this worker holds already (a prefix of the same tokens) is not fetched again.
A part is fetched and verified in one go: `PartEnded` without an error means that every block's digest matched, and
the request is admitted only when that holds for every part: no token is computed from anything else.

The reservation (a count of promised blocks) ends exactly once, with `Unreserve`: when the blocks themselves are
taken or when the request ends before. The request ends exactly once, with `Admit` or `Fail`, at once; its memory
may have to wait in quarantine until `PartEnded` proves that the wire is idle. Blocks that come after its end are given
straight back.

Each phase has its own deadline, capped by the request's and renewed only by progress. An offer that cannot be meant
for this reservation (unknown id, another source or generation, a part out of order) is refused and changes nothing;
one that comes from the right source but cannot be used (layout, numbers of blocks) ends the request too. The refused
side is told by the answer to its call.

`reservation_step` holds the transitions, `reservations` the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from pdserve.kv_transfer.effects import FreeBlocks, Ignored, QuarantineBlocks, Refused
from pdserve.proto.types import HandoffId, KVLayout, KVPart, KVTicket, WorkerRef


class Phase(StrEnum):
    RESERVED = "reserved"
    OFFERED = "offered"
    WAITING = "waiting for the next part"
    TRANSFERRING = "transferring"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long each phase may last, how often a lease is renewed, how often a part is pulled before it counts as lost.

    `part_s` is how long the source may take from one part to the next.
    """

    reserve_s: float
    room_s: float
    part_s: float
    transfer_s: float
    renew_s: float
    max_pulls: int


class Reservation(NamedTuple):
    """`deadline_s` is the phase's; all times are on the owner's clock.

    `ticket` and the first of `parts` are there from OFFERED on; `block_ids` (in this worker's pool, for the whole
    prompt) from WAITING on; the first `num_held` of them held the right KV before. `num_done` parts are verified or
    not needed. `num_pulls` counts fetches of the present part. `asked`: `TakeBlocks` is out and not answered.
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
    parts: tuple[KVPart, ...] = ()
    num_done: int = 0
    num_pulls: int = 0
    offered_s: float = 0.0
    renew_at_s: float = 0.0
    asked: bool = False
    block_ids: tuple[int, ...] = ()
    num_held: int = 0

    @property
    def num_blocks(self) -> int:
        return self.layout.num_blocks(self.num_tokens)

    @property
    def num_offered_blocks(self) -> int:
        """In the source's blocks."""
        return sum(len(part.block_ids) for part in self.parts)

    @property
    def first_needed(self) -> int:
        """Position of the first of the source's blocks that has to be fetched."""
        assert self.ticket is not None
        return self.num_held * self.layout.block_size // self.ticket.layout.block_size

    @property
    def num_missing_blocks(self) -> int:
        """Of the source's blocks: offered, needed, and not verified here yet."""
        missing = self.parts[self.num_done :]
        if not missing:
            return 0
        return self.num_offered_blocks - max(missing[0].first_block, self.first_needed)

    @property
    def is_complete(self) -> bool:
        """Whether the last part has been offered."""
        return bool(self.parts) and self.parts[-1].is_last

    @property
    def is_leased(self) -> bool:
        """Whether the source keeps blocks that this side still wants."""
        return self.phase in (Phase.OFFERED, Phase.WAITING, Phase.TRANSFERRING)


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
    part: KVPart


@dataclass(frozen=True, slots=True)
class Room:
    """There is room for the blocks, and it is this hand-off's turn."""

    id: HandoffId


@dataclass(frozen=True, slots=True)
class BlocksTaken:
    """The first `num_held` blocks hold the prompt's first tokens already, shared with others."""

    id: HandoffId
    block_ids: tuple[int, ...]
    num_held: int = 0


@dataclass(frozen=True, slots=True)
class BlocksRefused:
    """There was no room after all; ask again."""

    id: HandoffId


@dataclass(frozen=True, slots=True)
class PartEnded:
    """The wire is idle. `error_kind` is "" if every block of the part arrived and its digest matched."""

    id: HandoffId
    part: int
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


ReservationEvent = Expect | Offer | Room | BlocksTaken | BlocksRefused | PartEnded | Abort | RenewDue | Tick


# Effects of this side only.


@dataclass(frozen=True, slots=True)
class TakeBlocks:
    """Take this many blocks, those that hold a prefix of the prompt first; answer `BlocksTaken` or `BlocksRefused`."""

    id: HandoffId
    num_blocks: int


@dataclass(frozen=True, slots=True)
class FetchPart:
    """Fetch the part's blocks from `first` on and verify them; answer `PartEnded` when the wire is idle, whatever
    happened. They belong into `block_ids`, this worker's blocks for the whole prompt."""

    id: HandoffId
    ticket: KVTicket
    part: KVPart
    first: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Admit:
    """The KV is what was sent: the blocks are the sequence's now, and it may run."""

    id: HandoffId
    first_token: int
    block_ids: tuple[int, ...]
    num_held: int


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
class ReleaseHeld:
    """Blocks of a held prefix are not needed any more. Nothing was ever written to them."""

    id: HandoffId
    block_ids: tuple[int, ...]


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


Effect = (
    TakeBlocks
    | FetchPart
    | Admit
    | Fail
    | Unreserve
    | ReleaseHeld
    | SendRelease
    | RenewLease
    | FreeBlocks
    | QuarantineBlocks
    | Refused
    | Ignored
)
Effects = tuple[Effect, ...]
ReservationStep = tuple[Reservation | None, Effects]
