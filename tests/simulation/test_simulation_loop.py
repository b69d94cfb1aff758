"""The simulation's own ground: virtual time, processes with clocks of their own, and a network that fails as told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from random import Random

import grpc
import grpc.aio
import pytest
from simulation.loop import Process, SimLoop
from simulation.network import KEEPALIVE_S, Network, Weather
from simulation.rpc import Rpc
from simulation.trace import Trace

from pdserve.proto import worker_pb2 as pb
from pdserve.proto import worker_pb2_grpc as pb_grpc
from pdserve.proto.clock import now

DAY_S = 86_400.0


class Ground:
    """A loop, two processes and the network between them."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.loop = SimLoop(Random(1), self.errors.append)
        self.trace = Trace(lambda: self.loop.now_s)
        self.weather = Weather()
        self.network = Network(self.loop, Random(2), self.trace, self.weather)
        self.rpc = Rpc(self.network)
        self.here, self.there = Process("here"), Process("there")
        self.heard: list[object] = []

    def ask(self, timeout_s: float = 2.0) -> None:
        """One unary call from here to there; what came of it is heard."""

        async def call() -> None:
            stub = pb_grpc.WorkerStub(self.rpc.open_channel("there:1"))
            try:
                self.heard.append(await stub.Load(pb.LoadRequest(), timeout=timeout_s))
            except grpc.aio.AioRpcError as error:
                self.heard.append(error.code().name)

        self.loop.spawn(self.here, call(), "call")

    def listen(self) -> None:
        """One stream from there."""

        async def read() -> None:
            stub = pb_grpc.WorkerStub(self.rpc.open_channel("there:1"))
            try:
                async for output in stub.Outputs(pb.OutputsRequest()):
                    self.heard.append(output.load.num_steps)
                self.heard.append("end")
            except grpc.aio.AioRpcError as error:
                self.heard.append(error.code().name)

        self.loop.spawn(self.here, read(), "read")


class Service(pb_grpc.WorkerServicer):
    """Counts calls; streams a number every second until it is cancelled."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.num_ended_streams = 0

    async def Load(self, request: pb.LoadRequest, context: object) -> pb.WorkerLoad:
        self.num_calls += 1
        return pb.WorkerLoad(num_steps=self.num_calls)

    async def Outputs(self, request: pb.OutputsRequest, context: object):  # type: ignore[no-untyped-def]
        try:
            for number in range(100):
                yield pb.StepOutput(load=pb.WorkerLoad(num_steps=number))
                await asyncio.sleep(1.0)
        finally:
            self.num_ended_streams += 1


@pytest.fixture
def ground() -> Iterator[Ground]:
    made = Ground()
    yield made
    made.loop.finish()


@pytest.fixture
def service(ground: Ground) -> Service:
    served = Service()
    ground.rpc.listen("there:1", ground.there, (served,))
    return served


def every_second(loop: SimLoop, process: Process, seen: Callable[[], None]) -> None:
    async def tick() -> None:
        while True:
            await asyncio.sleep(1.0)
            seen()

    loop.spawn(process, tick(), "tick")


def test_a_day_takes_no_time(ground: Ground) -> None:
    moments: list[float] = []
    every_second(ground.loop, ground.here, lambda: moments.append(ground.loop.now_s))
    ground.loop.run_until(1000.0)
    assert len(moments) == 1000
    ground.loop.run_until(DAY_S)
    assert ground.loop.now_s == DAY_S
    assert not ground.errors


def test_each_process_has_its_own_clock(ground: Ground) -> None:
    fast = Process("fast", clock_offset_s=500.0, clock_rate=1.25)
    moments: list[tuple[float, float]] = []
    every_second(ground.loop, fast, lambda: moments.append((ground.loop.now_s, now())))
    ground.loop.run_until(8.0)
    assert [true_s for true_s, _ in moments] == pytest.approx([0.8 * number for number in range(1, 11)])
    assert [clock_s for _, clock_s in moments] == pytest.approx([500.0 + number for number in range(1, 11)])


def test_a_frozen_process_does_all_it_missed_in_order(ground: Ground) -> None:
    done: list[tuple[float, int]] = []
    for number in range(5):
        ground.loop.at(float(number), ground.here, lambda number=number: done.append((ground.loop.now_s, number)))
    ground.loop.at(0.5, None, ground.loop.freeze, ground.here)
    ground.loop.at(3.5, None, ground.loop.thaw, ground.here)
    ground.loop.run_until(10.0)
    assert done == [(0.0, 0), (3.5, 1), (3.5, 2), (3.5, 3), (4.0, 4)]


def test_a_dead_process_does_nothing_more_not_even_clean_up(ground: Ground) -> None:
    done: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(5.0)
            done.append("work")
        finally:
            done.append("clean-up")

    ground.loop.spawn(ground.here, work(), "work")
    ground.loop.at(1.0, None, ground.loop.kill, ground.here)
    ground.loop.run_until(10.0)
    assert done == []


def test_what_a_callback_raises_is_not_lost(ground: Ground) -> None:
    def fail() -> None:
        raise ValueError("unexpected")

    ground.loop.at(1.0, ground.here, fail)
    ground.loop.run_until(2.0)
    assert "unexpected" in ground.errors[0]


def test_a_call_is_answered(ground: Ground, service: Service) -> None:
    ground.ask()
    ground.loop.run_until(1.0)
    assert ground.heard == [pb.WorkerLoad(num_steps=1)]


def test_a_call_whose_answer_is_lost_has_happened(ground: Ground, service: Service) -> None:
    ground.network.cut("there", "here")
    ground.ask()
    ground.loop.run_until(5.0)
    assert service.num_calls == 1
    assert ground.heard == ["DEADLINE_EXCEEDED"]


def test_a_call_that_is_lost_has_not_happened(ground: Ground, service: Service) -> None:
    ground.network.cut("here", "there")
    ground.ask()
    ground.loop.run_until(5.0)
    assert service.num_calls == 0
    assert ground.heard == ["DEADLINE_EXCEEDED"]


def test_a_call_that_waits_for_the_cable_arrives_late(ground: Ground, service: Service) -> None:
    ground.weather.cut_messages_wait = True
    ground.network.cut("here", "there")
    ground.loop.at(4.0, None, ground.network.mend, "here", "there")
    ground.ask()
    ground.loop.run_until(5.0)
    assert service.num_calls == 1
    assert ground.heard == ["DEADLINE_EXCEEDED"]


def test_a_doubled_call_happens_twice_and_is_answered_once(ground: Ground, service: Service) -> None:
    ground.weather.duplication = 1.0
    ground.ask()
    ground.loop.run_until(5.0)
    assert service.num_calls == 2
    assert len(ground.heard) == 1


def test_a_call_to_nobody_fails_at_once_and_one_to_a_vanished_host_at_its_deadline(
    ground: Ground, service: Service
) -> None:
    ground.rpc.close("there:1", silent=False)
    ground.ask()
    ground.loop.run_until(0.5)
    assert ground.heard == ["UNAVAILABLE"]
    ground.rpc.close("there:1", silent=True)
    ground.ask()
    ground.loop.run_until(1.0)
    assert ground.heard == ["UNAVAILABLE"]
    ground.loop.run_until(5.0)
    assert ground.heard == ["UNAVAILABLE", "DEADLINE_EXCEEDED"]


def test_a_stream_goes_on_after_a_short_cut_and_misses_nothing(ground: Ground, service: Service) -> None:
    ground.listen()
    ground.loop.at(2.5, None, ground.network.cut, "there", "here")
    ground.loop.at(5.5, None, ground.network.mend, "there", "here")
    ground.loop.run_until(4.0)
    assert ground.heard == [0, 1, 2]
    ground.loop.run_until(8.5)
    assert ground.heard == list(range(9))


def test_both_ends_of_a_stream_give_up_in_a_long_cut(ground: Ground, service: Service) -> None:
    ground.listen()
    ground.loop.at(2.5, None, ground.network.cut, "there", "here")
    ground.loop.run_until(2.5 + KEEPALIVE_S[1] + 1.0)
    assert ground.heard == [0, 1, 2, "UNAVAILABLE"]
    assert service.num_ended_streams == 1


def test_a_crash_breaks_its_streams(ground: Ground, service: Service) -> None:
    ground.listen()
    ground.loop.run_until(1.5)
    ground.loop.kill(ground.there)
    for connection in ground.network.of(ground.there):
        connection.end_died(ground.there, silent=False)
    ground.loop.run_until(3.0)
    assert ground.heard == [0, 1, "UNAVAILABLE"]
    assert service.num_ended_streams == 0
