"""Measures running clusters: drives load, and reads what the workers recorded of it.

    step_timings     what every step took under bursts of load, until the budget is over
    lone_requests    from a client's call to the first step, and from a step's end to the client
    handoffs         from the end of a prompt's last step to the first step at the other worker

All processes are on this machine, so that their clocks are one. Knows neither how clusters are started nor what a
profile is made of.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np

from pdserve.client import AsyncClient
from pdserve.cluster.profiling_links import Handoff
from pdserve.cluster.profiling_load import Driver, Seen
from pdserve.cluster.profiling_plan import Burst, growing_rounds
from pdserve.cluster.profiling_samples import Timing, timings_of
from pdserve.cluster.state import ClusterState
from pdserve.cluster.status_command import take
from pdserve.cluster.step_feed import StepReader
from pdserve.cluster.step_records import StepRecord
from pdserve.proto import wire
from pdserve.proto.errors import InvalidRequest, Unavailable
from pdserve.proto.types import Role, WorkerInfo

NUM_WARM_UP = 3
NUM_LONE = 24
LONE_TOKENS = 16
NUM_HANDOFFS = 12
TEXT_TOKENS = (64, 1024)
NUM_TEXTS = 8
WATCH_S = 1.0


@dataclass(frozen=True, slots=True)
class LoneCost:
    """Lower quartiles over requests that had the cluster to themselves: what disturbs one only adds to it.

    From the client's call to the first step, and from a step's end to the client.
    """

    request_s: float
    token_s: float


@dataclass(frozen=True, slots=True)
class BurstLog:
    """What the workers recorded under bursts of load, in how many whole rounds of them.

    `around_s` has, for each prompt sent beside streams, what its first token took beyond queue and prefill: client,
    router and the worker's event loop share cores and interpreter with engines at work.
    """

    timings: tuple[Timing, ...]
    num_rounds: int
    around_s: tuple[float, ...]

    def token_s(self, lone: LoneCost) -> float:
        """From a step's end to the client while workers are at work: never less than for a lone request.

        The lower quartile: half of the bursts have more streams than most traffic.
        """
        if not self.around_s:
            return lone.token_s
        return max(lone.token_s, _undisturbed_s(self.around_s) - lone.request_s)


class Session:
    """A cluster being measured: its workers' records, and a driver of load."""

    def __init__(self, infos: Sequence[WorkerInfo], reader: StepReader, client: AsyncClient, driver: Driver) -> None:
        self.infos = tuple(infos)
        self.client = client
        self._reader = reader
        self._driver = driver

    async def step_timings(
        self, bursts: Sequence[Burst], budget_s: float, on_burst: Callable[[float], None] = lambda share: None
    ) -> BurstLog:
        """Growing rounds of bursts until the budget is over; `on_burst` hears how much of it is."""
        records: list[list[StepRecord]] = [[] for _ in self.infos]
        around_s: list[float] = []
        started_s, num_rounds = time.monotonic(), 0
        await self._reader.read()  # what came before is not of these bursts
        try:
            async with asyncio.timeout(budget_s):
                for some in growing_rounds(bursts):
                    for burst in some:
                        prompts = await self._driver.burst(burst)
                        around_s += [known for seen in prompts if (known := seen.around_s()) is not None]
                        await self._collect(records)
                        on_burst((time.monotonic() - started_s) / budget_s)
                    num_rounds += len(some) == len(bursts)
        except TimeoutError:
            await self._collect(records)
        timings = tuple(timing for of_worker in timings_of(records) for timing in of_worker)
        return BurstLog(timings, num_rounds, tuple(around_s))

    async def _collect(self, records: list[list[StepRecord]]) -> None:
        for kept, new in zip(records, await self._reader.read(), strict=True):
            kept.extend(new)

    async def lone_requests(self, budget_s: float) -> LoneCost:
        """Raises Unavailable when there was no time for any."""
        before_s: list[float] = []
        after_s: list[float] = []
        deadline_s = time.monotonic() + budget_s
        for number in range(NUM_WARM_UP + NUM_LONE):
            seen, steps = await self._lone(LONE_TOKENS)
            if number >= NUM_WARM_UP and steps:
                before_s.append(steps[0].started_s - seen.sent_s)
                after_s.append(seen.token_times_s[0] - steps[0].ended_s)
            if time.monotonic() > deadline_s and after_s:
                break
        if not after_s:
            raise Unavailable("no step was recorded for any lone request; does something else use this cluster?")
        return LoneCost(_undisturbed_s(before_s), _undisturbed_s(after_s))

    async def handoffs(self, sizes: Sequence[int], budget_s: float) -> list[Handoff]:
        """Prompts of these lengths, each computed in one step, in turns."""
        found = []
        deadline_s = time.monotonic() + budget_s
        for number in range(NUM_WARM_UP + NUM_HANDOFFS):
            for num_tokens in sizes:
                handoff = await self._handoff(num_tokens)
                if number >= NUM_WARM_UP and handoff is not None:
                    found.append(handoff)
            if number > NUM_WARM_UP and time.monotonic() > deadline_s:
                break
        return found

    async def tokenize_s_per_token(self) -> float:
        """Beyond what a call costs; 0 for a model without a tokenizer."""
        try:
            took = [await self._tokenize(num_tokens) for num_tokens in TEXT_TOKENS]
        except InvalidRequest:
            return 0.0
        (short, short_s), (long, long_s) = took
        return max(0.0, (long_s - short_s) / max(1, long - short))

    async def _tokenize(self, num_tokens: int) -> tuple[int, float]:
        text = await self.client.detokenize(self._driver.prompt(num_tokens))
        times_s = []
        for _ in range(NUM_TEXTS):
            started_s = time.perf_counter()
            num_found = len(await self.client.tokenize(text))
            times_s.append(time.perf_counter() - started_s)
        return num_found, _undisturbed_s(times_s)

    async def _handoff(self, num_tokens: int) -> Handoff | None:
        """`None` where the steps cannot be told apart."""
        await self._reader.read()
        seen = await self._driver.ask(num_tokens, 3)
        by_role: dict[Role, tuple[StepRecord, ...]] = {}
        for info, steps in zip(self.infos, await self._reader.read(), strict=True):
            by_role[info.role] = tuple(step for step in steps if step.started_s >= seen.sent_s)
        prefills, decodes = by_role[Role.PREFILL], by_role[Role.DECODE]
        if len(prefills) != 1 or not decodes or seen.timings is None:
            return None
        layout = self.infos[0].layout
        num_bytes = layout.num_blocks(num_tokens) * layout.block_bytes
        return Handoff(num_bytes, decodes[0].started_s - prefills[0].ended_s, seen.timings.transfer_ms / 1e3)

    async def _lone(self, num_prompt_tokens: int) -> tuple[Seen, list[StepRecord]]:
        await self._reader.read()
        seen = await self._driver.ask(num_prompt_tokens, 1)
        steps = [step for one in await self._reader.read() for step in one if step.started_s >= seen.sent_s]
        return seen, sorted(steps, key=lambda step: step.started_s)


def _undisturbed_s(times_s: Sequence[float]) -> float:
    return max(0.0, float(np.percentile(times_s, 25)))


async def watch_steps(cluster: ClusterState, budget_s: float) -> tuple[tuple[WorkerInfo, ...], list[Timing]]:
    """What a running cluster's workers do meanwhile.

    Raises:
        Unavailable: a worker does not answer, or none had anything to do.
    """
    infos = workers_of(cluster)
    reader = StepReader(info.worker.address for info in infos)
    records: list[list[StepRecord]] = [[] for _ in infos]
    deadline_s = time.monotonic() + budget_s
    try:
        await reader.read()  # what came before is of another load, or of another time of this machine
        while True:
            for kept, new in zip(records, await reader.read(), strict=True):
                kept.extend(new)
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                break
            await asyncio.sleep(min(WATCH_S, left_s))
    finally:
        await reader.close()
    if not any(records):
        raise Unavailable(f"{cluster.name}: it served nothing meanwhile; send it load, of every kind that it will have")
    hosts = [info.host_id for info in infos]
    return infos, [timing for of_worker in timings_of(records, hosts) for timing in of_worker]


def workers_of(cluster: ClusterState) -> tuple[WorkerInfo, ...]:
    """Those that answer, of which there is at least one."""
    infos = [wire.info_from_wire(worker.member.info) for worker in take(cluster).workers if worker.HasField("load")]
    if not infos:
        raise Unavailable(f"{cluster.name}: no worker answers; see `pdserve status --name {cluster.name}`")
    return tuple(infos)


@asynccontextmanager
async def session(cluster: ClusterState, seed: int) -> AsyncIterator[Session]:
    """Connected to the router and to every worker.

    Raises:
        Unavailable: a part of the cluster does not answer.
    """
    infos = workers_of(cluster)
    reader = StepReader(info.worker.address for info in infos)
    try:
        async with AsyncClient(cluster.endpoint) as client:
            model = await client.model_info()
            num_decoding = sum(info.role is not Role.PREFILL for info in infos)
            driver = Driver(client, model.vocab_size, model.max_model_len, num_decoding, seed)
            yield Session(infos, reader, client, driver)
    finally:
        await reader.close()
