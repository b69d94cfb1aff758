"""Bursts of load against a running cluster, as clients send them. Knows nothing of what the steps are measured for."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.client import AsyncClient, Timings
from pdserve.cluster.profiling_plan import Burst

LONGEST_ANSWER = 1 << 20


@dataclass(frozen=True, slots=True)
class Seen:
    """One answer as its client saw it, on the machine's monotonic clock: when it asked, when each token came."""

    num_prompt_tokens: int
    sent_s: float
    token_times_s: tuple[float, ...]
    timings: Timings | None

    def around_s(self) -> float | None:
        """What its first token took beyond waiting for steps and the steps themselves; `None` if not known."""
        if self.timings is None or not self.token_times_s:
            return None
        in_worker_ms = self.timings.prefill_queue_ms + self.timings.prefill_ms
        return self.token_times_s[0] - self.sent_s - in_worker_ms / 1e3


class Driver:
    """Sends random prompts; equal seeds send equal ones. `num_workers` decode; each gets a burst, all at once."""

    def __init__(self, client: AsyncClient, vocab_size: int, max_model_len: int, num_workers: int, seed: int) -> None:
        self._client = client
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._num_workers = num_workers
        self._random = random.Random(seed)

    async def ask(self, num_prompt_tokens: int, num_tokens: int) -> Seen:
        """One answer."""
        return await self._ask(self.prompt(num_prompt_tokens), num_tokens)

    async def burst(self, burst: Burst) -> list[Seen]:
        """Everything of a burst, for every worker at once; the prompts that were sent beside streams, one at a time."""
        num_streams = burst.num_streams * self._num_workers
        prompts = [self.prompt(burst.context_tokens) for _ in range(num_streams)]
        steps = burst.num_steps or min(LONGEST_ANSWER, self._max_model_len - burst.context_tokens)
        begun = [asyncio.Event() for _ in prompts]
        streams = [
            asyncio.create_task(self._ask(prompt, steps, event)) for prompt, event in zip(prompts, begun, strict=True)
        ]
        try:
            if burst.prompts:
                await asyncio.gather(*(event.wait() for event in begun))
                rounds = await asyncio.gather(*(self._in_turn(burst.prompts) for _ in range(self._num_workers)))
                return [seen for one in rounds for seen in one] if streams else []
            await asyncio.gather(*streams)
            return []
        finally:
            for task in streams:
                task.cancel()
            await asyncio.gather(*streams, return_exceptions=True)

    async def _in_turn(self, prompts: Sequence[int]) -> list[Seen]:
        return [await self.ask(num_tokens, 1) for num_tokens in prompts]

    async def _ask(self, prompt: list[int], num_tokens: int, begun: asyncio.Event | None = None) -> Seen:
        sent_s = time.monotonic()
        times_s: list[float] = []
        try:
            async with self._client.stream(prompt, max_tokens=num_tokens, temperature=0.0, ignore_eos=True) as stream:
                async for delta in stream:
                    times_s.extend([time.monotonic()] * len(delta.token_ids))
                    if begun is not None:
                        begun.set()
                timings = stream.completion.timings
        finally:
            if begun is not None:
                begun.set()  # nobody waits for one that failed: the failure is what its caller gets
        return Seen(len(prompt), sent_s, tuple(times_s), timings)

    def prompt(self, num_tokens: int) -> list[int]:
        """Any tokens but the few at the start of a vocabulary, which may be special."""
        first = min(10, self._vocab_size - 1)
        return [self._random.randrange(first, self._vocab_size) for _ in range(num_tokens)]
