"""The protocol with one rule taken away at a time. Each must break a property, or the model lacks what the rule is for.

A mutant wraps or replaces a real function while its search runs, or takes a rule from the model's hands. The production
code knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

from modelcheck.search import Result, Search
from modelcheck.system import Hands
from modelcheck.vocabulary import Setting

from pdserve.kv_transfer import lease_step, leases, reservation_step, reservations
from pdserve.kv_transfer.effects import Refused
from pdserve.kv_transfer.lease import (
    HandoffFailed,
    Lease,
    LeaseEffects,
    LeaseEvent,
    LeaseState,
    LeaseStep,
    OfferEnded,
    SendOffer,
    SendStarted,
    StopPrefill,
)
from pdserve.kv_transfer.leases import LeaseTable
from pdserve.kv_transfer.reservation import (
    Admit,
    Effects,
    Offer,
    PartEnded,
    Phase,
    Reservation,
    ReservationEvent,
    ReservationStep,
)
from pdserve.kv_transfer.reservations import ReservationTable
from pdserve.proto.types import HandoffId, KVPart, KVTicket


@dataclass(frozen=True, slots=True)
class Patch:
    """`owner.name` is something else for a while."""

    owner: Any
    name: str
    replacement: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Mutant:
    """`rule` is what is missing; `setting` the smallest one in which that shows, as one of `properties`."""

    rule: str
    setting: Setting
    properties: frozenset[str]
    patches: tuple[Patch, ...] = ()
    hands: Hands = field(default_factory=Hands)

    @contextmanager
    def applied(self) -> Iterator[None]:
        with ExitStack() as stack:
            for change in self.patches:
                stack.enter_context(patch.object(change.owner, change.name, change.replacement))
            yield

    def search(self) -> Result:
        with self.applied():
            return Search(self.setting, self.hands).run()


_lease_step = lease_step.step
_finish = lease_step._finish
_reservation_step = reservation_step.step
_end = reservation_step._end
_fetch_next = reservation_step._fetch_next


def _without(*kinds: type) -> Callable[..., LeaseStep]:
    """The real step, whose effects of these kinds nobody carries out."""

    def step(lease: Lease | None, event: LeaseEvent, now_s: float) -> LeaseStep:
        after, effects = _lease_step(lease, event, now_s)
        return after, tuple(effect for effect in effects if not isinstance(effect, kinds))

    return step


def _silent_about_offers(lease: Lease | None, event: LeaseEvent, now_s: float) -> LeaseStep:
    after, effects = _lease_step(lease, event, now_s)
    if isinstance(event, OfferEnded):
        effects = tuple(effect for effect in effects if not isinstance(effect, HandoffFailed))
    return after, effects


def _silence_is_refusal(lease: Lease | None, event: LeaseEvent, now_s: float) -> LeaseStep:
    return _lease_step(lease, replace(event, is_transient=False) if isinstance(event, OfferEnded) else event, now_s)


def _one_send_at_a_time(lease: Lease | None, event: LeaseEvent, now_s: float) -> LeaseStep:
    if isinstance(event, SendStarted) and lease is not None and lease.running and event.key != lease.send:
        return lease, (Refused(event.id, "TransferFailed", "is still being sent"),)
    return _lease_step(lease, event, now_s)


def _finish_at_once(lease: Lease | None, id: HandoffId, reason: str) -> LeaseStep:
    if lease is not None and lease.state is LeaseState.SENDING:
        lease = lease._replace(state=LeaseState.LEASED)
    return _finish(lease, id, reason)


def _offer_in_any_order(lease: Lease, now_s: float) -> LeaseStep:
    """Each part as soon as it is computed."""
    part = len(lease.parts) - 1
    if lease.is_offering and part == lease.num_accepted:
        return lease, ()
    first_block = sum(len(block_ids) for block_ids in lease.parts[:part])
    target, num_tokens, block_ids = lease.target, lease.num_tokens, lease.parts[part]
    offer = SendOffer(lease.id, target, num_tokens, part, first_block, block_ids, lease.first_token)
    return lease._replace(is_offering=True), (offer,)


def _sweep_until_unexpired(table: LeaseTable, now_s: float) -> LeaseEffects:
    effects: LeaseEffects = ()
    for id, lease in list(table._leases.items()):
        if not lease.is_expired(now_s):
            break
        effects += table.abort(id, "lapsed", now_s)
    return effects


def _end_at_once(reservation: Reservation, kind: str, message: str, release: bool = True) -> ReservationStep:
    if reservation.phase is Phase.TRANSFERRING:
        reservation = reservation._replace(phase=Phase.WAITING)
    return _end(reservation, kind, message, release)


def _admit_early(reservation: Reservation, num_done: int, now_s: float) -> ReservationStep:
    after, effects = _fetch_next(reservation, num_done, now_s)
    if after is not None and after.phase is Phase.WAITING and after.num_done > 0:
        return None, (*effects, Admit(after.id, 0, after.block_ids, after.num_held))
    return after, effects


def _not_meant_here_but_for_generation(reservation: Reservation | None, ticket: KVTicket, part: KVPart) -> str:
    if reservation is not None:
        reservation = reservation._replace(source=ticket.source, ticket=ticket)
    return _not_meant_here(reservation, ticket, part)


_not_meant_here = reservation_step._not_meant_here


def _lease_peer_gone(table: LeaseTable, worker_id: str, generation: int, now_s: float) -> LeaseEffects:
    generations = {lease.target.generation for lease in table.leases.values()}
    return sum((_peer_gone_of_lease(table, worker_id, each, now_s) for each in generations), ())


_peer_gone_of_lease = LeaseTable.peer_gone


def _reservation_peer_gone(table: ReservationTable, worker_id: str, generation: int, now_s: float) -> Effects:
    generations = {entry.source.generation for entry in table.reservations.values()}
    return sum((_peer_gone_of_reservation(table, worker_id, each, now_s) for each in generations), ())


_peer_gone_of_reservation = ReservationTable.peer_gone


def _offer_to_the_forgetful(table: ReservationTable, ticket: KVTicket, part: KVPart, now_s: float) -> Effects:
    return table._step(Offer(ticket.id, ticket, part), now_s)


def _repeated_offer_is_wrong(reservation: Reservation | None, event: ReservationEvent, now_s: float) -> ReservationStep:
    is_repeated = isinstance(event, Offer) and reservation is not None and event.part.index < len(reservation.parts)
    if is_repeated and reservation is not None and reservation.phase is not Phase.QUARANTINED:
        after, effects = _end(reservation, "LayoutMismatch", "a part came twice", release=False)
        return after, (Refused(event.id, "LayoutMismatch", "a part came twice"), *effects)
    return _reservation_step(reservation, event, now_s)


def _silence_is_death(reservation: Reservation | None, event: ReservationEvent, now_s: float) -> ReservationStep:
    is_lost = isinstance(event, PartEnded) and event.error_kind == "WorkerLost"
    if is_lost and reservation is not None and reservation.phase is Phase.TRANSFERRING:
        return _end(reservation._replace(phase=Phase.WAITING), "WorkerLost", "did not answer")
    return _reservation_step(reservation, event, now_s)


LOSS = Setting("loss", losses=1)
CRASH = Setting("crash", crashes=1)
MUTANTS = (
    Mutant(
        "a link that failed comes back under a new epoch",
        Setting("re-pull", losses=1),
        frozenset({"L3"}),
        hands=Hands(renews_links=False),
    ),
    Mutant(
        "blocks that the wire may write to are quarantined",
        Setting("cancel", cancels=1),
        frozenset({"S4"}),
        (Patch(reservation_step, "_end", _end_at_once),),
    ),
    Mutant(
        "blocks that a send may read are quarantined, also on a time-out",
        Setting("timers", timers=True),
        frozenset({"S2", "S5"}),
        (Patch(lease_step, "_finish", _finish_at_once),),
    ),
    Mutant(
        "an offer that cannot start or is refused is told",
        Setting("export", export_failures=1),
        frozenset({"L1"}),
        (Patch(leases, "step", _silent_about_offers),),
    ),
    Mutant(
        "a sweep visits every lease",
        Setting("two leases", targets=(1, 2), one_sided=True, timers=True),
        frozenset({"L2"}),
        (Patch(LeaseTable, "sweep", _sweep_until_unexpired),),
    ),
    Mutant(
        "messages and notices name a generation",
        CRASH,
        frozenset({"L3", "S7"}),
        (
            Patch(reservation_step, "_not_meant_here", _not_meant_here_but_for_generation),
            Patch(LeaseTable, "peer_gone", _lease_peer_gone),
            Patch(ReservationTable, "peer_gone", _reservation_peer_gone),
        ),
        Hands(checks_generation=False),
    ),
    Mutant(
        "Release and Abort name the attempt",
        Setting("attempts", targets=(1, 1), one_sided=True, attempts=True, cancels=1),
        frozenset({"L3"}),
        hands=Hands(knows_attempts=False),
    ),
    Mutant("digests are checked", LOSS, frozenset({"S1"}), hands=Hands(checks_digests=False)),
    Mutant(
        "digests are offered only while the lease lives",
        Setting("reuse", targets=(1, 2), one_sided=True, cancels=1, pool_blocks=2),
        frozenset({"S1"}),
        hands=Hands(asks_before_offering=False),
    ),
    Mutant(
        "admission waits for the last part",
        Setting("no fault"),
        frozenset({"S1"}),
        (Patch(reservation_step, "_fetch_next", _admit_early),),
    ),
    Mutant(
        "parts are offered in order, one at a time",
        Setting("no fault"),
        frozenset({"L3"}),
        (Patch(lease_step, "_offer_next", _offer_in_any_order),),
    ),
    Mutant(
        "a part may be redeemed while the send before it still runs",
        Setting("no fault"),
        frozenset({"L3"}),
        (Patch(leases, "step", _one_send_at_a_time),),
    ),
    Mutant(
        "an offer without an answer is no refused offer",
        LOSS,
        frozenset({"L3", "S7"}),
        (Patch(leases, "step", _silence_is_refusal),),
    ),
    Mutant(
        "a redemption without an answer is no death",
        LOSS,
        frozenset({"S7"}),
        (Patch(reservations, "step", _silence_is_death),),
    ),
    Mutant(
        "what was admitted is remembered while it may be offered",
        Setting("loss", losses=1, one_sided=True),
        frozenset({"L3"}),
        (Patch(ReservationTable, "offer", _offer_to_the_forgetful),),
    ),
    Mutant(
        "a repeated offer changes nothing",
        Setting("duplicate", duplicates=1),
        frozenset({"L3", "S7"}),
        (Patch(reservations, "step", _repeated_offer_is_wrong),),
    ),
    Mutant(
        "a request that has ended is not accepted again",
        Setting("duplicate", duplicates=1),
        frozenset({"S1", "S7", "L3"}),
        hands=Hands(remembers_ends=False),
    ),
    Mutant(
        "a request that has ended well is not refused when it is repeated",
        Setting("duplicate", duplicates=1),
        frozenset({"L3"}),
        hands=Hands(answers_repeats=False),
    ),
    Mutant(
        "a lease that ends stops the computation over its blocks",
        Setting("timers", one_sided=True, timers=True),
        frozenset({"S1"}),
        (Patch(leases, "step", _without(StopPrefill)),),
    ),
)
