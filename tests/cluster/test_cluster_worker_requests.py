"""When a worker gives up because its wires never fall idle: late, and only if it stays that way."""

from __future__ import annotations

import math

import pytest

from pdserve.cluster.worker_requests import WorkerRequests
from pdserve.engine.block_pool import PoolCounts
from pdserve.engine.turn import Turn
from pdserve.proto.errors import InternalError
from pdserve.proto.types import KVLayout, Role, WorkerInfo, WorkerRef

NUM_BLOCKS = 16
BUDGET_BLOCKS = 4


def requests_with(patience_s: float) -> WorkerRequests:
    layout = KVLayout("model", "float32", num_layers=1, num_kv_heads=1, head_dim=1, block_size=4)
    info = WorkerInfo(WorkerRef("d0", 1, "nowhere:1"), Role.DECODE, layout, NUM_BLOCKS, 64, 64, "host")
    return WorkerRequests(info, lambda *_: None, lambda _: None, BUDGET_BLOCKS, patience_s)


def turn(num_quarantined: int) -> Turn:
    free = NUM_BLOCKS - num_quarantined
    pool = PoolCounts(NUM_BLOCKS, free, 0, 0, 0, 0, num_quarantined, 0)
    return Turn(None, pool, 0, 0, 0, 0, 0, 0)


async def test_a_quarantine_beyond_the_budget_is_borne_for_as_long_as_wires_take() -> None:
    requests = requests_with(patience_s=math.inf)
    for num_quarantined in (0, NUM_BLOCKS, NUM_BLOCKS):
        requests.turn_ended(turn(num_quarantined))
        requests.sweep()


async def test_a_worker_whose_wires_do_not_fall_idle_gives_up() -> None:
    requests = requests_with(patience_s=-1.0)
    for num_quarantined in (0, BUDGET_BLOCKS):
        requests.turn_ended(turn(num_quarantined))
        requests.sweep()
    requests.turn_ended(turn(BUDGET_BLOCKS + 1))
    with pytest.raises(InternalError, match="5 blocks are in quarantine, 4 are allowed"):
        requests.sweep()
