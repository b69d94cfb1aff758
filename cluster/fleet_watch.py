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
    """Call `on_gone(worker_id, generation)` once for each peer process that died, seen or unseen."""
    peers = Peerage()
    async with open_channel(controller) as channel:
        while True:
            try:
                async for fleet in pb_grpc.ControllerStub(channel).Watch(pb.WatchRequest()):
                    for dead in peers.gone(fleet):
                        on_gone(*dead)
            except grpc.aio.AioRpcError as error:
                logger.info("controller: %s; keeping the last known fleet", error.code().name)
            await asyncio.sleep(RECONNECT_S)


class Peerage:
    """The last process of each peer that was heard of: its generation, and whether it is dead."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, bool]] = {}

    def gone(self, fleet: pb.Fleet) -> list[tuple[str, int]]:
        """(worker id, generation) of those that are found dead for the first time.

        A death may pass unseen while the controller is not heard: then another process has taken the worker's place.
        """
        found = []
        for member in sorted(fleet.members, key=lambda member: member.info.worker.worker_id):
            worker_id, generation = member.info.worker.worker_id, member.info.worker.generation
            if not generation:
                continue  # it is starting, and nobody knows it yet
            is_dead = member.state == "dead"
            last, was_dead = self._last.get(worker_id, (generation, False))
            if last != generation and not was_dead:
                found.append((worker_id, last))
            if is_dead and (last, was_dead) != (generation, True):
                found.append((worker_id, generation))
            self._last[worker_id] = (generation, is_dead)
        return found
