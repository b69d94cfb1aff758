"""A worker's step records over its gRPC port: a number in, the records from that one on out, as JSON.

    pdserve.internal.v1.Steps/Since

A method beside the services of `worker.proto`, because it is for measuring and no promise to anybody: both ends are of
one version. Knows nothing of what is recorded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc

from pdserve.cluster.step_records import StepRecord, StepRecorder, from_json, to_json
from pdserve.proto.channels import CHANNEL_OPTIONS
from pdserve.proto.errors import InternalError, Unavailable

SERVICE = "pdserve.internal.v1.Steps"
METHOD = "Since"
TIMEOUT_S = 10.0


def handler(recorder: StepRecorder) -> Any:
    """What a worker's server answers with."""

    async def since(request: bytes, context: Any) -> bytes:
        if not request.isdigit():
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request is no number of a step")
        return to_json(recorder.since(int(request)))

    return grpc.method_handlers_generic_handler(SERVICE, {METHOD: grpc.unary_unary_rpc_method_handler(since)})


class StepReader:
    """New records of several workers, call by call. Must be closed."""

    def __init__(self, addresses: Iterable[str]) -> None:
        self._channels = {address: grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) for address in addresses}
        self._next = dict.fromkeys(self._channels, 0)

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    async def read(self) -> list[tuple[StepRecord, ...]]:
        """What each worker has recorded since the last call, in order of time.

        Raises:
            Unavailable: a worker does not answer.
        """
        return [await self._read_one(address) for address in self._channels]

    async def _read_one(self, address: str) -> tuple[StepRecord, ...]:
        call: Any = self._channels[address].unary_unary(f"/{SERVICE}/{METHOD}")
        try:
            records = from_json(await call(str(self._next[address]).encode(), timeout=TIMEOUT_S))
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"worker at {address}: no step records ({error.code().name})") from error
        except (ValueError, TypeError) as error:
            raise InternalError(f"worker at {address}: step records of another version ({error})") from error
        if records:
            self._next[address] = records[-1].number + 1
        return records
