"""The prefill worker's side of a hand-off: blocks kept for one decode worker, for a limited time.

    (nothing) --Grant--> LEASED --SendStarted--> SENDING --SendEnded--> LEASED
    LEASED      --Release | Abort | Tick after expiry--> gone, blocks freed
    SENDING     --Release | Abort | Tick after expiry--> QUARANTINED, blocks still untouchable
    QUARANTINED --SendEnded of the running send--> gone, blocks freed

Only `SendEnded` proves that a send no longer reads the blocks; until then they are never freed, whatever the
decode worker said. Only `Tick` lapses a lease, so that an expired one is treated alike whichever message comes
first: it can no longer be renewed or sent. A send is identified by its link epoch, which grows: a repeated or
older `SendStarted` starts nothing.

A one-sided read (shared memory) happens under the lease without SENDING: the reader renews while it reads. If the
lease is lost all the same, it reads blocks that may be in use again; the digest over its own copy catches that.

Pure: no clock, no I/O. Knows nothing of how blocks are allocated (two leases may share a cached block: whoever
frees counts references) nor of what a link is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

from pdserve.kv_transfer.effects import FreeBlocks, Ignored, QuarantineBlocks, Refused, raise_refusal
from pdserve.proto.types import HandoffId, WorkerRef


class LeaseState(StrEnum):
    LEASED = "leased"
    SENDING = "sending"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class Lease:
    """`link_epoch` is that of the newest send, 0 before the first. `expires_s` is on the owner's clock."""

    id: HandoffId
    target: WorkerRef
    block_ids: tuple[int, ...]
    lease_s: float
    expires_s: float
    state: LeaseState = LeaseState.LEASED
    link_epoch: int = 0

    def is_expired(self, now_s: float) -> bool:
        return now_s >= self.expires_s


# Events.


@dataclass(frozen=True, slots=True)
class Grant:
    id: HandoffId
    target: WorkerRef
    block_ids: tuple[int, ...]
    lease_s: float


@dataclass(frozen=True, slots=True)
class Renew:
    id: HandoffId


@dataclass(frozen=True, slots=True)
class SendStarted:
    id: HandoffId
    link_epoch: int


@dataclass(frozen=True, slots=True)
class SendEnded:
    id: HandoffId
    link_epoch: int
    ok: bool


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


LeaseEvent = Grant | Renew | SendStarted | SendEnded | Release | Abort | Tick


# Effects of this side only.


@dataclass(frozen=True, slots=True)
class StartSend:
    """Send these blocks over the link of this epoch, then report `SendEnded`, whatever happened."""

    id: HandoffId
    target: WorkerRef
    block_ids: tuple[int, ...]
    link_epoch: int


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
class LeaseLapsed:
    """Nobody released or renewed in time."""

    id: HandoffId
    reason: str


LeaseEffect = FreeBlocks | QuarantineBlocks | Refused | Ignored | StartSend | LeaseRenewed | LeaseLost | LeaseLapsed
LeaseStep = tuple[Lease | None, tuple[LeaseEffect, ...]]


def step(lease: Lease | None, event: LeaseEvent, now_s: float) -> LeaseStep:
    """What `event` makes of `lease` at `now_s`. `None` is a hand-off without a lease, before or after."""
    match event:
        case Grant():
            return _grant(lease, event, now_s)
        case Renew():
            return _renew(lease, event, now_s)
        case SendStarted():
            return _start_send(lease, event, now_s)
        case SendEnded():
            return _end_send(lease, event)
        case Release(id, outcome):
            return _finish(lease, id, outcome)
        case Abort(id, reason):
            return _finish(lease, id, reason)
        case Tick(id):
            return _tick(lease, id, now_s)


def _grant(lease: Lease | None, event: Grant, now_s: float) -> LeaseStep:
    if lease is None:
        return Lease(event.id, event.target, event.block_ids, event.lease_s, now_s + event.lease_s), ()
    if (lease.target, lease.block_ids) == (event.target, event.block_ids):
        return lease, (Ignored(event.id, "leased already"),)
    return lease, (Refused(event.id, "DuplicateRequest", f"{event.id} is leased already, with other blocks"),)


def _renew(lease: Lease | None, event: Renew, now_s: float) -> LeaseStep:
    if lease is None:
        return None, (LeaseLost(event.id, "no such lease"),)
    if lease.state is LeaseState.QUARANTINED or lease.is_expired(now_s):
        return lease, (LeaseLost(event.id, "the lease has ended"),)
    expires_s = max(lease.expires_s, now_s + lease.lease_s)
    return replace(lease, expires_s=expires_s), (LeaseRenewed(event.id, expires_s),)


def _start_send(lease: Lease | None, event: SendStarted, now_s: float) -> LeaseStep:
    if lease is None or lease.state is LeaseState.QUARANTINED or lease.is_expired(now_s):
        return lease, (Refused(event.id, "StaleReference", f"no lease for {event.id}"),)
    if event.link_epoch == lease.link_epoch:
        return lease, (Ignored(event.id, f"link epoch {event.link_epoch} was redeemed already"),)
    if event.link_epoch < lease.link_epoch:
        message = f"{event.id}: link epoch {event.link_epoch} is older than {lease.link_epoch}"
        return lease, (Refused(event.id, "StaleReference", message),)
    if lease.state is LeaseState.SENDING:
        message = f"{event.id} is still being sent on link epoch {lease.link_epoch}"
        return lease, (Refused(event.id, "TransferFailed", message),)
    # Asking for the blocks shows that the decode worker lives: it counts as a renewal.
    expires_s = max(lease.expires_s, now_s + lease.lease_s)
    sending = replace(lease, state=LeaseState.SENDING, link_epoch=event.link_epoch, expires_s=expires_s)
    return sending, (StartSend(lease.id, lease.target, lease.block_ids, event.link_epoch),)


def _end_send(lease: Lease | None, event: SendEnded) -> LeaseStep:
    if lease is None or lease.state is LeaseState.LEASED or event.link_epoch != lease.link_epoch:
        return lease, (Ignored(event.id, f"no send on link epoch {event.link_epoch}"),)
    if lease.state is LeaseState.SENDING:
        return replace(lease, state=LeaseState.LEASED), ()
    reason = "sent" if event.ok else "send failed"
    return None, (FreeBlocks(lease.id, lease.block_ids, from_quarantine=True, reason=reason),)


def _finish(lease: Lease | None, id: HandoffId, reason: str) -> LeaseStep:
    if lease is None:
        return None, (Ignored(id, f"no lease to end: {reason}"),)
    if lease.state is LeaseState.QUARANTINED:
        return lease, (Ignored(id, f"has ended already: {reason}"),)
    if lease.state is LeaseState.LEASED:
        return None, (FreeBlocks(lease.id, lease.block_ids, from_quarantine=False, reason=reason),)
    # Even "redeemed" waits for the send to return: it usually overtakes it by moments.
    quarantined = replace(lease, state=LeaseState.QUARANTINED)
    return quarantined, (QuarantineBlocks(lease.id, lease.block_ids, reason),)


def _tick(lease: Lease | None, id: HandoffId, now_s: float) -> LeaseStep:
    if lease is None or lease.state is LeaseState.QUARANTINED or not lease.is_expired(now_s):
        return lease, ()
    reason = f"lease lapsed: {lease.target.worker_id} neither renewed nor released within {lease.lease_s:g} s"
    after, effects = _finish(lease, id, reason)
    return after, (LeaseLapsed(id, reason), *effects)


class LeaseTable:
    """Owner of every lease of one prefill worker. Each method returns what to do, in order."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._leases: dict[HandoffId, Lease] = {}

    @property
    def leases(self) -> Mapping[HandoffId, Lease]:
        return MappingProxyType(self._leases)

    def num_blocks(self, *states: LeaseState) -> int:
        return sum(len(lease.block_ids) for lease in self._leases.values() if lease.state in states)

    @property
    def quarantined_blocks(self) -> int:
        return self.num_blocks(LeaseState.QUARANTINED)

    @property
    def next_deadline_s(self) -> float | None:
        """When `sweep` next has something to do; `None` if nothing will expire."""
        live = (lease.expires_s for lease in self._leases.values() if lease.state is not LeaseState.QUARANTINED)
        return min(live, default=None)

    def grant(
        self, id: HandoffId, target: WorkerRef, block_ids: Iterable[int], now_s: float
    ) -> tuple[LeaseEffect, ...]:
        """Keep `block_ids` for `target`. Raises `DuplicateRequest` if `id` is leased with other blocks."""
        return self._checked(Grant(id, target, tuple(block_ids), self._lease_s), now_s)

    def renew(self, ids: Iterable[HandoffId], now_s: float) -> tuple[HandoffId, ...]:
        """Prolong the leases; returns the ids that are lost. Frees nothing: expired leases wait for `sweep`."""
        effects = [effect for id in ids for effect in self._step(Renew(id), now_s)]
        return tuple(effect.id for effect in effects if isinstance(effect, LeaseLost))

    def send_started(self, id: HandoffId, link_epoch: int, now_s: float) -> tuple[LeaseEffect, ...]:
        """The decode worker redeems. Send only on `StartSend`: a repeated call is `Ignored`.

        Raises `StaleReference` (lease gone, or an older link epoch) or `TransferFailed` (an earlier send runs).
        """
        return self._checked(SendStarted(id, link_epoch), now_s)

    def send_ended(self, id: HandoffId, link_epoch: int, ok: bool, now_s: float) -> tuple[LeaseEffect, ...]:
        """The send of this epoch no longer reads the blocks."""
        return self._step(SendEnded(id, link_epoch, ok), now_s)

    def release(self, id: HandoffId, outcome: str, now_s: float) -> tuple[LeaseEffect, ...]:
        """The decode worker is done: "redeemed", or why not."""
        return self._step(Release(id, outcome), now_s)

    def abort(self, id: HandoffId, reason: str, now_s: float) -> tuple[LeaseEffect, ...]:
        """The request ended."""
        return self._step(Abort(id, reason), now_s)

    def sweep(self, now_s: float) -> tuple[LeaseEffect, ...]:
        """Lapse what has expired. Visits every lease: deadlines are in no order."""
        return tuple(effect for id in list(self._leases) for effect in self._step(Tick(id), now_s))

    def _checked(self, event: LeaseEvent, now_s: float) -> tuple[LeaseEffect, ...]:
        effects = self._step(event, now_s)
        raise_refusal(effects)
        return effects

    def _step(self, event: LeaseEvent, now_s: float) -> tuple[LeaseEffect, ...]:
        lease, effects = step(self._leases.get(event.id), event, now_s)
        if lease is None:
            self._leases.pop(event.id, None)
        else:
            self._leases[event.id] = lease
        return effects
