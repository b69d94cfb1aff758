"""Control calls from one worker to another: offer, redeem, renew, release. KV bytes travel over links, not here.

One gRPC channel for each peer process, kept until somebody says that the process is gone: a late word to a former
generation disturbs nothing that goes to the present one. Every call has a deadline, and every failure comes back as one
of our errors. Knows nothing of what the calls mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from pdserve.kv_transfer.lease import SendKey
from pdserve.proto import wire
from pdserve.proto import worker_pb2 as pb
from pdserve.proto import worker_pb2_grpc as pb_grpc
from pdserve.proto.channels import OpenChannel, open_channel
from pdserve.proto.errors import WorkerLost
from pdserve.proto.status import error_from_call
from pdserve.proto.types import HandoffId, KVPart, KVTicket, WorkerRef


@dataclass(frozen=True, slots=True)
class Redemption:
    """Which part, from its block `first` on, and over which link: where the redeeming side waits, if it has to."""

    id: HandoffId
    key: SendKey
    first: int
    link: str
    link_address: str


class Peers:
    """Owner of the channels to other workers."""

    def __init__(self, timeout_s: float, open_channel: OpenChannel = open_channel) -> None:
        self._timeout_s = timeout_s
        self._open_channel = open_channel
        self._channels: dict[WorkerRef, grpc.aio.Channel] = {}
        self._gone: set[tuple[str, int]] = set()

    async def offer(self, target: WorkerRef, ticket: KVTicket, part: KVPart) -> None:
        request = pb.OfferRequest(
            ticket=wire.ticket_to_wire(ticket), part=wire.part_to_wire(part), target_generation=target.generation
        )
        await self._call(target, "Offer", request)

    async def redeem(self, source: WorkerRef, me: WorkerRef, redemption: Redemption) -> None:
        request = pb.RedeemRequest(
            id=wire.handoff_to_wire(redemption.id),
            target=wire.ref_to_wire(me),
            source_generation=source.generation,
            part=redemption.key.part,
            first=redemption.first,
            link=redemption.link,
            link_epoch=redemption.key.link_epoch,
            link_address=redemption.link_address,
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

    async def drop(self, worker_id: str, generation: int) -> None:
        """The process is gone: calls to it that are under way, and any later ones, end with WorkerLost."""
        self._gone.add((worker_id, generation))
        for ref in [ref for ref in self._channels if (ref.worker_id, ref.generation) == (worker_id, generation)]:
            await self._channels.pop(ref).close()

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()

    async def _call(self, peer: WorkerRef, method: str, request: Any) -> Any:
        stub = pb_grpc.KVPeerStub(self._channel(peer))
        try:
            return await getattr(stub, method)(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, peer.worker_id) from error
        except (grpc.aio.UsageError, asyncio.CancelledError) as error:
            # What closing the channel does to its calls. A cancellation of the calling task goes on.
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            raise WorkerLost(f"{peer.worker_id} is gone") from error

    def _channel(self, peer: WorkerRef) -> grpc.aio.Channel:
        if (peer.worker_id, peer.generation) in self._gone:
            raise WorkerLost(f"{peer.worker_id} is gone")
        if peer not in self._channels:
            self._channels[peer] = self._open_channel(peer.address)
        return self._channels[peer]
