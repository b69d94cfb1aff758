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
from pdserve.proto.errors import InvalidRequest
from pdserve.proto.status import answer, as_typed

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

    async def Ask(self, requests: AsyncIterator[pb.PeerRequest], context: Context) -> AsyncIterator[pb.PeerReply]:
        """One reply for each request, in order, while the call lives."""
        async for request in requests:
            try:
                reply = self._reply(request)
            except Exception as error:
                failure = as_typed(error)
                reply = pb.PeerReply(error=pb.WireError(kind=type(failure).__name__, message=failure.message))
            reply.number = request.number
            yield reply

    def _reply(self, request: pb.PeerRequest) -> pb.PeerReply:
        requests = self._requests
        match request.WhichOneof("request"):
            case "offer":
                offer = request.offer
                requests.require_generation(offer.target_generation)
                requests.require_decode().offer(wire.ticket_from_wire(offer.ticket), wire.part_from_wire(offer.part))
            case "redeem":
                redeem = request.redeem
                requests.require_generation(redeem.source_generation)
                id, key = wire.handoff_from_wire(redeem.id), SendKey(redeem.link_epoch, redeem.part)
                redemption = Redemption(id, key, redeem.first, redeem.link, redeem.link_address)
                requests.require_prefill().redeem(wire.ref_from_wire(redeem.target), redemption)
            case "renew":
                requests.require_generation(request.renew.source_generation)
                lost = requests.require_prefill().renew([wire.handoff_from_wire(one) for one in request.renew.ids])
                return pb.PeerReply(lost=[wire.handoff_to_wire(handoff) for handoff in lost])
            case "release":
                release = request.release
                requests.require_generation(release.source_generation)
                requests.require_prefill().release(wire.handoff_from_wire(release.id), release.outcome)
            case _:
                raise InvalidRequest("request", "of a kind that is unknown here: run one version on both workers")
        return pb.PeerReply()
