"""The gRPC surface of a worker: `Worker` for routers, `KVPeer` for other workers, step records for who profiles.

Decodes, checks who is addressed, calls, encodes. Errors leave through `proto.status`. Decides nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import grpc

from pdserve.cluster import step_feed
from pdserve.cluster.step_records import StepRecorder
from pdserve.cluster.worker_requests import WorkerRequests
from pdserve.kv_transfer.lease import SendKey
from pdserve.kv_transfer.peers import Redemption
from pdserve.proto import wire
from pdserve.proto import worker_pb2 as pb
from pdserve.proto import worker_pb2_grpc as pb_grpc
from pdserve.proto.channels import SERVER_OPTIONS
from pdserve.proto.errors import InvalidRequest, PdserveError
from pdserve.proto.status import answer, as_typed
from pdserve.proto.types import HandoffId, KVPart, KVTicket, WorkerRef

ACK = pb.Ack()
Context = grpc.aio.ServicerContext[Any, Any]


class WorkerServer:
    """One server for both services of one worker. Answers nothing before `start`."""

    def __init__(self) -> None:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)

    def bind(self, host: str) -> int:
        """A free port of `host`, ours from now on."""
        return self._server.add_insecure_port(f"{host}:0")

    async def start(self, requests: WorkerRequests, on_bug: Callable[[Exception], None], steps: StepRecorder) -> None:
        """`on_bug` is told what no request may do."""
        services = WorkerServices(requests, on_bug)
        pb_grpc.add_WorkerServicer_to_server(services, self._server)
        pb_grpc.add_KVPeerServicer_to_server(services, self._server)
        self._server.add_generic_rpc_handlers((step_feed.handler(steps),))
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0)


class WorkerServices(pb_grpc.WorkerServicer, pb_grpc.KVPeerServicer):
    """What the server does for each call. Knows no server."""

    def __init__(self, requests: WorkerRequests, on_bug: Callable[[Exception], None]) -> None:
        self._requests = requests
        self._on_bug = on_bug

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
            reply, bug = self._answer(request)
            reply.number = request.number
            yield reply
            if bug is not None:
                self._on_bug(bug)

    def _answer(self, request: pb.PeerRequest) -> tuple[pb.PeerReply, Exception | None]:
        """The reply, and the bug that showed: what a message that makes sense does to our books must not fail."""
        bug = None
        try:
            call = self._call(request)
        except Exception as error:
            failure: PdserveError = InvalidRequest("request", f"makes no sense ({error}): run one version on both")
        else:
            try:
                return call(), None
            except PdserveError as error:
                failure = error
            except Exception as error:
                failure, bug = as_typed(error), error
        return pb.PeerReply(error=pb.WireError(kind=type(failure).__name__, message=failure.message)), bug

    def _call(self, request: pb.PeerRequest) -> Callable[[], pb.PeerReply]:
        """What the request asks for, decoded and not done yet."""
        match request.WhichOneof("request"):
            case "offer":
                offer = request.offer
                ticket, part = wire.ticket_from_wire(offer.ticket), wire.part_from_wire(offer.part)
                return partial(self._offer, offer.target_generation, ticket, part)
            case "redeem":
                redeem = request.redeem
                id, key = wire.handoff_from_wire(redeem.id), SendKey(redeem.link_epoch, redeem.part)
                redemption = Redemption(id, key, redeem.first, redeem.link, redeem.link_address)
                return partial(self._redeem, redeem.source_generation, wire.ref_from_wire(redeem.target), redemption)
            case "renew":
                ids = [wire.handoff_from_wire(one) for one in request.renew.ids]
                return partial(self._renew, request.renew.source_generation, ids)
            case "release":
                release = request.release
                id = wire.handoff_from_wire(release.id)
                return partial(self._release, release.source_generation, id, release.outcome)
            case _:
                raise ValueError("of a kind that is unknown here")

    def _offer(self, generation: int, ticket: KVTicket, part: KVPart) -> pb.PeerReply:
        self._requests.require_generation(generation)
        self._requests.require_decode().offer(ticket, part)
        return pb.PeerReply()

    def _redeem(self, generation: int, target: WorkerRef, redemption: Redemption) -> pb.PeerReply:
        self._requests.require_generation(generation)
        self._requests.require_prefill().redeem(target, redemption)
        return pb.PeerReply()

    def _renew(self, generation: int, ids: list[HandoffId]) -> pb.PeerReply:
        self._requests.require_generation(generation)
        lost = self._requests.require_prefill().renew(ids)
        return pb.PeerReply(lost=[wire.handoff_to_wire(handoff) for handoff in lost])

    def _release(self, generation: int, id: HandoffId, outcome: str) -> pb.PeerReply:
        self._requests.require_generation(generation)
        self._requests.require_prefill().release(id, outcome)
        return pb.PeerReply()
