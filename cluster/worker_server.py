"""The gRPC surface of a worker: `Worker` for routers, `KVPeer` for other workers.

Decodes, checks who is addressed, calls, encodes. Errors leave through `proto.status`. Decides nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from pdserve.cluster.worker_requests import WorkerRequests
from pdserve.kv_transfer.lease import SendKey
from pdserve.kv_transfer.peers import Redemption
from pdserve.proto import wire
from pdserve.proto import worker_pb2 as pb
from pdserve.proto import worker_pb2_grpc as pb_grpc
from pdserve.proto.channels import SERVER_OPTIONS
from pdserve.proto.status import answer

ACK = pb.Ack()
Context = grpc.aio.ServicerContext[Any, Any]


class WorkerServer:
    """One server for both services of one worker. Answers nothing before `start`."""

    def __init__(self) -> None:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)

    def bind(self, host: str) -> int:
        """A free port of `host`, ours from now on."""
        return self._server.add_insecure_port(f"{host}:0")

    async def start(self, requests: WorkerRequests) -> None:
        services = WorkerServices(requests)
        pb_grpc.add_WorkerServicer_to_server(services, self._server)
        pb_grpc.add_KVPeerServicer_to_server(services, self._server)
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0)


class WorkerServices(pb_grpc.WorkerServicer, pb_grpc.KVPeerServicer):
    """What the server does for each call. Knows no server."""

    def __init__(self, requests: WorkerRequests) -> None:
        self._requests = requests

    # pdserve.internal.v1.Worker

    async def Load(self, request: pb.LoadRequest, context: Context) -> pb.WorkerLoad:
        return wire.load_to_wire(self._requests.load_now())

    async def Outputs(self, request: pb.OutputsRequest, context: Context) -> AsyncIterator[pb.StepOutput]:
        """One message per engine step while the call lives; its end aborts the router's sequences."""
        stream = self._requests.open_stream(request.epoch)
        try:
            while (output := await stream.next()) is not None:
                yield wire.output_to_wire(output)
        finally:
            self._requests.close_stream(request.epoch, stream)

    async def Prefill(self, request: pb.PrefillRequest, context: Context) -> pb.Ack:
        async def handle(message: pb.PrefillRequest) -> pb.Ack:
            target = wire.ref_from_wire(message.hand_off_to) if message.HasField("hand_off_to") else None
            self._requests.prefill(wire.request_from_wire(message.request), target)
            return ACK

        return await answer(context, handle, request)

    async def Expect(self, request: pb.ExpectRequest, context: Context) -> pb.Ack:
        async def handle(message: pb.ExpectRequest) -> pb.Ack:
            self._requests.expect(wire.request_from_wire(message.request), wire.ref_from_wire(message.source))
            return ACK

        return await answer(context, handle, request)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.Ack:
        self._requests.abort(wire.handoff_from_wire(request.id), request.reason)
        return ACK

    # pdserve.internal.v1.KVPeer

    async def Offer(self, request: pb.OfferRequest, context: Context) -> pb.Ack:
        async def handle(message: pb.OfferRequest) -> pb.Ack:
            self._requests.require_generation(message.target_generation)
            self._requests.require_decode().offer(
                wire.ticket_from_wire(message.ticket), wire.part_from_wire(message.part)
            )
            return ACK

        return await answer(context, handle, request)

    async def Redeem(self, request: pb.RedeemRequest, context: Context) -> pb.Ack:
        async def handle(message: pb.RedeemRequest) -> pb.Ack:
            self._requests.require_generation(message.source_generation)
            key = SendKey(message.link_epoch, message.part)
            redemption = Redemption(
                wire.handoff_from_wire(message.id), key, message.first, message.link, message.link_address
            )
            self._requests.require_prefill().redeem(wire.ref_from_wire(message.target), redemption)
            return ACK

        return await answer(context, handle, request)

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        async def handle(message: pb.RenewRequest) -> pb.RenewResponse:
            self._requests.require_generation(message.source_generation)
            lost = self._requests.require_prefill().renew([wire.handoff_from_wire(one) for one in message.ids])
            return pb.RenewResponse(lost=[wire.handoff_to_wire(handoff) for handoff in lost])

        return await answer(context, handle, request)

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.Ack:
        async def handle(message: pb.ReleaseRequest) -> pb.Ack:
            self._requests.require_generation(message.source_generation)
            self._requests.require_prefill().release(wire.handoff_from_wire(message.id), message.outcome)
            return ACK

        return await answer(context, handle, request)
