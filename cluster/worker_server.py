"""The gRPC surface of a worker: `Worker` for routers, `KVPeer` for other workers.

Decodes, checks who is addressed, calls, encodes. Errors leave through `proto.status`. Decides nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc

from pdserve.decode_worker.role import DecodeRole
from pdserve.prefill_worker.role import PrefillRole
from pdserve.proto import wire
from pdserve.proto import worker_pb2 as pb
from pdserve.proto import worker_pb2_grpc as pb_grpc
from pdserve.proto.channels import SERVER_OPTIONS
from pdserve.proto.errors import StaleReference, WrongRole
from pdserve.proto.status import answer
from pdserve.proto.types import HandoffId

if TYPE_CHECKING:
    from pdserve.cluster.worker import Worker

ACK = pb.Ack()
Context = grpc.aio.ServicerContext[Any, Any]


class WorkerServer(pb_grpc.WorkerServicer, pb_grpc.KVPeerServicer):
    """One server for both services of one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        pb_grpc.add_WorkerServicer_to_server(self, self._server)
        pb_grpc.add_KVPeerServicer_to_server(self, self._server)

    async def start(self, host: str) -> int:
        """Serve on a free port of `host`; the port."""
        port = self._server.add_insecure_port(f"{host}:0")
        await self._server.start()
        return port

    async def stop(self) -> None:
        await self._server.stop(0)

    # pdserve.internal.v1.Worker

    async def Load(self, request: pb.LoadRequest, context: Context) -> pb.WorkerLoad:
        return wire.load_to_wire(self._worker.load_now())

    async def Outputs(self, request: pb.OutputsRequest, context: Context) -> AsyncIterator[pb.StepOutput]:
        """One message per engine step while the call lives; its end aborts the router's sequences."""
        stream = self._worker.open_stream(request.epoch)
        try:
            while (output := await stream.next()) is not None:
                yield wire.output_to_wire(output)
        finally:
            self._worker.close_stream(request.epoch, stream)

    async def Prefill(self, request: pb.PrefillRequest, context: Context) -> pb.Ack:
        async def handle(message: pb.PrefillRequest) -> pb.Ack:
            target = wire.ref_from_wire(message.hand_off_to) if message.HasField("hand_off_to") else None
            await self._worker.prefill(wire.request_from_wire(message.request), target)
            return ACK

        return await answer(context, handle, request)

    async def Expect(self, request: pb.ExpectRequest, context: Context) -> pb.Ack:
        async def handle(message: pb.ExpectRequest) -> pb.Ack:
            await self._worker.expect(wire.request_from_wire(message.request), wire.ref_from_wire(message.source))
            return ACK

        return await answer(context, handle, request)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.Ack:
        self._worker.abort(wire.handoff_from_wire(request.id), request.reason)
        return ACK

    # pdserve.internal.v1.KVPeer

    async def Offer(self, request: pb.OfferRequest, context: Context) -> pb.Ack:
        async def handle(message: pb.OfferRequest) -> pb.Ack:
            self._addressed(message.target_generation)
            self._decode_role().offer(wire.ticket_from_wire(message.ticket))
            return ACK

        return await answer(context, handle, request)

    async def Redeem(self, request: pb.RedeemRequest, context: Context) -> pb.Ack:
        async def handle(message: pb.RedeemRequest) -> pb.Ack:
            self._addressed(message.source_generation)
            handoff, target = _handoff(message), wire.ref_from_wire(message.target)
            role = self._prefill_role()
            role.redeem(handoff, target, message.link, message.link_epoch, message.link_address)
            return ACK

        return await answer(context, handle, request)

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        async def handle(message: pb.RenewRequest) -> pb.RenewResponse:
            self._addressed(message.source_generation)
            lost = self._prefill_role().renew([wire.handoff_from_wire(one) for one in message.ids])
            return pb.RenewResponse(lost=[wire.handoff_to_wire(handoff) for handoff in lost])

        return await answer(context, handle, request)

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.Ack:
        async def handle(message: pb.ReleaseRequest) -> pb.Ack:
            self._addressed(message.source_generation)
            self._prefill_role().release(_handoff(message), message.outcome)
            return ACK

        return await answer(context, handle, request)

    def _addressed(self, generation: int) -> None:
        """A message for an earlier life of this worker must not touch this one."""
        if generation != self._worker.info.worker.generation:
            raise StaleReference("addressed to another generation of this worker")

    def _prefill_role(self) -> PrefillRole:
        if self._worker.prefill_role is None:
            raise WrongRole(f"{self._worker.info.worker.worker_id} has no prefill role")
        return self._worker.prefill_role

    def _decode_role(self) -> DecodeRole:
        if self._worker.decode_role is None:
            raise WrongRole(f"{self._worker.info.worker.worker_id} has no decode role")
        return self._worker.decode_role


def _handoff(message: pb.RedeemRequest | pb.ReleaseRequest) -> HandoffId:
    return wire.handoff_from_wire(message.id)
