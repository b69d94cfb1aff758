"""Which peers are gone, from what the controller says and from what it no longer says."""

from __future__ import annotations

from pdserve.cluster.fleet_watch import Peerage
from pdserve.proto import worker_pb2 as pb


def fleet(*members: tuple[str, int, str]) -> pb.Fleet:
    return pb.Fleet(
        members=[
            pb.FleetMember(info=pb.WorkerInfo(worker=pb.WorkerRef(worker_id=name, generation=generation)), state=state)
            for name, generation, state in members
        ]
    )


def test_a_death_is_told_once() -> None:
    peers = Peerage()
    assert peers.gone(fleet(("p0", 1, "ready"), ("d0", 5, "ready"))) == []
    assert peers.gone(fleet(("p0", 1, "dead"), ("d0", 5, "ready"))) == [("p0", 1)]
    assert peers.gone(fleet(("p0", 1, "dead"), ("d0", 5, "ready"))) == []
    assert peers.gone(fleet(("p0", 2, "ready"), ("d0", 5, "ready"))) == []
    assert peers.gone(fleet(("p0", 2, "dead"), ("d0", 5, "ready"))) == [("p0", 2)]


def test_a_peer_that_was_never_heard_of_alive_is_told_too() -> None:
    assert Peerage().gone(fleet(("p0", 1, "dead"))) == [("p0", 1)]


def test_a_death_that_nobody_heard_of_shows_by_its_successor() -> None:
    """While this worker was frozen, or the controller away, the peer died and was replaced."""
    peers = Peerage()
    peers.gone(fleet(("p0", 1, "ready")))
    assert peers.gone(fleet(("p0", 0, "starting"))) == []
    assert peers.gone(fleet(("p0", 3, "ready"))) == [("p0", 1)]
    peers.gone(fleet(("p0", 3, "ready")))
    assert peers.gone(fleet(("p0", 4, "dead"))) == [("p0", 3), ("p0", 4)]
