"""The prefill worker's side of a hand-off: its states, what happens to it, and what it asks for. Frozen values.

    (nothing) --Accept--> ACCEPTED --PartComputed--> LEASED --PartComputed--> LEASED ...
    LEASED      --SendStarted--> SENDING --a newer SendStarted--> SENDING --SendEnded of the last--> LEASED
    ACCEPTED    --Abort | Release--> gone
    LEASED      --Release | Abort | Tick after expiry--> gone, blocks freed
    SENDING     --Release | Abort | Tick after expiry--> QUARANTINED, blocks still untouchable
    QUARANTINED --SendEnded of the last running send--> gone, blocks freed

KV leaves in *parts*: runs of blocks that are complete while later chunks of the prompt are still being computed. Each
part is offered once the one before it was accepted; an offer that got no answer is repeated until the lease lapses,
one that was refused ends the hand-off aloud, so that nobody waits for KV that will never come. A lease that ends before
its last part says `StopPrefill`: the rest of the prompt is not worth computing, and must not read freed blocks.

Only `SendEnded` proves that a send no longer reads the blocks; until then they are never freed, whatever the
decode worker said. Only `Tick` lapses a lease, so that an expired one is treated alike whichever message comes
first: it can no longer be renewed or sent. A send is identified by its link epoch and its part: a repeated or older
`SendStarted` starts nothing. A newer one may come while an older send runs: the target has all the bytes of a part
before we know that our send of it has ended, or has given an attempt up that still runs here. Both only read.

A one-sided read (shared memory) happens under the lease without SENDING: the reader renews while it reads. If the
lease is lost all the same, it reads blocks that may be in use again; the digest over its own copy catches that.

Knows nothing of how blocks are allocated (two leases may share a cached block: whoever frees counts claims) nor of what
a link is. `lease_step` holds the transitions, `leases` the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from pdserve.kv_transfer.effects import FreeBlocks, Ignored, QuarantineBlocks, Refused
from pdserve.proto.types import HandoffId, WorkerRef


class LeaseState(StrEnum):
    ACCEPTED = "accepted"
    LEASED = "leased"
    SENDING = "sending"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """How long a silent decode worker is waited for, and how soon an unanswered offer is repeated."""

    lease_s: float
    retry_s: float


@dataclass(frozen=True, slots=True, order=True)
class SendKey:
    """Which send: newer ones compare greater. A rebuilt link outranks every part of the one before."""

    link_epoch: int
    part: int


class Lease(NamedTuple):
    """`parts` are the block ids of each part so far; the last brings `first_token`. `num_tokens` is the prompt's.

    `num_accepted` parts the target knows of; `is_offering`: an offer is out and not answered. `send` is the newest
    send, `None` before the first; `running` are those that may still read. Times are on the owner's clock; `expires_s`
    counts from the first part on.
    """

    id: HandoffId
    target: WorkerRef
    num_tokens: int
    times: LeaseTimes
    state: LeaseState = LeaseState.ACCEPTED
    parts: tuple[tuple[int, ...], ...] = ()
    first_token: int | None = None
    num_accepted: int = 0
    is_offering: bool = False
    offer_at_s: float = 0.0
    expires_s: float = 0.0
    send: SendKey | None = None
    running: tuple[SendKey, ...] = ()

    @property
    def block_ids(self) -> tuple[int, ...]:
        return sum(self.parts, ())

    @property
    def is_complete(self) -> bool:
        return self.first_token is not None

    @property
    def is_live(self) -> bool:
        """Whether the target may still renew and redeem it."""
        return self.state in (LeaseState.LEASED, LeaseState.SENDING)

    def is_expired(self, now_s: float) -> bool:
        return self.is_live and now_s >= self.expires_s


# Events.


@dataclass(frozen=True, slots=True)
class Accept:
    """The router asks for a prompt of `num_tokens` whose KV goes to `target`."""

    id: HandoffId
    target: WorkerRef
    num_tokens: int
    times: LeaseTimes


@dataclass(frozen=True, slots=True)
class PartComputed:
    """These blocks are final, and this lease's from now on, whatever its state. The last ones bring `first_token`."""

    id: HandoffId
    block_ids: tuple[int, ...]
    first_token: int | None = None


@dataclass(frozen=True, slots=True)
class OfferEnded:
    """The answer to an offer. `error_kind` is "" if it was accepted; `is_transient` if there was no answer."""

    id: HandoffId
    part: int
    error_kind: str = ""
    message: str = ""
    is_transient: bool = False


@dataclass(frozen=True, slots=True)
class Renew:
    id: HandoffId


@dataclass(frozen=True, slots=True)
class SendStarted:
    """`target` redeems a part from its block `first` on: what comes before, it holds already."""

    id: HandoffId
    target: WorkerRef
    key: SendKey
    first: int = 0


@dataclass(frozen=True, slots=True)
class SendEnded:
    """That send reads no block any more, whatever became of it."""

    id: HandoffId
    key: SendKey


@dataclass(frozen=True, slots=True)
class Release:
    id: HandoffId
    outcome: str


@dataclass(frozen=True, slots=True)
class Abort:
    id: HandoffId
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    id: HandoffId


LeaseEvent = Accept | PartComputed | OfferEnded | Renew | SendStarted | SendEnded | Release | Abort | Tick


# Effects of this side only.


@dataclass(frozen=True, slots=True)
class SendOffer:
    """Tell the target that this part can be redeemed; answer `OfferEnded`, whatever happened.

    `first_block` is the position of the part's first block in the hand-off; the last part brings `first_token`.
    """

    id: HandoffId
    target: WorkerRef
    num_tokens: int
    part: int
    first_block: int
    block_ids: tuple[int, ...]
    first_token: int | None


@dataclass(frozen=True, slots=True)
class StartSend:
    """Send these blocks over the link of this epoch, then report `SendEnded`, whatever happened."""

    id: HandoffId
    target: WorkerRef
    key: SendKey
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StopPrefill:
    """Compute no further chunk of this prompt. Comes before its blocks are freed."""

    id: HandoffId


@dataclass(frozen=True, slots=True)
class LeaseRenewed:
    id: HandoffId
    expires_s: float


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """The decode worker asked to renew what it no longer has."""

    id: HandoffId
    reason: str


@dataclass(frozen=True, slots=True)
class HandoffFailed:
    """The request ends here with this error."""

    id: HandoffId
    kind: str
    message: str


LeaseEffect = (
    FreeBlocks
    | QuarantineBlocks
    | Refused
    | Ignored
    | SendOffer
    | StartSend
    | StopPrefill
    | LeaseRenewed
    | LeaseLost
    | HandoffFailed
)
LeaseEffects = tuple[LeaseEffect, ...]
LeaseStep = tuple[Lease | None, LeaseEffects]
