"""One measured run of a workload on a real cluster, with the steps that its workers took.

Knows nothing of simulations.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pdserve.client import AsyncClient
from pdserve.cluster.arrivals import Arrival, PromptMaker
from pdserve.cluster.load import ClientExchange, LoadGenerator, LoadResult
from pdserve.cluster.profiling_run import workers_of
from pdserve.cluster.profiling_samples import Timing, timings_of
from pdserve.cluster.state import ClusterState
from pdserve.cluster.step_feed import StepReader
from pdserve.cluster.step_records import StepRecord
from pdserve.proto.types import Role

MAX_CONCURRENCY = 4096
NUM_WARM_UP = 24
WARM_UP_RATE = 20.0
POLL_S = 5.0


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """What clients saw and what the workers' engines did meanwhile."""

    result: LoadResult
    timings: Mapping[Role, Sequence[Timing]]


async def warm_up(cluster: ClusterState, arrivals: Sequence[Arrival], timeout_s: float) -> None:
    """Connections, first uses and allocations, with the shortest of the requests; nobody looks at the result."""
    shortest = sorted(arrivals, key=lambda one: one.num_prompt_tokens)[:NUM_WARM_UP]
    paced = [replace(one, at_s=number / WARM_UP_RATE, max_tokens=8) for number, one in enumerate(shortest)]
    await measure(cluster, paced, seed=1 << 30, timeout_s=timeout_s)


async def measure(
    cluster: ClusterState,
    arrivals: Sequence[Arrival],
    seed: int,
    timeout_s: float,
    on_done: Callable[[], None] = lambda: None,
) -> MeasuredRun:
    """Send them all and wait for every answer.

    Raises:
        Unavailable: a part of the cluster does not answer.
    """
    infos = workers_of(cluster)
    reader = StepReader(info.worker.address for info in infos)
    try:
        await reader.read()
        async with AsyncClient(cluster.endpoint, timeout_s=timeout_s) as client:
            model = await client.model_info()
            generator = LoadGenerator(
                ClientExchange(client, timeout_s),
                PromptMaker(model.vocab_size, model.eos_token_ids, seed),
                max_model_len=model.max_model_len,
                max_concurrency=MAX_CONCURRENCY,
                on_done=lambda record: on_done(),
            )
            log = StepLog(reader, [info.role for info in infos])
            follower = asyncio.create_task(log.follow())
            try:
                result = await generator.run(arrivals)
            finally:
                follower.cancel()
                await asyncio.gather(follower, return_exceptions=True)
            await log.read()
        return MeasuredRun(result, log.timings)
    finally:
        await reader.close()


class StepLog:
    """Everything that the workers recorded, fetched before they forget it."""

    def __init__(self, reader: StepReader, roles: Sequence[Role]) -> None:
        self._reader = reader
        self._roles = roles
        self._records: list[list[StepRecord]] = [[] for _ in roles]

    async def follow(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await self.read()

    async def read(self) -> None:
        for kept, new in zip(self._records, await self._reader.read(), strict=True):
            kept.extend(new)

    @property
    def timings(self) -> dict[Role, list[Timing]]:
        found: dict[Role, list[Timing]] = {role: [] for role in self._roles}
        for role, timings in zip(self._roles, timings_of(self._records), strict=True):
            found[role].extend(timings)
        return found
