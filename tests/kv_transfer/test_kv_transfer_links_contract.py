"""What every kind of link promises, whichever way the bytes go."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kv_transfer_ends import (
    BLOCK_BYTES,
    HOST,
    KINDS,
    LAYOUT,
    MESSAGE_BYTES,
    NUM_BLOCKS,
    TIMEOUT_S,
    Ends,
    Peer,
    open_ends,
    reversed_ends,
    serve_gloo,
    serve_shared_pool,
    transfer,
)

from pdserve.kv_transfer.digest import block_digests, verify
from pdserve.kv_transfer.gloo import GlooSink, GlooSource
from pdserve.kv_transfer.shm import ShmSink
from pdserve.proto.errors import CorruptKV, LayoutMismatch, PdserveError, StaleReference, TransferFailed


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ends(kind: str) -> Iterator[Ends]:
    ends = open_ends(kind)
    yield ends
    ends.close()


def expected_after(ends: Ends, source_ids: list[int], target_ids: list[int]) -> torch.Tensor:
    after: torch.Tensor = ends.target_pool.clone()
    after[target_ids] = ends.source_pool[source_ids]
    return after


@pytest.mark.parametrize(
    ("source_ids", "target_ids"),
    [
        ([0], [0]),
        ([11, 0, 5], [2, 10, 3]),
        ([3, 4, 5, 6, 7], [7, 8, 9, 10, 11]),
        ([9, 8, 7, 6, 5, 4], [0, 1, 2, 3, 4, 5]),
        (list(range(12)), [5, 6, 7, 8, 0, 1, 2, 3, 11, 10, 9, 4]),
    ],
)
def test_exactly_the_named_blocks_arrive_and_no_other_is_touched(
    ends: Ends, source_ids: list[int], target_ids: list[int]
) -> None:
    after, before = expected_after(ends, source_ids, target_ids), ends.source_pool.clone()
    ends.move(transfer(len(source_ids)), source_ids, target_ids)
    assert torch.equal(ends.target_pool, after)
    assert torch.equal(ends.source_pool, before)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"link_epoch": 2}, StaleReference),
        ({"layout_hash": LAYOUT + 1}, LayoutMismatch),
        ({"block_bytes": BLOCK_BYTES // 2}, LayoutMismatch),
        ({"num_blocks": 3}, TransferFailed),
    ],
)
def test_a_transfer_that_is_not_for_this_link_is_refused_before_a_byte_lands(
    ends: Ends, change: dict[str, int], error: type[PdserveError]
) -> None:
    before = ends.target_pool.clone()
    with pytest.raises(error):
        ends.sink.receive(replace(transfer(2), **change), [0, 1], [2, 3], TIMEOUT_S)  # type: ignore[arg-type]
    if ends.source is not None:
        with pytest.raises(error):
            ends.source.send(replace(transfer(2), **change), [0, 1], TIMEOUT_S)  # type: ignore[arg-type]
    assert torch.equal(ends.target_pool, before)


@pytest.mark.parametrize("ids", [[0, NUM_BLOCKS], [-1, 0], [1, 1]])
def test_blocks_outside_the_pool_or_named_twice_are_refused(ends: Ends, ids: list[int]) -> None:
    before = ends.target_pool.clone()
    with pytest.raises(TransferFailed):
        ends.sink.receive(transfer(2), [0, 1], ids, TIMEOUT_S)
    if ends.source is not None:
        with pytest.raises(TransferFailed):
            ends.source.send(transfer(2), ids, TIMEOUT_S)
    else:
        with pytest.raises(TransferFailed):
            ends.sink.receive(transfer(2), ids, [0, 1], TIMEOUT_S)
    assert torch.equal(ends.target_pool, before)


def test_many_transfers_in_both_directions_over_the_same_links(ends: Ends) -> None:
    back = reversed_ends(ends)
    rng = random.Random(3)
    try:
        for attempt in range(20):
            for way in (ends, back):
                num_blocks = rng.randint(1, NUM_BLOCKS)
                source_ids = rng.sample(range(NUM_BLOCKS), num_blocks)
                target_ids = rng.sample(range(NUM_BLOCKS), num_blocks)
                after = expected_after(way, source_ids, target_ids)
                way.move(transfer(num_blocks, attempt=attempt), source_ids, target_ids)
                assert torch.equal(way.target_pool, after)
    finally:
        back.close()


def test_closing_twice_is_harmless_and_a_closed_link_refuses(ends: Ends) -> None:
    ends.move(transfer(1), [0], [0])
    ends.close()
    ends.close()
    with pytest.raises(TransferFailed, match="closed"):
        ends.sink.receive(transfer(1), [0], [0], TIMEOUT_S)
    if ends.source is not None:
        with pytest.raises(TransferFailed, match="closed"):
            ends.source.send(transfer(1), [0], TIMEOUT_S)


def leftovers() -> tuple[int, int, int]:
    """File descriptors, threads (native ones too) and mapped pools of this process."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), maps.count("pdserve-kv")


def test_opening_using_and_closing_leaves_nothing_behind(kind: str) -> None:
    def once() -> None:
        ends = open_ends(kind)
        ends.move(transfer(3), [0, 1, 2], [3, 4, 5])
        ends.close()

    once()  # what is made once for the process stays
    before = leftovers()
    for _ in range(5):
        once()
    assert leftovers() == before


def test_every_flipped_swapped_or_stale_block_is_caught_by_the_digests(ends: Ends) -> None:
    """Corruption at the source after hashing, in the target after the copy, and in the order of blocks."""
    rng = random.Random(5)
    num_blocks = 4
    for attempt in range(100):
        source_ids, target_ids = rng.sample(range(NUM_BLOCKS), num_blocks), rng.sample(range(NUM_BLOCKS), num_blocks)
        moved = transfer(num_blocks, attempt=attempt)
        digests = block_digests(moved.id, ends.source_pool, source_ids)
        ends.move(moved, source_ids, target_ids)
        verify(moved.id, ends.target_pool, target_ids, digests)
        corrupt(ends.target_pool, target_ids, rng)
        with pytest.raises(CorruptKV):
            verify(moved.id, ends.target_pool, target_ids, digests)
        block = rng.choice(source_ids)  # freed and used again while the transfer runs
        ends.source_pool[block, rng.randrange(BLOCK_BYTES)] ^= 1 << rng.randrange(8)
        ends.move(moved, source_ids, target_ids)
        with pytest.raises(CorruptKV, match=f"position {source_ids.index(block)} "):
            verify(moved.id, ends.target_pool, target_ids, digests)


def corrupt(pool: torch.Tensor, block_ids: list[int], rng: random.Random) -> None:
    first, second = rng.sample(block_ids, 2)
    match rng.randrange(4):
        case 0:
            pool[first, rng.randrange(BLOCK_BYTES)] ^= 1 << rng.randrange(8)
        case 1:
            pool[first].zero_()
        case 2:
            pool[first].copy_(pool[second])
        case _:
            pool[[first, second]] = pool[[second, first]]


# Two-sided links: what the peer announces, and peers that do not come or die.


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"num_blocks": 3}, TransferFailed),
        ({"link_epoch": 2}, StaleReference),
        ({"layout_hash": LAYOUT + 1}, LayoutMismatch),
    ],
)
def test_gloo_refuses_another_header_before_a_byte_lands(change: dict[str, int], error: type[PdserveError]) -> None:
    ends = open_ends("gloo")
    before = ends.target_pool.clone()
    sent = replace(transfer(2), **change)  # type: ignore[arg-type]
    assert isinstance(ends.sink, GlooSink)
    source = GlooSource(ends.sink.address, ends.source_pool, sent.layout_hash, sent.link_epoch, HOST, MESSAGE_BYTES)
    thread, errors = in_thread(lambda: source.send(sent, range(sent.num_blocks), TIMEOUT_S))
    with pytest.raises(error):
        ends.sink.receive(transfer(2), [0, 1], [2, 3], TIMEOUT_S)
    thread.join(2 * TIMEOUT_S)
    assert isinstance(errors[0], TransferFailed)
    assert torch.equal(ends.target_pool, before)
    source.close()
    ends.close()


def test_gloo_refuses_another_hand_off() -> None:
    ends = open_ends("gloo")
    before = ends.target_pool.clone()
    assert ends.source is not None
    source = ends.source
    thread, errors = in_thread(lambda: source.send(transfer(2, attempt=1), [0, 1], TIMEOUT_S))
    with pytest.raises(StaleReference, match="another hand-off"):
        ends.sink.receive(transfer(2, attempt=2), [0, 1], [2, 3], TIMEOUT_S)
    thread.join(2 * TIMEOUT_S)
    assert isinstance(errors[0], TransferFailed)
    assert torch.equal(ends.target_pool, before)
    ends.close()


def in_thread(call: Callable[[], None]) -> tuple[threading.Thread, list[Exception]]:
    errors: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, errors


def test_gloo_gives_up_at_its_deadline_when_the_source_never_comes() -> None:
    ends = open_ends("gloo")
    with pytest.raises(TransferFailed):
        ends.sink.receive(transfer(1), [0], [0], 0.2)
    ends.close()


def test_gloo_gives_up_at_its_deadline_when_the_sink_never_receives() -> None:
    ends = open_ends("gloo")
    assert ends.source is not None
    with pytest.raises(TransferFailed):
        ends.source.send(transfer(1), [0], 0.2)
    ends.close()


def test_gloo_gives_up_at_its_deadline_when_an_open_link_falls_silent() -> None:
    ends = open_ends("gloo")
    assert ends.source is not None
    ends.move(transfer(1), [0], [0])
    with pytest.raises(TransferFailed):
        ends.source.send(transfer(1), [0], 0.3)
    with pytest.raises(TransferFailed):
        ends.sink.receive(transfer(1), [0], [0], 0.3)
    with pytest.raises(TransferFailed, match="closed"):  # what failed once is not used again
        ends.source.send(transfer(1), [0], TIMEOUT_S)
    with pytest.raises(TransferFailed, match="closed"):
        ends.sink.receive(transfer(1), [0], [0], TIMEOUT_S)
    ends.close()


def test_a_gloo_sink_outlives_killed_and_stopped_sources_and_meets_a_fresh_one() -> None:
    """A dead peer ends the wait by itself, a stopped one by the deadline; the next epoch works."""
    pool = torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8)
    peers = [Peer(serve_gloo, seed=epoch) for epoch in (1, 2, 3)]
    try:
        for epoch, (peer, ending, reason) in enumerate(
            zip(peers, ("kill", "stop", "send"), ("Connection|went away", "Timed out", ""), strict=True), start=1
        ):
            sink = GlooSink(pool, LAYOUT, epoch, HOST, MESSAGE_BYTES)
            assert peer.hear() == "ready"
            peer.pipe.send((sink.address, epoch, ending))
            wanted = transfer(4 if ending == "send" else 6, epoch)
            ids = range(wanted.num_blocks)
            if ending == "send":
                sink.receive(wanted, ids, ids, TIMEOUT_S)
                assert peer.hear() == "sent"
            else:
                with pytest.raises(TransferFailed, match=reason):
                    sink.receive(wanted, ids, ids, 3.0 if ending == "stop" else 2 * TIMEOUT_S)
            sink.close()
    finally:
        for peer in peers:
            peer.close()
    assert torch.equal(pool[:4], open_ends("loopback", seed=3).source_pool[:4])


# Shared memory.


def test_shm_reads_a_live_peer_and_keeps_a_killed_ones_memory_only_until_closed() -> None:
    peer = Peer(serve_shared_pool, seed=1)
    pool = torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8)
    address = peer.hear()
    sink = ShmSink(address, pool, LAYOUT, 1)
    try:
        sink.receive(transfer(4), [3, 2, 1, 0], [0, 1, 2, 3], TIMEOUT_S)
        assert torch.equal(pool[:4], open_ends("loopback", seed=1).source_pool[[3, 2, 1, 0]])
        assert "pdserve-kv" in Path("/proc/self/maps").read_text()
        peer.kill()
        sink.receive(transfer(1), [5], [5], TIMEOUT_S)  # no fault: the digest decides what it is worth
        fresh = ShmSink(address, pool, LAYOUT, 2)
        with pytest.raises(TransferFailed):
            fresh.receive(transfer(1, epoch=2), [0], [0], TIMEOUT_S)
    finally:
        sink.close()
        peer.close()
    gc.collect()
    assert "pdserve-kv" not in Path("/proc/self/maps").read_text()
