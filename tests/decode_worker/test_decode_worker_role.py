"""The decode role's hands: how effects are carried out when many come at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from pdserve.decode_worker.role import DecodeRole
from pdserve.engine.block_pool import BlockPool, BlockState
from pdserve.kv_transfer.metrics import HandoffMetrics
from pdserve.kv_transfer.reservation import FetchPart, Timeouts
from pdserve.proto.errors import CorruptKV
from pdserve.proto.types import HandoffId, KVLayout, KVPart, KVTicket, SamplingParams, WorkerRef, WorkerRequest

LAYOUT = KVLayout("model", "float32", 1, 1, 8, block_size=16)
SOURCE = WorkerRef("p0", 1, "host:1")
ID = HandoffId("r", 0, 1)
WAIT_S = 20.0


class Around:
    """An engine loop and a receiver that do at once what they are asked."""

    def __init__(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.added = asyncio.Event()
        self.failed: list[Exception] = []
        self.at_once: list[int] = []
        self.in_threads: list[int] = []
        self.problems: dict[int, Exception] = {}

    def hold_prefix(self, prompt: tuple[int, ...]) -> list[int]:
        return []

    def add(self, sequence: Any) -> None:
        self.added.set()

    def post(self, command: Callable[[Any], object]) -> None:
        command(self)

    def ask(self, question: Callable[[Any], Any]) -> Any:
        return question(self)

    def receive_now(self, fetch: FetchPart) -> str | None:
        self.at_once.append(fetch.part.index)
        if fetch.part.index in self.problems:
            raise self.problems.pop(fetch.part.index)
        return "shm"

    async def receive(self, fetch: FetchPart) -> str:
        self.in_threads.append(fetch.part.index)
        return "shm"

    async def release(self, *arguments: object) -> None:
        pass


def role_over(around: Around, tasks: set[asyncio.Task[None]]) -> DecodeRole:
    def spawn(work: Coroutine[Any, Any, None]) -> None:
        tasks.add(asyncio.create_task(work))

    metrics = HandoffMetrics("d0", CollectorRegistry())
    timeouts = Timeouts(60, 60, 60, 60, 5, 2)
    everything: Any = around
    return DecodeRole(
        LAYOUT,
        timeouts,
        everything,
        everything,
        everything,
        metrics,
        spawn,
        lambda id, error: around.failed.append(error),
    )


def offer_all(role: DecodeRole, num_parts: int) -> None:
    num_tokens = num_parts * LAYOUT.block_size
    role.expect(WorkerRequest(ID, tuple(range(num_tokens)), SamplingParams(4), 60.0), SOURCE)
    ticket = KVTicket(ID, SOURCE, num_tokens, LAYOUT, "xxh3", 30.0, "host", {"shm": "/pool"})
    for index in range(num_parts):
        role.offer(ticket, KVPart(index, index, (index,), (0,), 7 if index == num_parts - 1 else None))


def room(role: DecodeRole) -> None:
    nothing_wanted: Any = SimpleNamespace(wanted_blocks=0, num_running=0)
    role.turn_ended(nothing_wanted)


@pytest.mark.parametrize("num_parts", [1, 3, 900])
async def test_parts_that_waited_for_room_are_fetched_without_piling_up_calls_or_keeping_the_loop(
    num_parts: int,
) -> None:
    around, tasks = Around(num_parts + 4), set[asyncio.Task[None]]()
    role = role_over(around, tasks)
    others = around.pool.take(8 if num_parts > 3 else 4, BlockState.RUNNING)
    if num_parts < 8:
        others += around.pool.take(around.pool.num_free, BlockState.RUNNING)
    offer_all(role, num_parts)
    assert not around.at_once, "there was no room"
    around.pool.release(others, BlockState.RUNNING)
    room(role)
    assert len(around.at_once) == 1, "one in one turn of the event loop"
    async with asyncio.timeout(WAIT_S):
        await around.added.wait()
    assert sorted(around.at_once + around.in_threads) == list(range(num_parts))
    assert around.failed == []
    assert around.pool.count(BlockState.RUNNING) == num_parts
    around.pool.check_integrity()


async def test_a_part_that_arrives_wrong_at_once_is_pulled_again() -> None:
    around, tasks = Around(8), set[asyncio.Task[None]]()
    around.problems[0] = CorruptKV("a bit flipped")
    role = role_over(around, tasks)
    offer_all(role, 1)
    async with asyncio.timeout(WAIT_S):
        await around.added.wait()
    assert around.at_once == [0, 0]
    assert around.failed == []


async def test_without_room_a_held_prefix_is_let_go_of() -> None:
    around, tasks = Around(4), set[asyncio.Task[None]]()
    around.pool.label(around.pool.take(1, BlockState.RUNNING)[0], b"first block")

    def hold(prompt: tuple[int, ...]) -> list[int]:
        found = around.pool.find([b"first block"])
        around.pool.share(found, BlockState.RUNNING)
        # Somebody takes the rest between the look at the room and the taking.
        others.extend(around.pool.take(around.pool.num_free, BlockState.RUNNING))
        return found

    others: list[int] = []
    around.hold_prefix = hold  # type: ignore[method-assign]
    role = role_over(around, tasks)
    offer_all(role, 3)
    assert around.pool.num_claims(0) == 1, "only that of whoever computed it"
    around.pool.release(others, BlockState.RUNNING)
    others.clear()
    around.hold_prefix = lambda prompt: []  # type: ignore[method-assign]
    room(role)
    async with asyncio.timeout(WAIT_S):
        await around.added.wait()
