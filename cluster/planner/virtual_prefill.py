"""The prefill role of a simulated worker: the real lease table, and hands that only take time.

What `prefill_worker.role` does, without I/O: offers arrive after the fixed part of a hand-off, nothing is lost on the
way, and digests are not computed. Knows nothing of how requests are placed, nor how KV moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pdserve.cluster.planner.clock import Clock
from pdserve.cluster.planner.virtual_engine import VirtualEngine
from pdserve.engine.block_pool import BlockState
from pdserve.engine.plan import ComputedPart
from pdserve.kv_transfer.effects import FreeBlocks, QuarantineBlocks
from pdserve.kv_transfer.lease import HandoffFailed, LeaseEffects, LeaseTimes, SendOffer, StopPrefill
from pdserve.kv_transfer.leases import LeaseTable
from pdserve.proto.errors import ConfigError, PdserveError
from pdserve.proto.types import HandoffId, KVPart, KVTicket, WorkerInfo, WorkerRef, WorkerRequest


class VirtualPrefill:
    """Owner of the leases. `offer(target, ticket, part)` reaches the target at once, and raises what it answers."""

    def __init__(
        self,
        info: WorkerInfo,
        clock: Clock,
        engine: VirtualEngine,
        times: LeaseTimes,
        handoff_s: float,
        offer: Callable[[WorkerRef, KVTicket, KVPart], None],
        fail: Callable[[HandoffId, str], None],
    ) -> None:
        self._info = info
        self._clock = clock
        self._engine = engine
        self._times = times
        self._handoff_s = handoff_s
        self._offer = offer
        self._fail = fail
        self._leases = LeaseTable(times)

    def prefill(self, request: WorkerRequest, hand_off_to: WorkerRef) -> None:
        now_s = self._clock.now_s
        self._carry_out(self._leases.accept(request.id, hand_off_to, len(request.prompt_token_ids), now_s))
        sequence = self._engine.sequence_type(request, now_s, hand_off=True)
        self._engine.post(lambda scheduler: scheduler.add(sequence))

    def part_computed(self, part: ComputedPart) -> None:
        id = part.sequence.request.id
        self._carry_out(self._leases.part_computed(id, part.block_ids, part.first_token, self._clock.now_s))

    def renew(self, handoffs: Iterable[HandoffId]) -> tuple[HandoffId, ...]:
        """Those that are lost."""
        return self._leases.renew(handoffs, self._clock.now_s)

    def release(self, handoff: HandoffId, outcome: str) -> None:
        self._carry_out(self._leases.release(handoff, outcome, self._clock.now_s))

    def abort(self, handoff: HandoffId, reason: str) -> None:
        self._carry_out(self._leases.abort(handoff, reason, self._clock.now_s))

    def finished(self, handoff: HandoffId) -> None:
        """The request ended here."""
        self.abort(handoff, "the request has ended")

    def peer_gone(self, peer: WorkerRef) -> None:
        """That process died: nobody will redeem what is kept for it."""
        self._carry_out(self._leases.peer_gone(peer.worker_id, peer.generation, self._clock.now_s))

    @property
    def num_leases(self) -> int:
        return len(self._leases.leases)

    @property
    def is_idle(self) -> bool:
        return not self._leases.leases

    def sweep(self) -> None:
        self._carry_out(self._leases.sweep(self._clock.now_s))

    def _carry_out(self, effects: LeaseEffects) -> None:
        for effect in effects:
            match effect:
                case SendOffer():
                    self._clock.after(self._handoff_s, self._offered, effect)
                case FreeBlocks(block_ids=block_ids, from_quarantine=quarantined):
                    self._release(block_ids, BlockState.QUARANTINED if quarantined else BlockState.LEASED)
                case StopPrefill(id=id):
                    self._stop(id)
                case QuarantineBlocks(block_ids=block_ids):
                    self._quarantine(block_ids)
                case HandoffFailed(id=id, kind=kind, message=message):
                    self._fail(id, f"{kind}: {message}")
                case _:
                    pass  # refused or ignored: nothing is sent twice here, but an abort may come late

    def _offered(self, offer: SendOffer) -> None:
        if not self._leases.is_offering(offer.id, offer.part):
            return  # it ended meanwhile
        ticket = KVTicket(
            id=offer.id,
            source=self._info.worker,
            num_tokens=offer.num_tokens,
            layout=self._info.layout,
            digest="",
            lease_s=self._times.lease_s,
            host_id="",
            link_address={},
        )
        part = KVPart(offer.part, offer.first_block, offer.block_ids, (0,) * len(offer.block_ids), offer.first_token)
        kind = message = ""
        try:
            self._offer(offer.target, ticket, part)
        except ConfigError:
            raise  # no answer of the target's: this cluster cannot be simulated
        except PdserveError as error:
            kind, message = type(error).__name__, error.message
        self._carry_out(self._leases.offer_ended(offer.id, offer.part, self._clock.now_s, kind, message))

    def _stop(self, id: HandoffId) -> None:
        self._engine.post(lambda scheduler: scheduler.abort(id))

    def _release(self, block_ids: tuple[int, ...], state: BlockState) -> None:
        self._engine.post(lambda scheduler: scheduler.pool.release(block_ids, state))

    def _quarantine(self, block_ids: tuple[int, ...]) -> None:
        self._engine.post(lambda scheduler: scheduler.pool.move(block_ids, BlockState.LEASED, BlockState.QUARANTINED))
