"""What every kind of link promises, as functions over a way to open one; each kind's test module runs `CASES`.

    @pytest.mark.parametrize("case", link_contract.CASES, ids=case_name)
    def test_contract(case): case(open_my_ends)

Two-sided kinds run `TWO_SIDED_CASES` as well. Knows nothing of any kind: host or device memory, one process or more.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Protocol

import pytest
import torch
from link_ends import (
    BLOCK_BYTES,
    LAYOUT,
    NUM_BLOCKS,
    TIMEOUT_S,
    Ends,
    Ids,
    Sender,
    accept,
    content,
    content_after,
    random_bytes,
    random_pool,
    transfer,
)

from pdserve.kv_transfer.link import Landing
from pdserve.proto.errors import CorruptKV, LayoutMismatch, PdserveError, StaleReference, TransferFailed
from pdserve.proto.types import HandoffId

__all__ = [
    "BLOCK_BYTES",
    "CASES",
    "LAYOUT",
    "NUM_BLOCKS",
    "TIMEOUT_S",
    "TWO_SIDED_CASES",
    "Case",
    "Ends",
    "Ids",
    "OpenEnds",
    "Sender",
    "accept",
    "case_name",
    "content",
    "random_bytes",
    "random_pool",
    "transfer",
]

NOT_TODAY_S = 0.2  # of waits that end at their deadline


class OpenEnds(Protocol):
    """Opens both ends of a fresh link of layout `LAYOUT`."""

    def __call__(self, link_epoch: int = 1) -> Ends: ...


Case = Callable[[OpenEnds], None]


def case_name(case: Case) -> str:
    return getattr(case, "__name__", "case")


# Bytes.


def exactly_the_named_blocks_arrive_and_no_other_row_is_touched(open_ends: OpenEnds) -> None:
    every = list(range(NUM_BLOCKS))
    scattered = random.Random(1).sample(every, NUM_BLOCKS)
    ends, before = open_ends(), None
    for source_ids, target_ids in (
        ([0], [0]),
        ([11, 0, 5], [2, 23, 3]),
        ([3, 4, 5, 6, 7], [7, 8, 9, 10, 11]),
        (every[:7][::-1], every[9:16]),
        (every, scattered),
        (scattered, every),
        (scattered[:13], scattered[5:18]),
    ):
        after, before = content_after(ends, source_ids, target_ids), content(ends.source_pool)
        ends.move(transfer(len(source_ids)), source_ids, target_ids)
        assert torch.equal(content(ends.target_pool), after)
        assert torch.equal(content(ends.source_pool), before)
        ends.target_pool.copy_(random_pool(9))
    ends.close()


def parts_of_many_hand_offs_follow_each_other_over_one_link(open_ends: OpenEnds) -> None:
    ends, rng = open_ends(), random.Random(3)
    for attempt in range(6):
        free, part = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS), 0
        source_ids = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
        first = 0
        while first < NUM_BLOCKS:
            last = min(NUM_BLOCKS, first + rng.randint(1, 9))
            moved = transfer(last - first, attempt=attempt, part=part)
            check = ends.vouched(moved, source_ids[first:last], first)
            ends.move(moved, source_ids[first:last], free[first:last], check)
            first, part = last, part + 1
        assert torch.equal(content(ends.target_pool)[free], content(ends.source_pool)[source_ids])
    ends.close()


def a_landing_may_be_other_memory_each_time(open_ends: OpenEnds) -> None:
    ends = open_ends()
    staging = torch.zeros_like(ends.target_pool[:5])
    for target in (staging, ends.target_pool, staging):
        moved = Ends(ends.source_pool, target, ends.sink, ends.source, ends.digester)
        after = content_after(moved, [7, 20, 3], [4, 0, 2])
        moved.move(transfer(3), [7, 20, 3], [4, 0, 2])
        assert torch.equal(content(target), after)
    ends.close()


def every_block_is_checked_once_and_in_place_by_then(open_ends: OpenEnds) -> None:
    ends = open_ends()
    source_ids = random.Random(4).sample(range(NUM_BLOCKS), NUM_BLOCKS)
    target_ids = random.Random(5).sample(range(NUM_BLOCKS), NUM_BLOCKS)
    wanted = content(ends.source_pool)[source_ids]
    checked: list[int] = []

    def check(first: int, pool: torch.Tensor, block_ids: Ids) -> None:
        positions = range(first, first + len(block_ids))
        assert list(block_ids) == [target_ids[position] for position in positions]
        assert torch.equal(content(pool)[list(block_ids)], wanted[list(positions)])
        checked.extend(positions)

    ends.move(transfer(NUM_BLOCKS), source_ids, target_ids, check)
    assert sorted(checked) == list(range(NUM_BLOCKS))
    ends.close()


# Refusals.

LOCAL_REFUSALS: Sequence[tuple[dict[str, int], type[PdserveError], str]] = (
    ({"link_epoch": 2}, StaleReference, "epoch"),
    ({"layout_hash": LAYOUT + 1}, LayoutMismatch, "layout"),
    ({"block_bytes": BLOCK_BYTES // 2}, LayoutMismatch, "layout"),
    ({"num_blocks": 3}, TransferFailed, "3 different blocks"),
)


def a_transfer_that_is_not_for_this_link_is_refused_before_a_byte_lands(open_ends: OpenEnds) -> None:
    for change, error, words in LOCAL_REFUSALS:
        ends = open_ends()
        before, wrong = content(ends.target_pool), replace(transfer(2), **change)  # type: ignore[arg-type]
        with pytest.raises(error, match=words):
            ends.sink.receive(wrong, [0, 1], Landing(ends.target_pool, (2, 3)), accept, TIMEOUT_S)
        if ends.source is not None:
            with pytest.raises(error, match=words):
                ends.source.send(wrong, [0, 1], TIMEOUT_S)
        assert torch.equal(content(ends.target_pool), before)
        ends.close()


def blocks_outside_the_memory_or_named_twice_are_refused(open_ends: OpenEnds) -> None:
    for ids in ((0, NUM_BLOCKS), (-1, 0), (1, 1)):
        ends = open_ends()
        before = content(ends.target_pool)
        with pytest.raises(TransferFailed):
            ends.sink.receive(transfer(2), [0, 1], Landing(ends.target_pool, ids), accept, TIMEOUT_S)
        with pytest.raises(TransferFailed):
            offer(ends, ids)
        assert torch.equal(content(ends.target_pool), before)
        ends.close()


def offer(ends: Ends, source_ids: Ids) -> None:
    """Two blocks, at the end that knows the source's pool."""
    if ends.source is None:
        ends.sink.receive(transfer(2), source_ids, Landing(ends.target_pool, (0, 1)), accept, TIMEOUT_S)
    else:
        ends.source.send(transfer(2), source_ids, TIMEOUT_S)


# Corruption: never a silent pass, and nothing is written after the refusal.


def flip_a_bit(pool: torch.Tensor, ids: list[int], rng: random.Random) -> None:
    pool[rng.choice(ids), rng.randrange(BLOCK_BYTES)] ^= 1 << rng.randrange(8)


def zero_a_run(pool: torch.Tensor, ids: list[int], rng: random.Random) -> None:
    pool[rng.choice(ids), BLOCK_BYTES // 2 :] = 0


def reuse_a_block(pool: torch.Tensor, ids: list[int], rng: random.Random) -> None:
    stale = rng.choice(ids)
    pool[stale] = pool[(stale + 1) % NUM_BLOCKS].clone()


def swap_blocks(pool: torch.Tensor, ids: list[int], rng: random.Random) -> None:
    pair = rng.sample(ids, 2)
    pool[pair] = pool[pair[::-1]].clone()


def blocks_that_differ_from_what_was_offered_never_pass(open_ends: OpenEnds) -> None:
    rng = random.Random(5)
    for link_epoch, spoil in enumerate((flip_a_bit, zero_a_run, reuse_a_block, swap_blocks) * 3, start=1):
        ends = open_ends(link_epoch)
        source_ids = rng.sample(range(NUM_BLOCKS), 20)
        target_ids = rng.sample(range(NUM_BLOCKS), 20)
        moved = transfer(20, link_epoch)
        check = ends.vouched(moved, source_ids)
        spoil(ends.source_pool, source_ids, rng)
        ends.source_written()
        with pytest.raises(CorruptKV, match="position"):
            ends.move(moved, source_ids, target_ids, check)
        found = content(ends.target_pool)
        ends.source_pool.copy_(random_pool(link_epoch))
        ends.close()
        assert torch.equal(content(ends.target_pool), found)


def blocks_in_another_order_never_pass(open_ends: OpenEnds) -> None:
    """Where both ends compare what they are about to do, they may refuse before a byte moves."""
    ends, moved = open_ends(), transfer(3)
    check = ends.vouched(moved, [4, 5, 9])
    with pytest.raises((CorruptKV, TransferFailed)):
        ends.move(moved, [4, 5, 9], [0, 1, 2], check, sent_ids=[5, 4, 9])
    ends.close()


def a_missing_digest_is_corruption(open_ends: OpenEnds) -> None:
    ends, moved = open_ends(), transfer(4)
    digests = ends.digester.digests(moved.id, LAYOUT, 0, ends.source_pool, range(4))
    with pytest.raises(CorruptKV, match="3 digests"):
        ends.move(moved, range(4), range(4), ends.digester.checker(moved.id, LAYOUT, 0, digests[:3]))
    ends.close()


# Time and closing.


def a_transfer_ends_at_its_deadline(open_ends: OpenEnds) -> None:
    ends = open_ends()
    timeout_s = 0.0 if ends.source is None else NOT_TODAY_S
    with pytest.raises(TransferFailed):
        ends.sink.receive(transfer(1), [0], Landing(ends.target_pool, (0,)), accept, timeout_s)
    ends.close()


def closing_during_a_transfer_ends_it_and_nothing_is_written_later(open_ends: OpenEnds) -> None:
    ends = open_ends()
    closers: list[threading.Thread] = []

    def close_meanwhile(first: int, pool: torch.Tensor, block_ids: Ids) -> None:
        if not closers:
            closers.append(threading.Thread(target=ends.sink.close, daemon=True))
            closers[0].start()

    with suppress(TransferFailed):
        ends.move(transfer(NUM_BLOCKS), range(NUM_BLOCKS), range(NUM_BLOCKS), close_meanwhile)
        assert torch.equal(content(ends.target_pool), content(ends.source_pool))
    found = content(ends.target_pool)
    ends.source_pool.fill_(1)
    closers[0].join(TIMEOUT_S)
    assert not closers[0].is_alive()
    with pytest.raises(TransferFailed, match="closed"):
        ends.sink.receive(transfer(1), [0], Landing(ends.target_pool, (0,)), accept, TIMEOUT_S)
    ends.close()
    assert torch.equal(content(ends.target_pool), found)


def closing_twice_is_harmless_and_a_closed_link_refuses(open_ends: OpenEnds) -> None:
    ends = open_ends()
    ends.move(transfer(1), [0], [0])
    ends.sink.close()
    ends.sink.close()
    with pytest.raises(TransferFailed, match="closed"):
        ends.sink.receive(transfer(1), [0], Landing(ends.target_pool, (0,)), accept, TIMEOUT_S)
    if ends.source is not None:
        ends.source.close()
        ends.source.close()
        with pytest.raises(TransferFailed, match="closed"):
            ends.source.send(transfer(1), [0], TIMEOUT_S)
    ends.close()


# Two-sided kinds: what the source announces, and peers that do not come or fall silent.

ANNOUNCEMENTS: Sequence[tuple[dict[str, object], type[PdserveError], str]] = (
    ({"link_epoch": 2}, StaleReference, "link epoch 2"),
    ({"layout_hash": LAYOUT + 1}, LayoutMismatch, "another KV layout"),
    ({"id": HandoffId("request", 1, 7)}, StaleReference, "another hand-off"),
    ({"part": 1}, StaleReference, "part 1"),
    ({"num_blocks": 3}, TransferFailed, "3 blocks"),
)


def another_announcement_is_refused_by_name_before_a_byte_lands(open_ends: OpenEnds) -> None:
    for change, error, words in ANNOUNCEMENTS:
        ends = open_ends()
        before = content(ends.target_pool)
        sent = replace(transfer(2), **change)  # type: ignore[arg-type]
        assert ends.another_source is not None
        assert ends.source is not None
        ends.source.close()
        ends.source = ends.another_source(sent.layout_hash, sent.link_epoch)
        with pytest.raises(error, match=words):
            ends.move(transfer(2), [0, 1], [2, 3], accept, sent, range(sent.num_blocks))
        assert torch.equal(content(ends.target_pool), before)
        ends.close()


def a_source_gives_up_at_its_deadline_when_the_sink_never_receives(open_ends: OpenEnds) -> None:
    ends = open_ends()
    assert ends.source is not None
    with pytest.raises(TransferFailed):
        ends.source.send(transfer(1), [0], NOT_TODAY_S)
    ends.close()


def an_open_link_that_falls_silent_ends_at_the_deadline_and_is_not_used_again(open_ends: OpenEnds) -> None:
    for order in (0, 1):
        ends = open_ends()
        assert ends.source is not None
        ends.move(transfer(1), [0], [0])
        send = partial(ends.source.send, transfer(1), [0])
        receive = partial(ends.sink.receive, transfer(1), [0], Landing(ends.target_pool, (0,)), accept)
        calls = (send, receive) if order else (receive, send)
        for call in calls:
            with pytest.raises(TransferFailed):
                call(NOT_TODAY_S)
        for call in calls:
            with pytest.raises(TransferFailed, match="closed"):
                call(TIMEOUT_S)
        ends.close()


CASES: Sequence[Case] = (
    exactly_the_named_blocks_arrive_and_no_other_row_is_touched,
    parts_of_many_hand_offs_follow_each_other_over_one_link,
    a_landing_may_be_other_memory_each_time,
    every_block_is_checked_once_and_in_place_by_then,
    a_transfer_that_is_not_for_this_link_is_refused_before_a_byte_lands,
    blocks_outside_the_memory_or_named_twice_are_refused,
    blocks_that_differ_from_what_was_offered_never_pass,
    blocks_in_another_order_never_pass,
    a_missing_digest_is_corruption,
    a_transfer_ends_at_its_deadline,
    closing_during_a_transfer_ends_it_and_nothing_is_written_later,
    closing_twice_is_harmless_and_a_closed_link_refuses,
)

TWO_SIDED_CASES: Sequence[Case] = (
    another_announcement_is_refused_by_name_before_a_byte_lands,
    a_source_gives_up_at_its_deadline_when_the_sink_never_receives,
    an_open_link_that_falls_silent_ends_at_the_deadline_and_is_not_used_again,
)
