"""A worker's view of the fleet: says which peers are gone, so that nobody waits for them or keeps their memory.

Follows the controller's stream and reconnects for ever; while the controller is away nobody is declared gone. Knows
nothing of what a peer was used for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc

from pdserve.proto import worker_pb2 as pb
from pdserve.proto import worker_pb2_grpc as pb_grpc
from pdserve.proto.channels import OpenChannel, open_channel

logger = logging.getLogger(__name__)
RECONNECT_S = 1.0


async def watch_peers(
    controller: str, on_gone: Callable[[str, int], None], open_channel: OpenChannel = open_channel
) -> None:
    """Call `on_gone(worker_id, generation)` once for each peer process that the controller saw die."""
    gone: set[tuple[str, int]] = set()
    async with open_channel(controller) as channel:
        while True:
            try:
                async for fleet in pb_grpc.ControllerStub(channel).Watch(pb.WatchRequest()):
                    for dead in sorted(_dead(fleet) - gone):
                        gone.add(dead)
                        on_gone(*dead)
            except grpc.aio.AioRpcError as error:
                logger.info("controller: %s; keeping the last known fleet", error.code().name)
            await asyncio.sleep(RECONNECT_S)


def _dead(fleet: pb.Fleet) -> set[tuple[str, int]]:
    refs = (member.info.worker for member in fleet.members if member.state == "dead")
    return {(ref.worker_id, ref.generation) for ref in refs if ref.generation}
