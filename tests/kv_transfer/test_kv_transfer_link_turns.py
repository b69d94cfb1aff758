"""Who waits for a slow link waits alone."""

from __future__ import annotations

import asyncio

import pytest

from pdserve.kv_transfer.link import Deadline
from pdserve.kv_transfer.link_turns import LinkTurns
from pdserve.kv_transfer.links import LinkKey
from pdserve.proto.errors import TransferFailed

SLOW, OTHER = LinkKey("p0", 1, "gloo"), LinkKey("p1", 1, "gloo")
WAIT_S = 20.0


async def test_turns_come_in_order_of_asking_and_links_do_not_wait_for_each_other() -> None:
    turns, order = LinkTurns(), list[int]()

    async def take(number: int) -> None:
        async with turns.turn(SLOW, Deadline(WAIT_S)):
            order.append(number)
            await asyncio.sleep(0)

    assert turns.is_free(SLOW)
    async with turns.turn(SLOW, Deadline(WAIT_S)):
        waiting = [asyncio.create_task(take(number)) for number in range(20)]
        await asyncio.sleep(0)
        assert not turns.is_free(SLOW)
        assert turns.is_free(OTHER)
        async with turns.turn(OTHER, Deadline(WAIT_S)):
            assert order == []
    async with asyncio.timeout(WAIT_S):
        await asyncio.gather(*waiting)
    assert order == list(range(20))
    assert turns.is_free(SLOW)


async def test_who_waits_too_long_fails_and_leaves_the_queue_in_order() -> None:
    turns = LinkTurns()
    async with turns.turn(SLOW, Deadline(WAIT_S)):
        with pytest.raises(TransferFailed, match="gloo link to p0 was not free in time"):
            async with turns.turn(SLOW, Deadline(0.01)):
                pass
    async with turns.turn(SLOW, Deadline(WAIT_S)):
        pass


async def test_a_peer_that_is_gone_is_forgotten_and_who_is_at_it_goes_on() -> None:
    turns = LinkTurns()
    async with turns.turn(SLOW, Deadline(WAIT_S)):
        turns.forget("p0", 1)
        assert turns.is_free(SLOW)
    turns.forget("p0", 1)
