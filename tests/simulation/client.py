"""The simulated clients: each sends its request to a router, reads what comes, and may go away or try again.

Keeps what each try was told, for the checks to judge. Stands where the router's gRPC edge stands: `emit` is as slow as
the client reads, and gives up on one that does not.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from simulation.scenario import STALL_TIMEOUT_S, Request

from pdserve.proto import inference_pb2 as pb
from pdserve.proto.clock import now
from pdserve.proto.errors import Overloaded, PdserveError
from pdserve.router.validation import StopOptions
from pdserve.router.writer import Job

if TYPE_CHECKING:
    from simulation.world import World

RETRY_S = 0.3


@dataclass(slots=True)
class Try:
    """One try of one request. Moments are on the router's clock; `end` is "" while it runs."""

    request: Request
    router: str
    number: int
    deadline_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finished: pb.Finished | None = None
    error: PdserveError | None = None
    end: str = ""
    end_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.request.request_id} (try {self.number})"


class Clients:
    """Owner of the tries."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.tries: list[Try] = []
        self._num_expected = len(world.scenario.requests)

    @property
    def num_open(self) -> int:
        """Tries that have not ended or not begun."""
        return self._num_expected + sum(not one.end for one in self.tries)

    def arrive(self, request: Request, number: int = 1) -> None:
        """Begin a try, or come back later if the router is away."""
        world = self._world
        name = f"router{request.router}"
        if world.process_of(name) is None:
            world.loop.at(world.loop.now_s + RETRY_S, None, self.arrive, request, number)
            return
        self._num_expected -= 1
        attempt = Try(request, name, number)
        self.tries.append(attempt)
        process = world.routers[name].process
        task = world.loop.spawn(process, self._run(attempt), f"client {request.request_id}")
        if request.cancel_after_s is not None:
            world.loop.at(world.loop.now_s + request.cancel_after_s, process, task.cancel)

    def router_died(self, name: str) -> None:
        """Nobody will tell those who waited there how it ends."""
        for one in self.tries:
            if one.router == name and not one.end:
                one.end = "router died"

    async def _run(self, attempt: Try) -> None:
        """In the router's process."""
        request, world = attempt.request, self._world
        arrival_s = now()
        attempt.deadline_s = arrival_s + request.timeout_s
        job = Job(
            request.request_id,
            request.prompt,
            request.sampling,
            StopOptions(request.stop_strings),
            arrival_s,
            attempt.deadline_s,
        )
        world.trace.add(
            attempt.router, f"gets {attempt.name}: {len(request.prompt)} + {request.sampling.max_tokens} tokens"
        )
        pipeline = world.routers[attempt.router].pipeline
        end = "finished"
        try:
            await pipeline.generate(job, lambda response: self._emit(attempt, response))
        except PdserveError as error:
            attempt.error = error
            end = type(error).__name__
        except asyncio.CancelledError:
            end = "cancelled"
        self._close(attempt, end)

    async def _emit(self, attempt: Try, response: pb.GenerateResponse) -> None:
        if attempt.request.read_s:
            try:
                async with asyncio.timeout(STALL_TIMEOUT_S):
                    await asyncio.sleep(attempt.request.read_s)
            except TimeoutError as error:
                raise Overloaded("the client reads too slowly") from error
        if attempt.finished is not None or attempt.end:
            attempt.problems.append("was told something after its end")
        if response.WhichOneof("event") == "finished":
            attempt.finished = response.finished
            return
        if response.output.index != len(attempt.token_ids):
            attempt.problems.append(f"was told token {response.output.index} after {len(attempt.token_ids)} tokens")
        attempt.token_ids.extend(token.token_id for token in response.output.tokens)
        attempt.text += response.output.text

    def _close(self, attempt: Try, end: str) -> None:
        world, request = self._world, attempt.request
        attempt.end = end
        attempt.end_s = now()
        world.trace.count(f"ends: {end}")
        why = "" if attempt.error is None or end == "InternalError" else f": {attempt.error.message}"
        world.trace.add(attempt.router, f"{attempt.name} ends after {len(attempt.token_ids)} tokens, {end}{why}")
        if attempt.error is not None and attempt.error.retryable and attempt.number <= request.num_retries:
            self._num_expected += 1
            world.loop.at(world.loop.now_s + RETRY_S, None, self.arrive, request, attempt.number + 1)
