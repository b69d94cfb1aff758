"""Control messages from one worker to another: offer, redeem, renew, release. KV bytes travel over links, not here.

One gRPC channel for each peer process, kept until somebody says that the process is gone: a late word to a former
generation disturbs nothing that goes to the present one. On it one stream, opened again when it broke. Every request
has a deadline, and every failure comes back as one of our errors. Knows nothing of what the requests mean.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from pdserve.kv_transfer.lease import SendKey
from pdserve.proto import wire
from pdserve.proto import worker_pb2 as pb
from pdserve.proto import worker_pb2_grpc as pb_grpc
from pdserve.proto.channels import OpenChannel, open_channel
from pdserve.proto.errors import WorkerLost, rebuild
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
        self._streams: dict[WorkerRef, _Stream] = {}
        self._gone: set[tuple[str, int]] = set()

    async def offer(self, target: WorkerRef, ticket: KVTicket, part: KVPart) -> None:
        offer = pb.OfferRequest(
            ticket=wire.ticket_to_wire(ticket), part=wire.part_to_wire(part), target_generation=target.generation
        )
        await self._ask(target, pb.PeerRequest(offer=offer))

    async def redeem(self, source: WorkerRef, me: WorkerRef, redemption: Redemption) -> None:
        redeem = pb.RedeemRequest(
            id=wire.handoff_to_wire(redemption.id),
            target=wire.ref_to_wire(me),
            source_generation=source.generation,
            part=redemption.key.part,
            first=redemption.first,
            link=redemption.link,
            link_epoch=redemption.key.link_epoch,
            link_address=redemption.link_address,
        )
        await self._ask(source, pb.PeerRequest(redeem=redeem))

    async def renew(self, source: WorkerRef, handoffs: Sequence[HandoffId]) -> list[HandoffId]:
        """Keep the leases; those that are lost already."""
        ids = [wire.handoff_to_wire(handoff) for handoff in handoffs]
        renew = pb.RenewRequest(ids=ids, source_generation=source.generation)
        reply = await self._ask(source, pb.PeerRequest(renew=renew))
        return [wire.handoff_from_wire(message) for message in reply.lost]

    async def release(self, source: WorkerRef, handoff: HandoffId, outcome: str) -> None:
        release = pb.ReleaseRequest(
            id=wire.handoff_to_wire(handoff), source_generation=source.generation, outcome=outcome
        )
        await self._ask(source, pb.PeerRequest(release=release))

    def is_gone(self, peer: WorkerRef) -> bool:
        """Whether somebody has said so: asking it again is of no use."""
        return (peer.worker_id, peer.generation) in self._gone

    async def drop(self, worker_id: str, generation: int) -> None:
        """The process is gone: requests to it that are under way, and any later ones, end with WorkerLost."""
        self._gone.add((worker_id, generation))
        for ref in [ref for ref in self._channels if (ref.worker_id, ref.generation) == (worker_id, generation)]:
            await self._close(ref)

    async def close(self) -> None:
        for ref in list(self._channels):
            await self._close(ref)

    async def _close(self, peer: WorkerRef) -> None:
        stream = self._streams.pop(peer, None)
        if stream is not None:
            stream.end(f"{peer.worker_id} is gone")
        channel = self._channels.pop(peer, None)
        if channel is not None:
            await channel.close()

    async def _ask(self, peer: WorkerRef, request: pb.PeerRequest) -> pb.PeerReply:
        reply = await self._stream(peer).ask(request, self._timeout_s)
        if reply.HasField("error"):
            raise rebuild(reply.error.kind, reply.error.message)
        return reply

    def _stream(self, peer: WorkerRef) -> _Stream:
        """The one that is open, or a new one."""
        if self.is_gone(peer):
            raise WorkerLost(f"{peer.worker_id} is gone")
        if peer not in self._channels:
            self._channels[peer] = self._open_channel(peer.address)
        if peer not in self._streams or not self._streams[peer].is_open:
            self._streams[peer] = _Stream(peer.worker_id, self._channels[peer])
        return self._streams[peer]


class _Stream:
    """One stream of requests, and who waits for which reply. Broken once, it stays so."""

    def __init__(self, who: str, channel: grpc.aio.Channel) -> None:
        self.is_open = True
        self._who = who
        self._call = pb_grpc.KVPeerStub(channel).Ask()
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[pb.PeerReply]] = {}
        self._turn_to_write = asyncio.Lock()
        self._reader = asyncio.create_task(self._read())

    async def ask(self, request: pb.PeerRequest, timeout_s: float) -> pb.PeerReply:
        """The reply. Raises `WorkerLost` if there is none."""
        number = request.number = next(self._numbers)
        reply: asyncio.Future[pb.PeerReply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = reply
        try:
            async with asyncio.timeout(timeout_s):
                await self._write(request)
                return await reply
        except TimeoutError as error:
            raise WorkerLost(f"{self._who} did not answer in time") from error
        finally:
            self._waiting.pop(number, None)
            reply.cancel()

    def end(self, why: str) -> None:
        """Nobody is answered any more."""
        if not self.is_open:
            return
        self.is_open = False
        for reply in self._waiting.values():
            if not reply.done():
                reply.set_exception(WorkerLost(why))
        self._call.cancel()

    async def _write(self, request: pb.PeerRequest) -> None:
        """A stream that breaks meanwhile fails the reply, not the writing. Cancelling a write breaks the stream."""
        async with self._turn_to_write:
            try:
                await self._call.write(request)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise

    async def _read(self) -> None:
        why = f"{self._who} ended the conversation"
        try:
            async for reply in self._call:
                if reply is None:  # what gRPC makes of one that is no message of ours
                    why = f"{self._who} says what nobody understands: run one version on both"
                    break
                waiting = self._waiting.get(reply.number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(reply)
        except grpc.aio.AioRpcError as error:
            why = f"{self._who} did not answer ({error.code().name})"
        finally:
            self.end(why)
