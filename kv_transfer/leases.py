"""Owner of every lease of one prefill worker: a thin table over `lease_step.step`.

Each method returns what to do, in order. Knows no clock and does no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from pdserve.kv_transfer.effects import raise_refusal
from pdserve.kv_transfer.lease import (
    Abort,
    Accept,
    HandoffFailed,
    Lease,
    LeaseEffects,
    LeaseEvent,
    LeaseLost,
    LeaseState,
    LeaseTimes,
    OfferEnded,
    PartComputed,
    Release,
    Renew,
    SendEnded,
    SendKey,
    SendStarted,
    Tick,
)
from pdserve.kv_transfer.lease_step import step
from pdserve.proto.types import HandoffId, WorkerRef


class LeaseTable:
    """What this prefill worker keeps for others."""

    def __init__(self, times: LeaseTimes) -> None:
        self._times = times
        self._leases: dict[HandoffId, Lease] = {}

    @property
    def leases(self) -> Mapping[HandoffId, Lease]:
        return MappingProxyType(self._leases)

    @property
    def quarantined_blocks(self) -> int:
        quarantined = (lease for lease in self._leases.values() if lease.state is LeaseState.QUARANTINED)
        return sum(len(lease.block_ids) for lease in quarantined)

    def accept(self, id: HandoffId, target: WorkerRef, num_tokens: int, now_s: float) -> LeaseEffects:
        """The KV of a prompt will go to `target`. Raises `DuplicateRequest` if another use of `id` is in flight."""
        return self._checked(Accept(id, target, num_tokens, self._times), now_s)

    def part_computed(
        self, id: HandoffId, block_ids: Iterable[int], first_token: int | None, now_s: float
    ) -> LeaseEffects:
        """The next blocks are final; they are this table's from now on. `first_token` with the last ones."""
        return self._step(PartComputed(id, tuple(block_ids), first_token), now_s)

    def is_offering(self, id: HandoffId, part: int) -> bool:
        """Whether this part is still to be offered. If not, its blocks may be another's, and so may digests of them."""
        lease = self._leases.get(id)
        return lease is not None and lease.is_live and lease.is_offering and lease.num_accepted == part

    def offer_ended(
        self,
        id: HandoffId,
        part: int,
        now_s: float,
        error_kind: str = "",
        message: str = "",
        is_transient: bool = False,
    ) -> LeaseEffects:
        """What became of a `SendOffer`."""
        return self._step(OfferEnded(id, part, error_kind, message, is_transient), now_s)

    def renew(self, ids: Iterable[HandoffId], now_s: float) -> tuple[HandoffId, ...]:
        """Prolong the leases; returns the ids that are lost. Frees nothing: expired leases wait for `sweep`."""
        effects = [effect for id in ids for effect in self._step(Renew(id), now_s)]
        return tuple(effect.id for effect in effects if isinstance(effect, LeaseLost))

    def send_started(self, id: HandoffId, target: WorkerRef, key: SendKey, first: int, now_s: float) -> LeaseEffects:
        """The decode worker redeems a part. Send only on `StartSend`: a repeated call is `Ignored`.

        Raises `StaleReference`: no lease for this target, no such part, or an older send.
        """
        return self._checked(SendStarted(id, target, key, first), now_s)

    def send_ended(self, id: HandoffId, key: SendKey, now_s: float) -> LeaseEffects:
        """This send no longer reads the blocks."""
        return self._step(SendEnded(id, key), now_s)

    def release(self, id: HandoffId, outcome: str, now_s: float) -> LeaseEffects:
        """The decode worker is done: "redeemed", or why not."""
        return self._step(Release(id, outcome), now_s)

    def abort(self, id: HandoffId, reason: str, now_s: float) -> LeaseEffects:
        """The request ended."""
        return self._step(Abort(id, reason), now_s)

    def peer_gone(self, worker_id: str, generation: int, now_s: float) -> LeaseEffects:
        """That process died: nobody will redeem what is kept for it. Its successor's leases stay."""
        message = f"{worker_id} died before it had redeemed the KV"
        effects: LeaseEffects = ()
        for lease in list(self._leases.values()):
            is_theirs = (lease.target.worker_id, lease.target.generation) == (worker_id, generation)
            if is_theirs and lease.state is not LeaseState.QUARANTINED:
                failed = HandoffFailed(lease.id, "WorkerLost", message)
                effects += (*self._step(Abort(lease.id, message), now_s), failed)
        return effects

    def sweep(self, now_s: float) -> LeaseEffects:
        """Lapse what has expired, repeat offers. Visits every lease: deadlines are in no order."""
        return tuple(effect for id in list(self._leases) for effect in self._step(Tick(id), now_s))

    def _checked(self, event: LeaseEvent, now_s: float) -> LeaseEffects:
        effects = self._step(event, now_s)
        raise_refusal(effects)
        return effects

    def _step(self, event: LeaseEvent, now_s: float) -> LeaseEffects:
        lease, effects = step(self._leases.get(event.id), event, now_s)
        if lease is None:
            self._leases.pop(event.id, None)
        else:
            self._leases[event.id] = lease
        return effects
