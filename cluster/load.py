"""Open-loop load: send requests when they are due, whatever became of the earlier ones, and time every token.

Latency counts from the *scheduled* time of each request, so that neither a slow sender nor a stalled server can hide
behind requests that were never sent (coordinated omission). A cap on concurrency is a safety net: when it is hit,
later requests are sent late, their latency says so, and the report counts them.

Knows the client and a clock; plans come from `arrivals` and `trace`, sums are drawn in `load_report`.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from pdserve.client import AsyncClient, Timings
from pdserve.cluster.arrivals import Arrival, PromptMaker, fit
from pdserve.proto.errors import PdserveError
from pdserve.proto.types import RequestTiming

# A request that starts this late was held up by the cap or by the sender, not by timer resolution.
LATE_S = 0.05


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What became of one request. `token_times_s` has one entry per token; `error_code` is a gRPC code name."""

    timing: RequestTiming
    num_prompt_tokens: int
    token_times_s: array[float] = field(default_factory=lambda: array("d"))
    phases: Timings | None = None
    error_code: str | None = None
    error_message: str = ""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """All records in order of schedule. Times are of one monotonic clock; `start_s` is time 0 of the plan."""

    records: tuple[RequestRecord, ...]
    start_s: float
    end_s: float
    num_capped: int
    num_clipped: int


class Clock(Protocol):
    """Time as the sender sees it; tests pass one that they move by hand."""

    def now_s(self) -> float: ...

    async def sleep_until(self, at_s: float) -> None: ...


class LoopClock:
    """The running event loop's clock."""

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep_until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - self.now_s()))


class Exchange(Protocol):
    """Sends one request, calls `on_tokens(count)` as tokens come, and returns the phases; raises `PdserveError`."""

    async def __call__(
        self, prompt: list[int], max_tokens: int, on_tokens: Callable[[int], None]
    ) -> Timings | None: ...


class ClientExchange:
    """The exchange through a real client."""

    def __init__(self, client: AsyncClient, timeout_s: float) -> None:
        self.client = client
        self.timeout_s = timeout_s

    async def __call__(self, prompt: list[int], max_tokens: int, on_tokens: Callable[[int], None]) -> Timings | None:
        options = {"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0.0, "timeout_s": self.timeout_s}
        async with self.client.stream(prompt, **options) as stream:  # type: ignore[arg-type]
            async for delta in stream:
                on_tokens(len(delta.token_ids))
            return stream.completion.timings


class LoadGenerator:
    """One run of load. Owns the records and the cap; used once."""

    def __init__(
        self,
        exchange: Exchange,
        prompts: PromptMaker,
        *,
        max_model_len: int,
        max_concurrency: int,
        clock: Clock | None = None,
        on_done: Callable[[RequestRecord], None] = lambda record: None,
    ) -> None:
        self.exchange = exchange
        self.prompts = prompts
        self.max_model_len = max_model_len
        self.clock: Clock = clock or LoopClock()
        self.on_done = on_done
        self.slots = asyncio.Semaphore(max_concurrency)
        self.num_capped = 0
        self.num_clipped = 0
        self.records: dict[int, RequestRecord] = {}

    async def run(self, arrivals: Iterable[Arrival]) -> LoadResult:
        """Send every arrival at its time and wait for all answers; each has a deadline, so the end is bounded."""
        start_s = self.clock.now_s()
        async with asyncio.TaskGroup() as tasks:
            for number, planned in enumerate(arrivals):
                arrival = fit(planned, self.max_model_len)
                self.num_clipped += arrival is not planned
                prompt = self.prompts.prompt(arrival)  # before the wait: building a long prompt takes time
                await self.clock.sleep_until(start_s + arrival.at_s)
                if self.slots.locked():
                    self.num_capped += 1
                await self.slots.acquire()
                tasks.create_task(self._send(number, arrival, prompt, start_s + arrival.at_s))
                await asyncio.sleep(0)  # the send starts before the next prompt is built
        records = tuple(self.records[number] for number in sorted(self.records))
        return LoadResult(records, start_s, self.clock.now_s(), self.num_capped, self.num_clipped)

    async def _send(self, number: int, arrival: Arrival, prompt: list[int], scheduled_s: float) -> None:
        """Time one exchange. Its failure is a result; anything but a typed error is a bug and ends the run."""
        sent_s = self.clock.now_s()
        token_times_s = array("d")  # 8 bytes a token: a long run keeps millions
        phases: Timings | None = None
        code: str | None = None
        message = ""
        try:
            phases = await self.exchange(
                prompt, arrival.max_tokens, lambda count: token_times_s.extend([self.clock.now_s()] * count)
            )
        except PdserveError as error:
            code, message = error.code, error.message
        finally:
            self.slots.release()
        timing = RequestTiming(
            scheduled_s=scheduled_s,
            sent_s=sent_s,
            first_token_s=token_times_s[0] if token_times_s else None,
            last_token_s=token_times_s[-1] if token_times_s else None,
            end_s=self.clock.now_s(),
            num_output_tokens=len(token_times_s),
        )
        record = RequestRecord(timing, len(prompt), token_times_s, phases, code, message)
        self.records[number] = record
        self.on_done(record)
