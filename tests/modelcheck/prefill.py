"""The prefill worker of the model: an engine that computes prompts in parts, a pool, and hands for the real leases.

Everything between two steps is a value, `PrefillState`; a `Turn` makes the next one. Order is adversarial where the
real worker's is not fixed: the engine's word of a computed part waits for the event loop, digests are taken some time
after they are asked for, a send reads its blocks some time after it began and is known to have ended later still.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from modelcheck.messages import (
    Abort,
    Bytes,
    Offer,
    OfferAnswer,
    Outcome,
    PeerGone,
    Prefill,
    Redeem,
    Release,
    Stimulus,
    Told,
)
from modelcheck.prefill_turn import NOT_HERE, WAITING, PrefillState, Turn
from modelcheck.system import System
from modelcheck.vocabulary import (
    BLOCKS_PER_PART,
    FIRST_TOKEN,
    NUM_BLOCKS,
    NUM_PARTS,
    PREFILL,
    Block,
    BlockUse,
    Fault,
    Kind,
    Mark,
    content_of,
    worker_name,
)

from pdserve.kv_transfer.lease import SendOffer


def fresh(system: System, generation: int) -> PrefillState:
    """A worker that has just started."""
    setting = system.setting
    return PrefillState(generation, (Block(),) * setting.pool_blocks, (NOT_HERE,) * setting.num_requests)


def receive(system: System, state: PrefillState, stimulus: Stimulus) -> Outcome:
    """What one message or notice makes of the worker."""
    turn = Turn(system, state)
    match stimulus:
        case Prefill(request, _, _, target_generation):
            return turn.accept(request, target_generation)
        case Abort(request):
            turn.abort(turn.addressed(request), "aborted by the router")
        case OfferAnswer(request, _, _, part, kind, is_transient):
            turn.call("offer_ended", system.ids[request], part, error_kind=kind, is_transient=is_transient)
        case Redeem():
            return turn.redeem(stimulus)
        case Release(request, _, _, outcome):
            addressed = turn.addressed(request)
            turn.call("release", system.ids[addressed], outcome)
            turn.end(addressed)
        case PeerGone(worker, generation):
            turn.call("peer_gone", worker_name(worker), generation)
        case _:
            raise AssertionError(stimulus)
    return turn.outcome()


def actions(system: System, state: PrefillState) -> Iterator[Outcome]:
    """What the worker may do by itself."""
    for request, progress in enumerate(state.sequences):
        yield from _compute(system, state, request, progress)
    if state.computed:
        yield _hear_engine(system, state)
    for offer in state.preparing:
        yield _offer(system, state, offer)
        yield _fail_export(system, state, offer)
    yield from _serve_sends(system, state)
    yield from _watch_clock(system, state)


def contents(state: PrefillState, block_ids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(state.blocks[block_id].content for block_id in block_ids)


def _compute(system: System, state: PrefillState, request: int, progress: int) -> Iterator[Outcome]:
    """One engine step for this sequence: its next part, the first with blocks for all of them."""
    name = system.setting.label(request)
    turn = Turn(system, state)
    if progress == WAITING:
        if len(turn.pool.free) < NUM_BLOCKS:
            return
        turn.pool.take(NUM_BLOCKS, BlockUse.RUNNING, request)
        progress = 0
    elif progress == NOT_HERE:
        return
    own = {block.content for block in state.blocks if block.owner == request}
    if not own.issuperset(content_of(request, position) for position in range(progress * BLOCKS_PER_PART)):
        turn.pool.break_("S1", f"part {progress} of {name} is computed from blocks that are not its own any more")
    block_ids = turn.pool.of(request, BlockUse.RUNNING)[:BLOCKS_PER_PART]
    for position, block_id in enumerate(block_ids, progress * BLOCKS_PER_PART):
        turn.pool.write(block_id, content_of(request, position))
    turn.pool.move(block_ids, BlockUse.LEASED)
    turn.sequences[request] = NOT_HERE if progress == NUM_PARTS - 1 else progress + 1
    turn.computed.append((request, progress, block_ids))
    yield turn.outcome(f"p0's engine computes part {progress} of {name} into blocks {list(block_ids)}")


def _hear_engine(system: System, state: PrefillState) -> Outcome:
    turn = Turn(system, state)
    request, part, block_ids = turn.computed.pop(0)
    is_last = part == NUM_PARTS - 1
    turn.call("part_computed", system.ids[request], block_ids, FIRST_TOKEN if is_last else None)
    if is_last and request in turn.live:
        turn.told.append(Told(request, PREFILL, 0))
    return turn.outcome(f"p0 hears of part {part} of {system.setting.label(request)}")


def _offer(system: System, state: PrefillState, offer: SendOffer) -> Outcome:
    """Digests of what the blocks hold now, then the call, unless the lease has ended meanwhile."""
    turn = Turn(system, state)
    turn.preparing.remove(offer)
    request = system.requests[offer.id]
    note = f"p0 has digests for part {offer.part} of {system.setting.label(request)}"
    table = system.leases.table(state.leases)
    if system.hands.asks_before_offering and not table.is_offering(offer.id, offer.part):
        return turn.outcome(f"{note}; it is not to be offered any more")
    digests = contents(state, offer.block_ids)
    target = int(offer.target.worker_id[1:])
    is_last = offer.first_token is not None
    turn.sends_out.append(
        Offer(
            request,
            target,
            offer.target.generation,
            state.generation,
            offer.part,
            offer.first_block,
            offer.block_ids,
            digests,
            is_last,
        )
    )
    return turn.outcome(f"{note} and offers it to d{target}")


def _fail_export(system: System, state: PrefillState, offer: SendOffer) -> Outcome:
    turn = Turn(system, state)
    turn.preparing.remove(offer)
    request = system.requests[offer.id]
    turn.marks.append((request, Mark.EXPORT_FAILED))
    turn.call("offer_ended", offer.id, offer.part, error_kind="InternalError", message="cannot export")
    note = f"p0 cannot export part {offer.part} of {system.setting.label(request)}"
    return turn.outcome(note, Kind.FAULT, Fault.EXPORT)


def _serve_sends(system: System, state: PrefillState) -> Iterator[Outcome]:
    """One send at a time for each target, in order."""
    busy: set[int] = set()
    for send in state.sends:
        if send.target in busy:
            continue
        busy.add(send.target)
        turn = Turn(system, state)
        what = f"part {send.key.part} of {system.setting.label(send.request)}"
        if send.has_read:
            turn.sends.remove(send)
            turn.call("send_ended", system.ids[send.request], send.key)
            yield turn.outcome(f"p0 knows that its send of {what} has ended")
            continue
        foreign = [block_id for block_id in send.block_ids if not _is_leased(state.blocks[block_id], send.request)]
        if foreign:
            turn.pool.break_("S5", f"a send of {what} reads block {foreign[0]}, which is not leased to it any more")
        turn.sends[turn.sends.index(send)] = replace(send, has_read=True)
        key = send.key
        read = contents(state, send.block_ids)
        turn.sends_out.append(Bytes(send.request, send.target, send.target_generation, key.part, key.link_epoch, read))
        yield turn.outcome(f"p0 sends {what} on link {key.link_epoch}, from blocks {list(send.block_ids)}")


def _is_leased(block: Block, request: int) -> bool:
    return block.owner == request and block.use in (BlockUse.LEASED, BlockUse.QUARANTINED)


def _watch_clock(system: System, state: PrefillState) -> Iterator[Outcome]:
    leases = system.leases[state.leases]
    if any(lease.is_expired(0.0) or (lease.is_live and lease.offer_at_s > 0) for lease in leases):
        turn = Turn(system, state)
        turn.call("sweep", now_s=1.0)
        forgotten = [lease for lease in system.leases[turn.leases] if lease.is_expired(1.0)]
        if forgotten:
            name = system.setting.label(system.requests[forgotten[0].id])
            turn.pool.break_("L2", f"the lease of {name} has lapsed, and its blocks are still kept after the sweep")
        yield turn.outcome("p0 sweeps its leases")
    if not system.setting.timers:
        return
    for lease in leases:
        if lease.is_live and not lease.is_expired(0.0):
            turn = Turn(system, state)
            request = system.requests[lease.id]
            turn.leases = system.leases.expire(state.leases, lease.id)
            turn.marks.append((request, Mark.EXPIRED))
            yield turn.outcome(f"the time of {system.setting.label(request)}'s lease on p0 is up", Kind.TIMER)
