"""Control calls between workers while peers die, restart under the same id, and are declared gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from pdserve.kv_transfer.lease import SendKey
from pdserve.kv_transfer.peers import Peers, Redemption
from pdserve.proto import wire
from pdserve.proto import worker_pb2 as pb
from pdserve.proto import worker_pb2_grpc as rpc
from pdserve.proto.channels import SERVER_OPTIONS
from pdserve.proto.errors import StaleReference, WorkerLost
from pdserve.proto.types import HandoffId, KVLayout, KVPart, KVTicket, WorkerRef

SOURCE = WorkerRef("p1", 8, "host:1")
ID = HandoffId("r", 0, 1)
WAIT_S = 10.0


class Peer(rpc.KVPeerServicer):
    """Acknowledges a release when `may_answer` is set; refuses what is for another generation."""

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.offered: list[pb.OfferRequest] = []
        self.redeemed: list[pb.RedeemRequest] = []
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        rpc.add_KVPeerServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    @property
    def ref(self) -> WorkerRef:
        return WorkerRef("p0", self.generation, f"127.0.0.1:{self.port}")

    async def Ask(self, requests: AsyncIterator[pb.PeerRequest], context: Any) -> AsyncIterator[pb.PeerReply]:
        async for request in requests:
            reply = pb.PeerReply(number=request.number)
            match request.WhichOneof("request"):
                case "offer":
                    self.offered.append(request.offer)
                case "redeem":
                    self.redeemed.append(request.redeem)
                case "renew":
                    reply.lost.extend(list(request.renew.ids)[1:])
                case "release" if request.release.source_generation != self.generation:
                    reply.error.CopyFrom(pb.WireError(kind="StaleReference", message="another generation"))
                case "release":
                    self.asked.set()
                    await self.may_answer.wait()
            yield reply


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    peer = Peer(generation=2)
    await peer.server.start()
    yield peer
    await peer.server.stop(None)


@pytest.fixture
async def peers() -> AsyncIterator[Peers]:
    peers = Peers(timeout_s=WAIT_S)
    yield peers
    await peers.close()


async def release(peers: Peers, ref: WorkerRef) -> None:
    await peers.release(ref, ID, "redeemed")


@pytest.mark.parametrize("first_token", [None, 0, 7])
async def test_an_offer_carries_its_ticket_and_its_part_whole(
    peer: Peer, peers: Peers, first_token: int | None
) -> None:
    layout = KVLayout("model", "bfloat16", 2, 4, 8, block_size=16)
    ticket = KVTicket(ID, SOURCE, 40, layout, "xxh3", 12.5, "host", {"shm": "/pool", "gloo": "10.0.0.1"})
    part = KVPart(1, 2, (5, 3), (2**64 - 1, 0), first_token)
    await peers.offer(peer.ref, ticket, part)
    (request,) = peer.offered
    assert wire.ticket_from_wire(request.ticket) == ticket
    assert wire.part_from_wire(request.part) == part
    assert request.target_generation == peer.generation
    assert part.is_last == (first_token is not None)


async def test_a_redemption_names_the_part_the_link_and_both_generations(peer: Peer, peers: Peers) -> None:
    await peers.redeem(peer.ref, SOURCE, Redemption(ID, SendKey(link_epoch=4, part=1), 2, "gloo", "host:5"))
    (request,) = peer.redeemed
    assert wire.handoff_from_wire(request.id) == ID
    assert wire.ref_from_wire(request.target) == SOURCE
    assert (request.source_generation, request.link_epoch, request.part, request.first) == (peer.generation, 4, 1, 2)
    assert (request.link, request.link_address) == ("gloo", "host:5")


async def test_a_renewal_tells_which_leases_are_lost(peer: Peer, peers: Peers) -> None:
    lost = HandoffId("r", 1, 1)
    assert await peers.renew(peer.ref, [ID, lost]) == [lost]


async def test_a_late_word_to_a_former_generation_leaves_calls_to_the_present_one_alone(
    peer: Peer, peers: Peers
) -> None:
    under_way = asyncio.create_task(release(peers, peer.ref))
    await peer.asked.wait()
    former = WorkerRef("p0", 1, peer.ref.address)
    with pytest.raises(StaleReference):
        await release(peers, former)
    peer.may_answer.set()
    await asyncio.wait_for(under_way, WAIT_S)
    await release(peers, peer.ref)


async def test_calls_to_a_process_that_is_gone_end_as_worker_lost_at_once_and_ever_after(
    peer: Peer, peers: Peers
) -> None:
    under_way = asyncio.create_task(release(peers, peer.ref))
    await peer.asked.wait()
    await peers.drop("p0", 2)
    with pytest.raises(WorkerLost):
        await asyncio.wait_for(under_way, WAIT_S)
    with pytest.raises(WorkerLost):
        await release(peers, peer.ref)


async def test_dropping_a_former_generation_spares_the_present_one(peer: Peer, peers: Peers) -> None:
    peer.may_answer.set()
    await release(peers, peer.ref)
    await peers.drop("p0", 1)
    await release(peers, peer.ref)


async def test_a_call_on_a_channel_that_is_being_closed_ends_as_worker_lost(peer: Peer, peers: Peers) -> None:
    peer.may_answer.set()
    await release(peers, peer.ref)
    await peers._channels[peer.ref].close()
    with pytest.raises(WorkerLost):
        await release(peers, peer.ref)


async def test_a_stream_that_broke_ends_its_requests_and_the_next_one_opens_another(peer: Peer, peers: Peers) -> None:
    under_way = asyncio.create_task(release(peers, peer.ref))
    await peer.asked.wait()
    peers._streams[peer.ref]._call.cancel()
    with pytest.raises(WorkerLost):
        await asyncio.wait_for(under_way, WAIT_S)
    peer.may_answer.set()
    await asyncio.wait_for(release(peers, peer.ref), WAIT_S)


class LatePeer(Peer):
    """Answers nothing but renewals, those in the reverse order once `num_wanted` are there and it may."""

    num_wanted = 1

    async def Ask(self, requests: AsyncIterator[pb.PeerRequest], context: Any) -> AsyncIterator[pb.PeerReply]:
        replies: list[pb.PeerReply] = []
        async for request in requests:
            if request.WhichOneof("request") != "renew":
                continue
            replies.append(pb.PeerReply(number=request.number, lost=list(request.renew.ids)[1:]))
            if len(replies) == self.num_wanted:
                self.asked.set()
                await self.may_answer.wait()
                while replies:
                    yield replies.pop()


@pytest.fixture
async def late_peer() -> AsyncIterator[LatePeer]:
    peer = LatePeer(generation=2)
    await peer.server.start()
    yield peer
    await peer.server.stop(None)


async def test_a_request_without_an_answer_ends_at_its_deadline_and_spares_the_others(late_peer: LatePeer) -> None:
    peers, hasty = Peers(timeout_s=WAIT_S), HandoffId("r", 1, 1)
    under_way = asyncio.create_task(peers.renew(late_peer.ref, [ID, hasty]))
    await late_peer.asked.wait()
    peers._timeout_s = 0.1
    with pytest.raises(WorkerLost, match="in time"):
        await release(peers, late_peer.ref)
    late_peer.may_answer.set()
    assert await asyncio.wait_for(under_way, WAIT_S) == [hasty]
    await peers.close()


async def test_replies_find_those_who_asked_in_whatever_order_they_come(late_peer: LatePeer, peers: Peers) -> None:
    late_peer.num_wanted = 20
    late_peer.may_answer.set()
    ids = [[HandoffId(f"r{number}", 0, 1), HandoffId(f"r{number}", 1, 1)] for number in range(20)]
    lost = await asyncio.gather(*(peers.renew(late_peer.ref, pair) for pair in ids))
    assert lost == [[second] for _, second in ids]


async def test_a_caller_that_is_cancelled_is_cancelled(peer: Peer, peers: Peers) -> None:
    under_way = asyncio.create_task(release(peers, peer.ref))
    await peer.asked.wait()
    under_way.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(under_way, WAIT_S)


async def test_a_process_that_cannot_be_reached_is_lost(peer: Peer, peers: Peers) -> None:
    await peer.server.stop(None)
    with pytest.raises(WorkerLost):
        await asyncio.wait_for(release(peers, peer.ref), WAIT_S)
