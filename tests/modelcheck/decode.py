"""The decode worker of the model: a pool, one link to the prefill worker, and hands for the real reservations.

Everything between two steps is a value, `DecodeState`; a `Turn` makes the next one. Bytes that come land in the blocks
that the fetch was posted for, whoever owns those by then: that is what quarantine has to prevent.
"""

from __future__ import annotations

from collections.abc import Iterator

from modelcheck.decode_turn import DecodeState, Turn
from modelcheck.messages import (
    Abort,
    Bytes,
    ConnectionReset,
    Expect,
    LeaseGone,
    Offer,
    Outcome,
    PeerGone,
    ReadDone,
    RedeemAnswer,
    Stimulus,
    Told,
)
from modelcheck.system import System
from modelcheck.vocabulary import NUM_BLOCKS, Block, BlockUse, Kind, Mark, worker_name

from pdserve.kv_transfer.reservation import (
    Phase,
)


def fresh(system: System, worker: int, generation: int) -> DecodeState:
    """A worker that has just started."""
    return DecodeState(worker, generation, (Block(),) * system.setting.pool_blocks)


def receive(system: System, state: DecodeState, stimulus: Stimulus) -> Outcome:
    """What one message, answer or notice makes of the worker."""
    turn = Turn(system, state)
    match stimulus:
        case Expect(request, _, _, source_generation):
            turn.expect(request, source_generation)
        case Offer():
            turn.offer(stimulus)
        case Abort(request):
            turn.abort(turn.addressed(request), "aborted by the router")
        case RedeemAnswer(request, part, link_epoch, reply):
            turn.redeemed(request, part, link_epoch, reply)
        case Bytes():
            turn.land(stimulus)
        case ReadDone(request, part, read):
            fetch = turn.fetch_of(request, part)
            if read is None:
                turn.end_fetch(fetch, "TransferFailed", fails_link=True)
            else:
                turn.write(fetch, read, request)
        case ConnectionReset(request):
            fetch = next(fetch for fetch in turn.fetches if fetch.request == request and fetch.stage == "receiving")
            turn.end_fetch(fetch, "TransferFailed", fails_link=True)
        case LeaseGone(request):
            turn.call("abort", system.ids[request], "the source's lease was lost", error_kind="TransferFailed")
        case PeerGone(worker, generation):
            turn.call("peer_gone", worker_name(worker), generation)
        case _:
            raise AssertionError(stimulus)
    return turn.outcome()


def is_ready(state: DecodeState, message: Bytes) -> bool:
    """Whether bytes can arrive: until their transfer is posted, they wait in the link."""
    return not any(fetch.stage == "redeeming" and fetch.link_epoch == message.link_epoch for fetch in state.fetches)


def actions(system: System, state: DecodeState) -> Iterator[Outcome]:
    """What the worker may do by itself."""
    for request in state.asks:
        yield _answer_ask(system, state, request)
    for request in state.running:
        yield _decode(system, state, request)
    if system.setting.timers:
        yield from _watch_clock(system, state)


def _answer_ask(system: System, state: DecodeState, request: int) -> Outcome:
    turn = Turn(system, state)
    turn.asks.remove(request)
    what = f"{worker_name(state.worker)}'s pool"
    if len(turn.pool.free) < NUM_BLOCKS:
        turn.call("blocks_refused", system.ids[request])
        return turn.outcome(f"{what} has no blocks for {system.setting.label(request)} after all")
    taken = turn.pool.take(NUM_BLOCKS, BlockUse.RECEIVING, request)
    turn.call("blocks_taken", system.ids[request], taken, 0)
    return turn.outcome(f"{what} gives blocks {list(taken)} to {system.setting.label(request)}")


def _decode(system: System, state: DecodeState, request: int) -> Outcome:
    """The one step of a sequence's decode: its last token."""
    turn = Turn(system, state)
    block_ids = turn.pool.of(request, BlockUse.RUNNING)
    turn.check_kv(request, "decodes")
    turn.running.remove(request)
    turn.pool.release(block_ids, BlockUse.RUNNING, request)
    turn.told.append(Told(request, state.worker, 1, is_finish=True))
    turn.live.discard(request)
    if system.hands.remembers_ends:
        turn.ended.add(request)
    return turn.outcome(f"{worker_name(state.worker)} decodes the last token of {system.setting.label(request)}")


def _watch_clock(system: System, state: DecodeState) -> Iterator[Outcome]:
    name = worker_name(state.worker)
    for entry in system.reservations[state.reservations]:
        if entry.phase is Phase.QUARANTINED:
            continue
        request = system.requests[entry.id]
        turn = Turn(system, state)
        turn.marks.append((request, Mark.EXPIRED))
        turn.reservations = system.reservations.expire(state.reservations, entry.id)
        turn.call("sweep")
        yield turn.outcome(f"{name}: {system.setting.label(request)} is out of time while {entry.phase}", Kind.TIMER)
    for fetch in state.fetches:
        if fetch.stage == "receiving":
            turn = Turn(system, state)
            turn.marks.append((fetch.request, Mark.EXPIRED))
            turn.end_fetch(fetch, "TransferFailed", fails_link=True)
            what = f"part {fetch.part.index} of {system.setting.label(fetch.request)}"
            yield turn.outcome(f"{name} gives up receiving {what} and closes the link", Kind.TIMER)
