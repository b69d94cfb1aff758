"""Every kind of link over host memory keeps the contract; what only some kinds can get wrong."""

from __future__ import annotations

import gc
import os
import signal
import threading
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from kv_transfer_ends import (
    HOST,
    MESSAGE_BYTES,
    OPENERS,
    Peer,
    open_gloo,
    serve_gloo,
    serve_shared_pool,
)
from link_contract import (
    BLOCK_BYTES,
    CASES,
    LAYOUT,
    NUM_BLOCKS,
    TIMEOUT_S,
    TWO_SIDED_CASES,
    Case,
    OpenEnds,
    accept,
    case_name,
    content,
    random_pool,
    transfer,
)

from pdserve.kv_transfer.gloo import GlooSink, GlooSource
from pdserve.kv_transfer.link import Deadline, Landing
from pdserve.kv_transfer.process_group import PairGroup
from pdserve.kv_transfer.rendezvous import Listener, connect
from pdserve.kv_transfer.shm import ShmSink
from pdserve.proto.errors import TransferFailed


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=[*OPENERS, "gloo in place"])
def opener(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> OpenEnds:
    kind, _, is_in_place = str(request.param).partition(" ")
    if is_in_place:  # as large blocks travel: each by itself, from one pool straight into the other
        monkeypatch.setattr("pdserve.kv_transfer.gloo.MIN_PIECE_BYTES", 1)
    return OPENERS[kind]


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_contract(case: Case, opener: OpenEnds) -> None:
    case(opener)


@pytest.mark.parametrize("case", TWO_SIDED_CASES, ids=case_name)
def test_contract_of_two_sided_links(case: Case) -> None:
    case(open_gloo)


def leftovers() -> tuple[int, int, int]:
    """File descriptors, threads (native ones too) and mapped pools of this process."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), maps.count("pdserve-kv")


def test_opening_using_and_closing_leaves_nothing_behind(opener: OpenEnds) -> None:
    def once() -> None:
        ends = opener()
        ends.move(transfer(3), [0, 1, 2], [3, 4, 5])
        ends.close()

    once()  # what is made once for the process stays
    before = leftovers()
    for _ in range(5):
        once()
    assert leftovers() == before


# Gloo: peers that die, stop and come late.


def test_a_gloo_sink_outlives_killed_and_stopped_sources_and_meets_a_fresh_one() -> None:
    """A dead peer ends the wait by itself, a stopped one by the deadline; the next epoch works."""
    pool = torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8)
    peers = [Peer(serve_gloo, seed=epoch) for epoch in (1, 2, 3)]
    try:
        for epoch, (peer, ending, reason) in enumerate(
            zip(peers, ("kill", "stop", "send"), ("Connection|went away", "Timed out", ""), strict=True), start=1
        ):
            sink = GlooSink(LAYOUT, epoch, HOST, MESSAGE_BYTES)
            assert peer.hear() == "ready"
            peer.pipe.send((sink.address, epoch, ending))
            wanted = transfer(4 if ending == "send" else 6, epoch)
            landing = Landing(pool, tuple(range(wanted.num_blocks)))
            if ending == "send":
                sink.receive(wanted, landing.block_ids, landing, accept, TIMEOUT_S)
                assert peer.hear() == "sent"
            else:
                with pytest.raises(TransferFailed, match=reason):
                    sink.receive(wanted, landing.block_ids, landing, accept, 3.0 if ending == "stop" else 2 * TIMEOUT_S)
            sink.close()
    finally:
        for peer in peers:
            peer.close()
    assert torch.equal(pool[:4], random_pool(3)[:4])


LARGE_BYTES = 64 << 20  # more than the sockets' buffers hold


def send_large(pipe: Connection, seed: int) -> None:
    torch.set_num_threads(1)
    deadline = Deadline(TIMEOUT_S)
    group = PairGroup(connect(pipe.recv(), deadline), 1, HOST, deadline)
    group.send(torch.ones(2 * LARGE_BYTES, dtype=torch.uint8)).wait(deadline)


def test_a_source_that_dies_within_a_message_ends_the_wait_at_once() -> None:
    peer, listener, deadline = Peer(send_large, seed=0), Listener(HOST), Deadline(3 * TIMEOUT_S)
    try:
        peer.pipe.send(listener.address)
        group = PairGroup(listener.accept(deadline), 0, HOST, deadline)
        received = torch.zeros(2 * LARGE_BYTES, dtype=torch.uint8)
        message = group.recv(received)
        while not received[0]:
            deadline.left_s()
        peer.kill()
        with pytest.raises(TransferFailed, match=r"closed by peer|reset"):
            message.wait(deadline)
        assert not received[-1], "the message was whole before its sender died"
        message.cancel()
        group.close()
        listener.close()
    finally:
        peer.close()


def stop_while_receiving(pipe: Connection, marker: int) -> None:
    """A sink that is stopped as soon as bytes may flow, and says later how the message ended and what came of it."""
    torch.set_num_threads(1)
    deadline = Deadline(TIMEOUT_S)
    listener = Listener(HOST)
    pipe.send(listener.address)
    group = PairGroup(listener.accept(deadline), 0, HOST, deadline)
    group.recv(torch.empty(len(transfer(1).header()) + 8, dtype=torch.uint8)).wait(deadline)
    received = torch.zeros(LARGE_BYTES, dtype=torch.uint8)
    message = group.recv(received)
    os.kill(os.getpid(), signal.SIGSTOP)
    try:
        message.wait(deadline)
        pipe.send("whole")
    except TransferFailed:
        pipe.send("broken")
    pipe.send(int((received == marker).sum()))
    pipe.recv()


def test_a_gloo_source_that_gave_up_reads_its_blocks_no_more() -> None:
    """Sent straight from the pool to a sink that is stopped; what is written to the blocks afterwards stays here."""
    marker = 0xEE
    pool = torch.zeros(1, LARGE_BYTES, dtype=torch.uint8)
    peer = Peer(stop_while_receiving, seed=marker)
    try:
        source = GlooSource(peer.hear(), pool, LAYOUT, 1, HOST, LARGE_BYTES)
        with pytest.raises(TransferFailed, match="Timed out"):
            source.send(replace(transfer(1), block_bytes=LARGE_BYTES), [0], 3.0)
        pool.fill_(marker)
        peer.signal(signal.SIGCONT)
        assert peer.hear() == "broken"
        assert peer.hear() == "0"
    finally:
        peer.close()


def send_marked(pipe: Connection, marker: int) -> None:
    """A source that is stopped while it sends, and says when it has ended."""
    torch.set_num_threads(1)
    pool = torch.full((1, 2 * LARGE_BYTES), marker, dtype=torch.uint8)
    pipe.send("ready")
    source = GlooSource(pipe.recv(), pool, LAYOUT, 1, HOST, 2 * LARGE_BYTES)
    with suppress(TransferFailed):
        source.send(replace(transfer(1), block_bytes=2 * LARGE_BYTES), [0], 5.0)
    pipe.send("ended")
    pipe.recv()


def test_a_gloo_sink_that_gave_up_has_its_landing_to_itself() -> None:
    """Bytes that were meant for it are on the wire still when its blocks serve another request."""
    marker = 0xEE
    pool = torch.zeros(1, 2 * LARGE_BYTES, dtype=torch.uint8)
    peer, deadline = Peer(send_marked, seed=marker), Deadline(TIMEOUT_S)
    sink = GlooSink(LAYOUT, 1, HOST, 2 * LARGE_BYTES)

    def stop_when_bytes_come() -> None:
        while not pool[0, 0]:
            deadline.left_s()
        peer.signal(signal.SIGSTOP)

    stopper = threading.Thread(target=stop_when_bytes_come, daemon=True)
    try:
        assert peer.hear() == "ready"
        peer.pipe.send(sink.address)
        stopper.start()
        wanted = replace(transfer(1), block_bytes=2 * LARGE_BYTES)
        with pytest.raises(TransferFailed, match="Timed out"):
            sink.receive(wanted, [0], Landing(pool, (0,)), accept, 3.0)
        assert pool[0, 0] == marker, "it was not stopped within the message"
        pool.fill_(1)
        peer.signal(signal.SIGCONT)
        stopper.join(TIMEOUT_S)
        assert peer.hear() == "ended"
        assert bool((pool == 1).all())
    finally:
        sink.close()
        peer.close()


def test_ends_that_split_a_transfer_differently_refuse_each_other() -> None:
    """A piece longer than the receive that was posted for it would end the process."""
    ends = open_gloo()
    assert isinstance(ends.sink, GlooSink)
    ends.source = GlooSource(ends.sink.address, ends.source_pool, LAYOUT, 1, HOST, 2 * MESSAGE_BYTES)
    with pytest.raises(TransferFailed, match="max_message_bytes"):
        ends.move(transfer(9), range(9), range(9))
    ends.close()


# Shared memory.


def test_shm_reads_a_live_peer_and_keeps_a_killed_ones_memory_only_until_closed() -> None:
    peer = Peer(serve_shared_pool, seed=1)
    pool = torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8)
    address = peer.hear()
    sink = ShmSink(address, LAYOUT, 1)
    try:
        sink.receive(transfer(4), [3, 2, 1, 0], Landing(pool, (0, 1, 2, 3)), accept, TIMEOUT_S)
        assert torch.equal(pool[:4], random_pool(1)[[3, 2, 1, 0]])
        assert "pdserve-kv" in Path("/proc/self/maps").read_text()
        peer.kill()
        sink.receive(transfer(1), [5], Landing(pool, (5,)), accept, TIMEOUT_S)  # no fault: the digest decides
        fresh = ShmSink(address, LAYOUT, 2)
        with pytest.raises(TransferFailed):
            fresh.receive(transfer(1, 2), [0], Landing(pool, (0,)), accept, TIMEOUT_S)
    finally:
        sink.close()
        peer.close()
    gc.collect()
    assert "pdserve-kv" not in Path("/proc/self/maps").read_text()


def test_shm_reads_a_stopped_peer() -> None:
    """The source takes no part: whether its process runs does not matter."""
    peer = Peer(serve_shared_pool, seed=1)
    pool = torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8)
    sink = ShmSink(peer.hear(), LAYOUT, 1)
    try:
        peer.signal(signal.SIGSTOP)
        sink.receive(transfer(2), [3, 2], Landing(pool, (0, 1)), accept, TIMEOUT_S)
        assert torch.equal(content(pool)[:2], random_pool(1)[[3, 2]])
    finally:
        sink.close()
        peer.close()
