"""Open-loop sending on a clock moved by hand, and the sums drawn from it."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import statistics
from array import array
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from fake_inference import FakeInference, aborts, delta, running

from pdserve.client import AsyncClient, Timings
from pdserve.cluster.arrivals import Arrival, PromptMaker
from pdserve.cluster.load import ClientExchange, LoadGenerator, LoadResult, RequestRecord
from pdserve.cluster.load_report import render, spread, summarize
from pdserve.proto.errors import Overloaded
from pdserve.proto.types import SLO, RequestTiming

TOKEN_S = 0.01


class ManualClock:
    """Time that moves only when everybody waits."""

    def __init__(self) -> None:
        self.time_s = 100.0
        self.waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self.serial = itertools.count()

    def now_s(self) -> float:
        return self.time_s

    async def sleep_until(self, at_s: float) -> None:
        if at_s > self.time_s:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self.waiting, (at_s, next(self.serial), future))
            await future

    async def drive(self, work: Coroutine[None, None, LoadResult]) -> LoadResult:
        task = asyncio.create_task(work)
        while not task.done():
            for _ in range(10):
                await asyncio.sleep(0)
            if not task.done():
                self.time_s, _, future = heapq.heappop(self.waiting)
                future.set_result(None)
        return task.result()


class Server:
    """Answers after `service_s`, a token every 10 ms, but sends nothing from `stall_s[0]` to `stall_s[1]`."""

    def __init__(self, clock: ManualClock, stall_s: tuple[float, float] = (0, 0), service_s: float = 0.0) -> None:
        self.clock = clock
        self.stall_s = stall_s
        self.service_s = service_s
        self.num_running = self.max_running = 0

    async def __call__(self, prompt: list[int], max_tokens: int, on_tokens: Callable[[int], None]) -> Timings:
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        for position in range(max_tokens):
            due_s = self.clock.now_s() + (TOKEN_S if position else self.service_s)
            if self.stall_s[0] <= due_s - 100.0 < self.stall_s[1]:
                due_s = 100.0 + self.stall_s[1]
            await self.clock.sleep_until(due_s)
            on_tokens(1)
        self.num_running -= 1
        return Timings(prefill_queue_ms=1, prefill_ms=2, transfer_wait_ms=3, transfer_ms=4, decode_ms=5)


def generator(exchange: Any, clock: ManualClock, max_concurrency: int = 10_000, **options: Any) -> LoadGenerator:
    prompts = PromptMaker(64, [2], seed=0)
    return LoadGenerator(exchange, prompts, max_model_len=1000, max_concurrency=max_concurrency, clock=clock, **options)


def every(gap_s: float, count: int, max_tokens: int = 1) -> list[Arrival]:
    return [Arrival(number * gap_s, 4, max_tokens) for number in range(count)]


async def test_a_stall_shows_in_every_request_that_was_due_during_it() -> None:
    clock = ManualClock()
    server = Server(clock, stall_s=(2.0, 7.0))
    result = await clock.drive(generator(server, clock).run(every(0.1, 100)))
    report = summarize(result, SLO(1000, 100))
    assert server.max_running >= 50, "the sender must not wait for answers"
    assert report.ttft is not None
    assert report.ttft.max_ms == pytest.approx(5000, abs=1)
    assert report.ttft.p90_ms == pytest.approx(4000, abs=200)
    assert report.ttft.p50_ms <= 200
    # 50 requests were due in the stall, 10 of them in its last second.
    assert report.attainment == pytest.approx(0.60, abs=0.02)
    assert report.max_send_lag_ms == pytest.approx(0, abs=1e-6)


async def test_a_cap_on_concurrency_is_counted_in_latency_and_reported() -> None:
    clock = ManualClock()
    server = Server(clock, service_s=0.2)
    result = await clock.drive(generator(server, clock, max_concurrency=1).run(every(0.1, 50)))
    report = summarize(result, SLO(1000, 100))
    assert server.max_running == 1
    assert report.num_capped == 49
    assert report.ttft is not None
    # The last one was due at 4.9 s and is answered at 50 x 0.2 s; from its send it took only 0.2 s.
    assert report.ttft.max_ms == pytest.approx(5100)
    assert report.max_send_lag_ms == pytest.approx(4900)
    assert report.num_late > 40


async def test_a_plan_that_falls_behind_keeps_its_schedule() -> None:
    """A slow prompt source makes sends late; the lateness is latency."""
    clock = ManualClock()

    def slow() -> Iterator[Arrival]:
        for arrival in every(0.1, 3):
            clock.time_s += 1.0
            yield arrival

    result = await clock.drive(generator(Server(clock), clock).run(slow()))
    assert [record.timing.ttft_ms() for record in result.records] == pytest.approx([1000, 1900, 2800])


async def test_requests_go_out_at_their_times_in_their_lengths() -> None:
    clock = ManualClock()
    seen: list[tuple[float, int, int]] = []

    async def exchange(prompt: list[int], max_tokens: int, on_tokens: Callable[[int], None]) -> None:
        seen.append((clock.now_s() - 100.0, len(prompt), max_tokens))

    done: list[RequestRecord] = []
    arrivals = [Arrival(0.5, 3, 2), Arrival(0.5, 7, 9), Arrival(2.0, 5000, 10)]
    result = await clock.drive(generator(exchange, clock, on_done=done.append).run(arrivals))
    assert seen == [(0.5, 3, 2), (0.5, 7, 9), (2.0, 990, 10)]
    assert result.num_clipped == 1
    assert len(done) == 3


async def test_one_failure_is_a_result_and_the_others_go_on() -> None:
    clock = ManualClock()
    numbers = itertools.count()

    async def exchange(prompt: list[int], max_tokens: int, on_tokens: Callable[[int], None]) -> None:
        if next(numbers) % 4 == 1:
            raise Overloaded("queue full")
        on_tokens(1)

    report = summarize(await clock.drive(generator(exchange, clock).run(every(0.1, 8))), SLO(1000, 100))
    assert report.errors == {"RESOURCE_EXHAUSTED": 2}
    assert (report.num_requests, report.num_completed, report.attainment) == (8, 6, 0.75)
    assert report.first_error == "queue full"


async def test_a_bug_ends_the_run_instead_of_counting_as_an_error() -> None:
    clock = ManualClock()

    async def exchange(prompt: list[int], max_tokens: int, on_tokens: Callable[[int], None]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        await clock.drive(generator(exchange, clock).run(every(0.1, 2)))
    assert caught.group_contains(ZeroDivisionError)


async def test_goodput_needs_both_targets() -> None:
    clock = ManualClock()
    result = await clock.drive(generator(Server(clock, service_s=0.2), clock).run(every(1.0, 10, max_tokens=11)))
    both, no_ttft, no_tpot = (summarize(result, SLO(*slo)) for slo in ((250, 15), (150, 15), (250, 5)))
    assert (both.attainment, no_ttft.attainment, no_tpot.attainment) == (1.0, 0.0, 0.0)
    assert both.duration_s == pytest.approx(9.3)
    assert both.goodput_per_s == both.requests_per_s == pytest.approx(10 / 9.3)
    assert both.output_tokens_per_s == pytest.approx(110 / 9.3)
    assert both.tpot is not None
    assert both.itl is not None
    assert both.e2e is not None
    assert (both.tpot.mean_ms, both.itl.p50_ms, both.e2e.max_ms) == pytest.approx((10, 10, 300))
    assert both.phase_means_ms == {"queue": 1, "prefill": 2, "transfer": 7, "decode": 5}


def record(*token_times_s: float, code: str | None = None) -> RequestRecord:
    first, last = (token_times_s[0], token_times_s[-1]) if token_times_s else (None, None)
    timing = RequestTiming(0.0, 0.0, first, last, last or 0.0, len(token_times_s))
    return RequestRecord(timing, 1, array("d", token_times_s), None, code)


def test_tokens_of_one_message_have_no_gap_between_them() -> None:
    result = LoadResult((record(1.0, 1.0, 1.0, 2.0),), 0.0, 2.0, 0, 0)
    report = summarize(result, SLO(1000, 1000))
    assert report.itl is not None
    assert (report.itl.p50_ms, report.itl.max_ms) == (0, 1000)
    assert report.tpot is not None
    assert report.tpot.mean_ms == pytest.approx(1000 / 3)


def test_failed_requests_are_missed_and_do_not_flatter_the_latency() -> None:
    result = LoadResult((record(5.0), record(0.001, code="UNAVAILABLE")), 0.0, 5.0, 0, 0)
    report = summarize(result, SLO(10_000, 100))
    assert report.ttft is not None
    assert report.ttft.p50_ms == 5000
    assert report.attainment == 0.5


def test_nothing_measured_is_none_and_not_zero() -> None:
    report = summarize(LoadResult((), 0.0, 0.0, 0, 0), SLO(1, 1))
    assert (report.ttft, report.itl, report.attainment, report.phase_means_ms) == (None, None, 0.0, {})
    assert render(report)


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_percentiles_are_those_of_numpy_and_of_the_standard_library(count: int) -> None:
    values = np.random.default_rng(count).exponential(100, count).tolist()
    found = spread([*values, None])
    assert found is not None
    assert [found.p50_ms, found.p90_ms, found.p99_ms] == pytest.approx(np.percentile(values, [50, 90, 99]).tolist())
    assert (found.mean_ms, found.max_ms) == pytest.approx((statistics.fmean(values), max(values)))
    if count > 1:
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        assert [found.p50_ms, found.p90_ms, found.p99_ms] == pytest.approx([cuts[49], cuts[89], cuts[98]])


# -- through a real client ---------------------------------------------------------------------------------------


@pytest.fixture
def fake() -> Iterator[FakeInference]:
    with running(FakeInference()) as server:
        yield server


async def test_the_client_exchange_asks_for_exact_lengths(fake: FakeInference) -> None:
    async with AsyncClient(fake.endpoint) as client:
        load = LoadGenerator(
            ClientExchange(client, 30.0), PromptMaker(64, [2, 7], 0), max_model_len=100, max_concurrency=8
        )
        result = await load.run([Arrival(0.0, 5, 3), Arrival(0.001, 6, 4)])
    assert [record.timing.num_output_tokens for record in result.records] == [3, 4]
    assert [record.error_code for record in result.records] == [None, None]
    request = fake.requests[0]
    assert request.stopping.ignore_eos
    assert request.stopping.max_tokens in (3, 4)
    assert len(request.token_ids.ids) in (5, 6)
    assert result.records[0].phases == Timings(prefill_queue_ms=1, prefill_ms=2, transfer_ms=3, decode_ms=4, e2e_ms=10)


async def test_an_answer_that_breaks_off_is_an_error_with_the_tokens_that_came(fake: FakeInference) -> None:
    fake.script = aborts(grpc.StatusCode.UNAVAILABLE, "worker died", delta(0, 1, 2))
    async with AsyncClient(fake.endpoint) as client:
        load = LoadGenerator(ClientExchange(client, 30.0), PromptMaker(64, [], 0), max_model_len=100, max_concurrency=1)
        result = await load.run([Arrival(0.0, 5, 3)])
    assert result.records[0].error_code == "UNAVAILABLE"
    assert result.records[0].timing.num_output_tokens == 2
