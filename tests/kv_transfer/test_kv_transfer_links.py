"""The table of open links, the rendezvous, and the identity of shared pools."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Callable

import pytest

from pdserve.kv_transfer.link import Deadline
from pdserve.kv_transfer.links import LinkKey, LinkTable
from pdserve.kv_transfer.rendezvous import Listener, connect
from pdserve.kv_transfer.shared_pool import PoolAddress, SharedPool, host_id, map_pool
from pdserve.proto.errors import PdserveError, StaleReference, TransferFailed

WAIT_S = 10.0


class FakeLink:
    def __init__(self, link_epoch: int) -> None:
        self.link_epoch = link_epoch
        self.is_open = True

    def close(self) -> None:
        self.is_open = False


def key(worker_id: str = "w", generation: int = 1) -> LinkKey:
    return LinkKey(worker_id, generation, "gloo")


def use(table: LinkTable[FakeLink], at: LinkKey, link_epoch: int | None = None) -> FakeLink:
    with table.use(at, FakeLink, WAIT_S, link_epoch) as (link, epoch):
        assert link.is_open
        assert link.link_epoch == epoch
        return link


def test_a_link_is_opened_once_and_kept() -> None:
    table: LinkTable[FakeLink] = LinkTable(2)
    assert use(table, key()) is use(table, key())


def test_a_failed_link_is_closed_and_the_next_has_a_newer_epoch() -> None:
    table: LinkTable[FakeLink] = LinkTable(2)
    with pytest.raises(TransferFailed), table.use(key(), FakeLink, WAIT_S) as (failed, _):
        raise TransferFailed("broken")
    assert not failed.is_open
    assert use(table, key()).link_epoch > failed.link_epoch


def test_the_least_recently_used_link_makes_room() -> None:
    table: LinkTable[FakeLink] = LinkTable(2)
    first, second = use(table, key("a")), use(table, key("b"))
    use(table, key("a"))
    use(table, key("c"))
    assert (first.is_open, second.is_open, len(table)) == (True, False, 2)


def test_a_busy_link_is_neither_shared_nor_evicted() -> None:
    table: LinkTable[FakeLink] = LinkTable(1)
    with table.use(key("a"), FakeLink, WAIT_S) as (link, _):
        for other in (key("a"), key("b")):
            with pytest.raises(TransferFailed, match="not free in time"), table.use(other, FakeLink, 0.01):
                pytest.fail("claimed")
        assert link.is_open
    assert use(table, key("a")) is link


def test_whoever_waits_for_a_link_gets_it_when_its_user_is_done() -> None:
    table: LinkTable[FakeLink] = LinkTable(1)
    got: list[FakeLink] = []
    with table.use(key(), FakeLink, WAIT_S) as (link, _):
        thread = threading.Thread(target=lambda: got.append(use(table, key())))
        thread.start()
    thread.join(WAIT_S)
    assert got == [link]


def test_the_source_side_follows_newer_epochs_and_refuses_dead_ones() -> None:
    table: LinkTable[FakeLink] = LinkTable(2)
    old = use(table, key(), link_epoch=5)
    assert use(table, key(), link_epoch=5) is old
    assert use(table, key(), link_epoch=8).link_epoch == 8
    assert not old.is_open
    for dead in (5, 7):
        with pytest.raises(StaleReference):
            use(table, key(), link_epoch=dead)
    with pytest.raises(TransferFailed), table.use(key(), FakeLink, WAIT_S, 8):
        raise TransferFailed("broken")
    with pytest.raises(StaleReference):
        use(table, key(), link_epoch=8)
    assert use(table, key(), link_epoch=9).is_open


def test_a_restarted_peer_gets_a_new_link_and_its_former_self_none() -> None:
    table: LinkTable[FakeLink] = LinkTable(4)
    old = use(table, key(generation=1))
    assert use(table, key(generation=2)) is not old
    assert not old.is_open
    with pytest.raises(StaleReference):
        use(table, key(generation=1))


def test_dropping_a_peer_or_closing_the_table_spares_busy_links_until_they_are_done() -> None:
    table: LinkTable[FakeLink] = LinkTable(4)
    idle = use(table, LinkKey("w", 1, "shm"))
    with table.use(key(), FakeLink, WAIT_S) as (busy, _):
        table.drop_peer("w")
        assert (idle.is_open, busy.is_open) == (False, True)
    assert not busy.is_open
    other = use(table, key("v"))
    table.close()
    assert not other.is_open
    with pytest.raises(TransferFailed):
        use(table, key("v"))


def test_a_link_that_cannot_be_opened_leaves_nothing() -> None:
    table: LinkTable[FakeLink] = LinkTable(1)

    def refuse(link_epoch: int) -> FakeLink:
        raise TransferFailed(f"no link of epoch {link_epoch}")

    with pytest.raises(TransferFailed, match="epoch 1"), table.use(key(), refuse, WAIT_S):
        pytest.fail("opened")
    assert len(table) == 0
    assert use(table, key()).is_open


def test_only_the_invited_peer_is_accepted() -> None:
    listener = Listener("127.0.0.1")
    where, _, _ = listener.address.rpartition("/")
    host, _, port = where.rpartition(":")
    hung_up = socket.create_connection((host, int(port)))
    hung_up.close()
    stranger = connect(f"{where}/{'00' * 16}", Deadline(WAIT_S))
    invited = connect(listener.address, Deadline(WAIT_S))
    accepted = listener.accept(Deadline(WAIT_S))
    invited.put("key", b"value", Deadline(WAIT_S))
    assert accepted.next(Deadline(WAIT_S)) == ("key", b"value")
    for end in (stranger, invited, accepted, listener):
        end.close()


def test_a_silent_stranger_does_not_keep_the_invited_out() -> None:
    listener = Listener("127.0.0.1")
    where, _, _ = listener.address.rpartition("/")
    host, _, port = where.rpartition(":")
    silent = socket.create_connection((host, int(port)))
    invited = connect(listener.address, Deadline(WAIT_S))
    accepted = listener.accept(Deadline(WAIT_S))
    for end in (silent, invited, accepted, listener):
        end.close()


def test_a_peer_that_announces_too_much_or_hangs_up_is_refused() -> None:
    listener = Listener("127.0.0.1")
    invited = connect(listener.address, Deadline(WAIT_S))
    accepted = listener.accept(Deadline(WAIT_S))
    invited.write(b"\x01\x00\xff\xff\xff\xff", Deadline(WAIT_S))
    with pytest.raises(TransferFailed, match="4294967295 bytes"):
        accepted.next(Deadline(WAIT_S))
    invited.close()
    with pytest.raises(TransferFailed, match="hung up"):
        accepted.next(Deadline(WAIT_S))
    accepted.close()
    listener.close()


@pytest.mark.parametrize("address", ["", "nonsense", "127.0.0.1/00", "127.0.0.1:99999999999/00", "127.0.0.1:1/zz"])
def test_addresses_that_are_none_are_typed_errors(address: str) -> None:
    with pytest.raises(TransferFailed):
        connect(address, Deadline(WAIT_S))
    with pytest.raises(TransferFailed):
        map_pool(address)


def test_a_pool_can_be_mapped_until_it_is_closed_and_has_no_name() -> None:
    pool = SharedPool(8192)
    pool.tensor[:3] = 7
    mapped = map_pool(pool.address)
    assert mapped.size == 8192
    assert mapped[:4].tolist() == [7, 7, 7, 0]
    assert not mapped.flags.writeable
    assert not [name for name in os.listdir("/dev/shm") if "pdserve" in name]
    pool.close()
    pool.close()
    with pytest.raises(PdserveError):
        map_pool(pool.address)
    pool.tensor[0] = 9  # the engine's tensor outlives the address
    assert mapped[0] == 9


def other_file() -> int:
    return os.open("/proc/self/exe", os.O_RDONLY)


def unsealed_file() -> int:
    fd = os.memfd_create("pdserve-kv")
    os.ftruncate(fd, 4096 + 8192)
    return fd


def another_pool() -> int:
    fd = os.memfd_create("pdserve-kv", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096 + 8192)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


@pytest.mark.parametrize("impostor", [other_file, unsealed_file, another_pool])
def test_what_took_the_place_of_a_pool_is_not_mistaken_for_it(impostor: Callable[[], int]) -> None:
    fd = impostor()
    with pytest.raises(StaleReference):
        map_pool(PoolAddress(os.getpid(), fd, 8192, "00" * 16).text())
    os.close(fd)


def test_a_pool_of_another_size_is_refused() -> None:
    pool = SharedPool(8192)
    pid, fd, _, nonce = pool.address.split(":")
    with pytest.raises(StaleReference):
        map_pool(f"{pid}:{fd}:4096:{nonce}")
    pool.close()


def test_the_host_is_the_same_for_every_process_of_this_user() -> None:
    assert host_id() == host_id()
    assert str(os.getuid()) in host_id()


def test_a_link_that_takes_its_time_to_close_keeps_nobody_from_another() -> None:
    table: LinkTable[Slow] = LinkTable(4)
    other = LinkKey("p1", 1, "gloo")
    with table.use(other, Slow.over(table, other), 1.0):
        pass
    key = LinkKey("p0", 1, "gloo")
    with table.use(key, Slow.over(table, other), 1.0) as (link, _):
        pass
    table.drop_peer("p0", 1)
    assert link.saw_idle == [True]


class Slow:
    """A link; another thread looks at the table while this one is being closed."""

    def __init__(self, table: LinkTable[Slow], other: LinkKey) -> None:
        self.table = table
        self.other = other
        self.saw_idle: list[bool] = []

    @classmethod
    def over(cls, table: LinkTable[Slow], other: LinkKey) -> Callable[[int], Slow]:
        return lambda epoch: cls(table, other)

    def close(self) -> None:
        looking = threading.Thread(target=lambda: self.saw_idle.append(self.table.is_idle(self.other)), daemon=True)
        looking.start()
        looking.join(5.0)
