"""A reservation in each of its phases, for tests of the decode worker's side. Knows nothing of what they assert."""

from __future__ import annotations

from pdserve.kv_transfer.reservation import (
    Effects,
    Fail,
    Phase,
    Timeouts,
)
from pdserve.kv_transfer.reservations import ReservationTable
from pdserve.proto.types import HandoffId, KVLayout, KVPart, KVTicket, WorkerRef

LAYOUT = KVLayout("model", "float32", 2, 2, 8, block_size=16)
SOURCE = WorkerRef("prefill-0", 3, "host:1")
TIMEOUTS = Timeouts(reserve_s=60, room_s=30, part_s=20, transfer_s=10, renew_s=4, max_pulls=2)
ID = HandoffId("r", 0, 1)
NUM_TOKENS = 40  # three blocks
NEVER = 1e9
TICKET = KVTicket(ID, SOURCE, NUM_TOKENS, LAYOUT, "xxh3", 30.0, "host", {"shm": "x"})
FIRST = KVPart(0, 0, (100, 101), (1, 2))
LAST = KVPart(1, 2, (102,), (3,), first_token=9)
WHOLE = KVPart(0, 0, (100, 101, 102), (1, 2, 3), first_token=9)
BLOCKS = (7, 5, 6)


def table_in(phase: Phase) -> ReservationTable:
    """`ID` in this phase, the first part offered; its request has all the time in the world."""
    table = ReservationTable(LAYOUT, TIMEOUTS)
    table.expect(ID, SOURCE, NUM_TOKENS, NEVER, 0.0)
    if phase is not Phase.RESERVED:
        assert table.offer(TICKET, FIRST, 0.0) == ()
    if phase in (Phase.TRANSFERRING, Phase.WAITING, Phase.QUARANTINED):
        table.on_room(3, 0.0)
        table.blocks_taken(ID, BLOCKS, 0, 0.0)
    if phase is Phase.WAITING:
        table.part_ended(ID, 0, 0.0)
    if phase is Phase.QUARANTINED:
        table.abort(ID, "client left", 0.0)
    assert table.reservations[ID].phase is phase
    return table


def failure(effects: Effects) -> Fail:
    (fail,) = [effect for effect in effects if isinstance(effect, Fail)]
    return fail
