"""Control calls from one worker to another: offer, redeem, renew, release. KV bytes travel over links, not here.

One gRPC channel for each peer process, dropped when the peer's generation changes. Every call has a deadline, and every
failure comes back as one of our errors. Knows nothing of what the calls mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from pdserve.proto import wire
from pdserve.proto import worker_pb2 as pb
from pdserve.proto import worker_pb2_grpc as pb_grpc
from pdserve.proto.status import error_from_call
from pdserve.proto.types import HandoffId, KVTicket, WorkerRef


class Peers:
    """Owner of the channels to other workers."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._channels: dict[WorkerRef, grpc.aio.Channel] = {}

    async def offer(self, target: WorkerRef, ticket: KVTicket) -> None:
        request = pb.OfferRequest(ticket=wire.ticket_to_wire(ticket), target_generation=target.generation)
        await self._call(target, "Offer", request)

    async def redeem(
        self, source: WorkerRef, me: WorkerRef, handoff: HandoffId, link: str, epoch: int, address: str
    ) -> None:
        request = pb.RedeemRequest(
            id=wire.handoff_to_wire(handoff),
            target=wire.ref_to_wire(me),
            source_generation=source.generation,
            link=link,
            link_epoch=epoch,
            link_address=address,
        )
        await self._call(source, "Redeem", request)

    async def renew(self, source: WorkerRef, handoffs: Sequence[HandoffId]) -> list[HandoffId]:
        """Keep the leases; those that are lost already."""
        ids = [wire.handoff_to_wire(handoff) for handoff in handoffs]
        reply = await self._call(source, "Renew", pb.RenewRequest(ids=ids, source_generation=source.generation))
        return [wire.handoff_from_wire(message) for message in reply.lost]

    async def release(self, source: WorkerRef, handoff: HandoffId, outcome: str) -> None:
        request = pb.ReleaseRequest(
            id=wire.handoff_to_wire(handoff), source_generation=source.generation, outcome=outcome
        )
        await self._call(source, "Release", request)

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()

    async def _call(self, peer: WorkerRef, method: str, request: Any) -> Any:
        channel = await self._channel(peer)
        try:
            return await getattr(pb_grpc.KVPeerStub(channel), method)(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, peer.worker_id) from error

    async def _channel(self, peer: WorkerRef) -> grpc.aio.Channel:
        if peer not in self._channels:
            for stale in [ref for ref in self._channels if ref.worker_id == peer.worker_id]:
                await self._channels.pop(stale).close()
            self._channels[peer] = grpc.aio.insecure_channel(peer.address)
        return self._channels[peer]
